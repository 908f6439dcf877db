"""Masks: exact numbers, stratified ratios, block shapes, the same for any division among ranks."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2.data.masks import MaskConfig, draw_masks
from dinov2.exits import UserError

GRIDS = [(1, 1), (2, 3), (4, 4), (16, 16), (7, 24)]


def drawn(config: MaskConfig | None = None, grid=(16, 16), total=64, seed=0, step=0, crops=None) -> Tensor:
    crops = range(total) if crops is None else crops
    return draw_masks(config or MaskConfig(), grid=grid, crops=crops, total=total, seed=seed, step=step)


@pytest.mark.parametrize("total", [2, 6, 64, 254])
def test_half_of_the_crops_are_masked_with_stratified_ratios(total: int):
    for step in range(5):
        counts = drawn(total=total, step=step).sum(dim=1)
        masked = sorted(int(count) for count in counts if count)
        assert len(masked) == total // 2
        width = 0.4 / len(masked)
        for k, count in enumerate(masked):  # rounding to patches keeps their order
            assert 0.1 + k * width - 0.5 / 256 <= count / 256 <= 0.1 + (k + 1) * width + 0.5 / 256


@pytest.mark.parametrize("grid", GRIDS)
def test_every_masked_crop_has_its_exact_number_of_patches(grid: tuple[int, int]):
    patches = grid[0] * grid[1]
    for ratio in (0.0, 0.1, 0.37, 0.5, 0.9, 1.0):
        masks = drawn(MaskConfig(probability=1.0, ratio=[ratio, ratio]), grid, total=20)
        assert masks.dtype == torch.bool
        assert masks.shape == (20, patches)
        assert masks.sum(dim=1).tolist() == [max(1, round(ratio * patches))] * 20


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_the_share_of_masked_crops_is_exact(probability: float):
    masks = drawn(MaskConfig(probability=probability), total=40)
    assert int(masks.any(dim=1).sum()) == round(40 * probability)


def test_ranks_agree_however_the_crops_are_divided():
    whole = drawn(total=48, seed=3, step=17)
    shuffled = np.random.default_rng(0).permutation(48).tolist()
    for crops in (range(48), range(12, 24), [*range(6), *range(24, 30)], shuffled, []):
        assert torch.equal(drawn(total=48, seed=3, step=17, crops=crops), whole[list(crops)])


def test_seeds_and_steps_give_other_masks():
    masks = [drawn(seed=seed, step=step) for seed in (0, 1) for step in (0, 1)]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(masks))
    # which crops are masked, and which of them have the largest ratios, changes too
    chosen = torch.stack([drawn(step=step, total=10).any(dim=1) for step in range(2000)]).float().mean(dim=0)
    assert (chosen - 0.5).abs().max() < 0.06
    assert len({int(drawn(step=step, total=10).sum(dim=1).argmax()) for step in range(200)}) == 10


def test_masks_are_blocks_and_cover_the_picture():
    masks = torch.cat([drawn(step=step) for step in range(20)]).view(-1, 16, 16).float()
    masked = masks[masks.sum(dim=(1, 2)) > 0]
    right = (masked[:, :, 1:] * masked[:, :, :-1]).sum() / masked[:, :, 1:].sum()
    assert right > 0.7  # single patches at random would give 0.3
    covered = masked.mean(dim=0)
    assert 0 < covered.min() < covered.max() < 0.6  # corners are in few rectangles, the middle in many
    assert (covered - covered.flip(0)).abs().max() < 0.15
    assert (covered - covered.T).abs().max() < 0.15


def test_rectangles_are_as_large_and_as_slim_as_they_may_be():
    wanted = MaskConfig(probability=1.0, ratio=[36 / 4096, 36 / 4096], min_patches=36)
    heights = []
    for mask in drawn(wanted, (64, 64), total=500).view(-1, 64, 64):
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        if rows * columns == 36:  # one rectangle; the others were filled up patch by patch
            heights.append(int(rows))
    assert set(heights) == {4, 6, 9}  # of 36 patches: aspects 4/9, 1 and 9/4; 3 x 12 has 1/4, less than 0.3
    assert len(heights) > 250


@pytest.mark.parametrize(
    "setting",
    [{"ratio": [0.5, 0.1]}, {"ratio": [0.5]}, {"probability": 1.5}, {"aspect": 0.0}, {"min_patches": 0}],
)
def test_impossible_settings_are_refused(setting: dict[str, float]):
    with pytest.raises(UserError, match=r"should (be|lie)"):
        MaskConfig(**setting)  # pyright: ignore[reportArgumentType]  # that is the point
