"""From a task's truth to a probe that answers for it, whichever of the three is wanted."""

from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from dinov2.console import progress
from evals.bench import Bench
from evals.dense_batches import kept_windows, random_windows
from evals.dense_config import DenseConfig
from evals.dense_data import DensePart
from evals.dense_probes import Bank, Probe, RidgeSums, train_linear
from evals.patches import KeptTokens, PatchTokens
from evals.windows import Tiling


class Target(Protocol):
    """What is to be learnt about pictures."""

    @property
    def outputs(self) -> int:
        """Of the trained layer."""
        ...

    @property
    def solved(self) -> int:
        """Outputs of the other probes."""
        ...

    @property
    def scales(self) -> tuple[float, float]:
        """How much smaller and larger a training picture may be made."""
        ...

    @property
    def nothing(self) -> float:
        """The truth where there is no picture."""
        ...

    def truth(self, part: DensePart, row: int, size: tuple[int, int]) -> NDArray[Any]:
        """The truth about a picture of `size` (width, height), [height, width]."""
        ...

    def loss(
        self, scores: Float[Tensor, "batch outputs rows columns"], truth: Tensor
    ) -> Float[Tensor, ""]: ...

    def of_patches(self, truth: Tensor, patch: int) -> tuple[Tensor, Tensor]:
        """Targets [patches, solved] of windows' patches, and how much each counts [patches], 0 to 1."""
        ...


def fit(
    bench: Bench, tokens: PatchTokens, train: DensePart, target: Target, config: DenseConfig, work: Path
) -> Probe:
    """The probe that the settings name, learnt on the training part."""

    def truth(row: int, size: tuple[int, int]) -> NDArray[Any]:
        return target.truth(train, row, size)

    if config.probe != "linear":
        return _in_one_pass(tokens, train, target, config)
    kept = None if config.augment else KeptTokens(tokens, train)
    side = tokens.tiling.window // tokens.tiling.patch

    def batches(start: int) -> Any:
        if kept is not None:
            return kept_windows(kept, truth, config, start=start)
        return random_windows(
            tokens, train, truth, config, scales=target.scales, nothing=target.nothing, start=start
        )

    def loss(scores: Float[Tensor, "batch patches outputs"], under: Tensor) -> Tensor:
        return target.loss(scores.transpose(1, 2).unflatten(2, (side, side)), under)

    return train_linear(bench, tokens.dim, target.outputs, batches, loss, config, work / "head.safetensors")


@torch.no_grad()
def answered(
    probe: Probe, tokens: Float[Tensor, "windows patches dim"], tiling: Tiling
) -> Float[Tensor, "windows outputs rows columns"]:
    """The probe's outputs for a picture's windows, as maps."""
    outputs = probe(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
    return outputs.transpose(1, 2).unflatten(2, tiling.grid)


def by_patch(truth: Tensor, patch: int) -> Tensor:
    """Pixels of windows [windows, height, width] by the patch that they lie in, [patches, patch²]."""
    rows, columns = truth.shape[1] // patch, truth.shape[2] // patch
    cells = truth.unflatten(2, (columns, patch)).unflatten(1, (rows, patch))
    return cells.permute(0, 1, 3, 2, 4).reshape(-1, patch * patch)


def _in_one_pass(tokens: PatchTokens, train: DensePart, target: Target, config: DenseConfig) -> Probe:
    learner = (
        RidgeSums(tokens.dim, target.solved, tokens.bench.device)
        if config.probe == "ridge"
        else Bank(config.bank, len(train), config.seed)
    )
    kept = KeptTokens(tokens, train)
    for row, tiling, found in progress(kept.all(), total=len(kept), what=config.probe):
        under = tiling.cut_truth(target.truth(train, row, tiling.picture))
        targets, weights = target.of_patches(under, tiling.patch)
        learner.add(found.flatten(0, 1), targets.to(found.device), weights.to(found.device))
    if isinstance(learner, RidgeSums):
        return learner.solve(config.ridge)
    return learner.probe(config.k, config.temperature)
