"""Settings that every evaluation has."""

from dataclasses import dataclass
from typing import Any

from dinov2.config import at_least, one_of, required, runtime
from dinov2.features import PRECISIONS

ANSWERS = ("train", "intersect")


def place(default: Any = None) -> Any:
    """A setting that says where something lies. Results state it by its content: see a task's `sources`."""
    return runtime(default)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    backbone: str = place(required())  # the first word: a folder, timm:NAME, weights?architecture=…, pixels
    data: str | None = place()  # labelled pictures in two parts: train/ and val/ folders, or a split column
    train: str | None = place()  # or each part by itself: labelled pictures to learn from
    test: str | None = place()  # and those to be recognised
    output: str = runtime(required())  # folder of features, results and pages, shared by tasks and backbones
    size: int = 224  # pixels along a side of what the backbone sees
    resize: int | None = None  # pixels of the short side before the crop; null: 256 for 224, in proportion
    precision: str = "float32"  # or bfloat16, float16: what autocast uses
    seed: int = 0  # of whatever is drawn
    batch: int = runtime(64)  # pictures at once through the backbone
    workers: int = runtime(0)  # processes that decode
    device: str = runtime("auto")  # auto, cpu, cuda, cuda:1, …
    features_gib: float = runtime(50.0)  # of features to keep in output; the longest unused go first
    cache: str | None = runtime(None)  # folder for tar indexes; null: ~/.cache/dinov2

    def __post_init__(self) -> None:
        one_of(self.precision, PRECISIONS, "precision")
        at_least(1, self, "size", "batch")
        at_least(0, self, "workers", "features_gib")


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(EvalConfig):
    """Settings of tasks that learn classes from one part and recognise them in another."""

    classes: str = "train"  # answers: all that were learnt; or intersect, those in test too (ImageNet-A)
    class_map: str | None = place()  # numbers: test classes are places in the sorted list (V2); or a CSV

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.classes, ANSWERS, "classes")
