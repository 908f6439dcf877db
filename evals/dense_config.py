"""Settings that the tasks with an answer for every pixel share."""

from dataclasses import dataclass

from dinov2.config import at_least, one_of, runtime
from dinov2.exits import UserError
from evals.dense_data import LayoutConfig

PROBES = ("linear", "ridge", "knn")


@dataclass(frozen=True, kw_only=True)
class DenseConfig(LayoutConfig):
    """A window's `size` is rounded up to whole patches; a picture's short side is `resize`, or as long."""

    batch: int = runtime(16)  # windows at once through the backbone
    probe: str = "linear"  # what learns from patch tokens: linear (trained), ridge (solved), knn (searched)
    iterations: int = 40_000  # linear: steps
    batch_size: int = 16  # linear: windows a step
    learning_rate: float = 1e-3  # linear: of AdamW, after a warm-up, then falling to 0 in a line
    weight_decay: float = 1e-4  # linear
    augment: bool = True  # linear: random windows, through the backbone at every step; false: features once
    ridge: float = 1e-3  # ridge: the penalty, in mean variances of a token's entries
    k: int = 20  # knn: patches that answer together
    temperature: float = 0.07  # knn: of their softmax
    bank: int = 50_000  # knn: training patches to search, drawn evenly from all pictures
    save_every: int = runtime(500)  # linear: steps that a killed command loses at most

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.probe, PROBES, "probe")
        at_least(1, self, "iterations", "batch_size", "k", "bank", "save_every")
        at_least(0, self, "weight_decay")
        if self.resize is not None and self.resize < self.size:
            raise UserError(f"resize={self.resize} is less than size={self.size}: no window would fit")
        for name in ("learning_rate", "temperature", "ridge"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: give more than 0")
