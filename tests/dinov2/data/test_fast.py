"""The fast augmentation against the exact one, and its parts against what they stand for."""

import random
from pathlib import Path
from typing import Any

import dinov2.vision_ops  # noqa: F401  # for what its import does: torchvision can be imported

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from dinov2.config import read
from dinov2.data.augment import AugmentConfig, CropPlan, MultiCrop, normalise
from dinov2.data.fast import GREY, FastCrop, Light, change_of, edited
from dinov2.data.loader import batches
from dinov2.data.on_device import changed
from dinov2.data.order import derive_seed
from dinov2.exits import UserError
from dinov2.train.config import TrainConfig
from dinov2.train.feed import feed, training_order, training_source
from tests.pictures import class_folder, encoded, picture

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL: dict[str, Any] = {"global_size": 112, "local_size": 48}


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / ((a.double() - b.double()) ** 2).mean().clamp(min=1e-5)))


def qualities(config: AugmentConfig, pictures: int) -> list[float]:
    """PSNR of every fast crop against the exact one."""
    exact, fast = MultiCrop(config), FastCrop(config)
    found = []
    for seed in range(pictures):
        data = encoded(picture(seed, 0, (250, 190)), "jpg")
        pairs = zip(exact(exact.open(data), seed), fast(fast.open(data), seed), strict=True)
        found += [psnr(a, b) for theirs, ours in pairs for a, b in zip(theirs, ours, strict=True)]
    return sorted(found)


def test_crops_are_those_of_the_exact_way_but_for_roundings():
    plain = AugmentConfig(**SMALL, jitter_p=0, grey_p=0, blur="simclr")
    assert min(qualities(plain, 6)) > 55  # crops, flips, blur, solarisation
    found = qualities(AugmentConfig(**SMALL), 20)
    assert np.mean(found) > 45
    assert found[len(found) // 10] > 33  # a tenth, where the exact way cuts off at black or white in between
    assert found[0] > 22


def test_light_is_the_product_of_its_steps():
    draws, numbers = np.random.default_rng(0), random.Random(0)
    for _ in range(50):
        crop = draws.uniform(0, 255, (7, 5, 3))
        steps = [(numbers.randrange(3), numbers.uniform(0, 2)) for _ in range(numbers.randrange(1, 6))]
        light, wanted = Light(), crop
        for index, amount in steps:
            light = light.then(index, amount)
            grey = (wanted @ GREY)[..., None]
            other = (0.0, grey.mean(), grey)[index]
            wanted = amount * wanted + (1 - amount) * other
        grey = (crop @ GREY)[..., None]
        assert np.allclose(light.own * crop + light.grey * grey + light.mean * grey.mean(), wanted)


def edit(**changes: Any) -> CropPlan:
    bare = CropPlan(box=(0, 0, 1, 1), flip=False, colours=[], grey=False, sigma=None, solarise=False)
    return bare._replace(**changes)


@pytest.mark.parametrize("colours", [[(0, 1.3)], [(1, 0.6)], [(2, 1.4)], [(0, 0.7), (1, 1.4), (2, 0.8)]])
def test_light_is_carried_out_within_one_level(colours: list[tuple[int, float]]):
    """With and without weight on the grey: by different calls."""
    crop = np.asarray(picture(1, 1, (90, 70)))
    light = change_of(edit(colours=colours)).before
    grey = (crop @ GREY)[..., None]
    wanted = (light.own * crop + light.grey * grey + light.mean * grey.mean()).clip(0, 255)
    assert np.abs(edited(crop, edit(colours=colours), 9) - wanted).max() <= 1


@pytest.mark.parametrize("hue", [-0.1, 0.04])
def test_hue_goes_round_as_opencv_counts_it(hue: float):
    crop = np.random.default_rng(0).integers(0, 256, (31, 45, 3), np.uint8)
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(255 * hue) % 256)
    assert np.array_equal(
        edited(crop, edit(colours=[(3, hue)]), 9), cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    )


@pytest.mark.parametrize("kernel", [3, 9, 15])
def test_blur_and_solarisation_are_torchvisions_within_one_level(kernel: int):
    crop = np.random.default_rng(0).integers(0, 256, (31, 45, 3), np.uint8)
    planes = torch.from_numpy(crop).permute(2, 0, 1)
    for sigma in (0.1, 0.26, 0.3, 0.6, 1.1, 2.0):
        wanted = F.gaussian_blur(planes, [kernel, kernel], [sigma, sigma]).permute(1, 2, 0).numpy()
        assert np.abs(edited(crop, edit(sigma=sigma), kernel) - wanted.astype(int)).max() <= 1
    solarised = torch.from_numpy(edited(crop, edit(solarise=True), kernel)).permute(2, 0, 1)
    assert torch.equal(solarised, F.solarize(planes, 128))


def test_hue_stands_where_it_was_drawn():
    change = change_of(edit(colours=[(0, 0.7), (3, 0.05), (2, 1.3)], grey=True))
    assert change.before == Light().then(0, 0.7)
    assert change.hue == 0.05
    assert change.after == Light().then(2, 1.3).then(2, 0.0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_device_does_what_was_left_to_it(device: str):
    config = AugmentConfig(**SMALL)
    whole, cut = FastCrop(config), FastCrop(config, later=True)
    found = []
    for seed in range(12):
        image = picture(seed, 1, (250, 190))
        rows = cut.changes(image, seed)
        assert rows is not None
        parts = zip(whole(image, seed), cut(image, seed), rows.split([2, 8]), strict=True)
        for wanted, bare, own in parts:
            shown = 255 * changed(bare.to(device), own, config.blur_kernel).cpu()
            found += [psnr(a, b) for a, b in zip(wanted, shown, strict=True)]
    assert min(found) > 38  # eight bits of hue are the coarsest of what the other rounds
    assert np.mean(found) > 50


def test_training_sees_the_same_views_whoever_finishes_them(tmp_path: Path):
    class_folder(tmp_path / "pool", classes=2, each=4, size=(120, 90))
    words = f"data={tmp_path / 'pool'} output=x steps=2 batch=4 model.patch=8 augment.mode=fast"
    sizes = "augment.global_size=48 augment.local_size=24 augment.local_crops=3"
    config = read(TrainConfig, [*words.split(), *sizes.split()])
    source = training_source(config)
    here = [views for views, _ in feed(config, source, CPU, int, first=0, last=2)]
    crop = FastCrop(config.augment, later=True)
    order, seed = training_order(config, source), derive_seed(config.seed, "augment")
    left = batches(source, order, crop, seed=seed, global_batch=4, stop_step=2, workers=1)
    for views, batch in zip(here, left, strict=True):
        assert batch.changes is not None
        rows = batch.changes.split([len(batch.global_crops), len(batch.local_crops)])
        for wanted, crops, own in zip(
            views.crops(), (batch.global_crops, batch.local_crops), rows, strict=True
        ):
            shown = normalise(changed(crops, own, config.augment.blur_kernel), MEAN, STD)
            assert (shown - wanted).abs().mean() < 0.02  # a level is 0.017


def test_what_cannot_be_done_fast_is_refused():
    with pytest.raises(UserError, match="exact"):
        FastCrop(AugmentConfig(mean=[0.5], std=[0.5]))
    with pytest.raises(UserError, match="did you mean 'fast'"):
        AugmentConfig(mode="fats")
