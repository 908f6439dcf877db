"""The three conventions of resizing positions, each against its definition in float64."""

import numpy as np
import pytest
import torch

from dinov2.models.positions import resized_positions


def cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def matrix(old: int, new: int, convention: str) -> np.ndarray:
    """[new, old]: resizing along one axis. Torch's kernels have a = -0.75, and -0.5 where they antialias."""
    step = old / (new + 0.1) if convention == "release" else old / new
    centres = (np.arange(new) + 0.5) * step
    weights = np.zeros((new, old))
    if convention == "exact_antialias":
        width = max(step, 1.0)
        weights = cubic((np.arange(old) + 0.5 - centres[:, None]) / width, -0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    for row, centre in enumerate(centres - 0.5):
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[row, min(max(tap, 0), old - 1)] += cubic(np.array(centre - tap), -0.75)
    return weights


@pytest.mark.parametrize("convention", ["release", "exact", "exact_antialias"])
@pytest.mark.parametrize("grid", [(16, 16), (7, 7), (14, 22), (37, 20), (37, 37), (40, 50)])
def test_resizing_follows_its_convention(convention: str, grid: tuple[int, int]) -> None:
    embedding = 0.02 * torch.randn(1, 37 * 37, 8, generator=torch.Generator().manual_seed(0))
    square = embedding.double().numpy().reshape(37, 37, 8)
    rows, columns = (matrix(37, size, convention) for size in grid)
    if grid == (37, 37):
        rows = columns = np.eye(37)  # its own grid is never resized, whatever the convention
    expected = np.einsum("ri,cj,ijd->rcd", rows, columns, square).reshape(1, -1, 8)
    ours = resized_positions(embedding, grid, convention).double().numpy()
    assert np.abs(ours - expected).max() < 1e-6


def test_the_conventions_differ_by_more_than_rounding() -> None:
    embedding = 0.02 * torch.randn(1, 37 * 37, 64, generator=torch.Generator().manual_seed(0))
    names = ("release", "exact", "exact_antialias")
    release, exact, smooth = (resized_positions(embedding, (16, 16), name) for name in names)
    assert (release - exact).abs().max() > 2e-3
    assert (exact - smooth).abs().max() > 0.04
