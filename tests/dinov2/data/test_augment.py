"""The augmentation against torchvision's own on Pillow pictures: pixels, and distributions of the draws."""

import pickle
import random
from collections import Counter
from typing import Any

import dinov2.vision_ops  # noqa: F401  # for what its import does: torchvision can be imported

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, kstest
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from dinov2.data.augment import (
    AugmentConfig,
    CropKind,
    CropPlan,
    MultiCrop,
    cut,
    draw_plan,
    normalise,
    solarised,
)
from dinov2.data.blur import blur, blur_one
from dinov2.data.colours import recoloured
from dinov2.exits import UserError
from tests.pictures import picture

SMALL = AugmentConfig(global_size=64, local_size=32)
THEIRS: list[Any] = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]


def reference(image: Any, plan: CropPlan, size: int, kernel: int) -> Tensor:
    """The same plan by torchvision's transforms of Pillow pictures, one after the other."""
    image = F.resized_crop(image, *plan.box, [size, size], InterpolationMode.BICUBIC)
    if plan.flip:
        image = F.horizontal_flip(image)
    for index, amount in plan.colours:
        image = THEIRS[index](image, amount)
    if plan.grey:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if plan.sigma is not None:
        image = F.gaussian_blur(image, [kernel, kernel], [plan.sigma, plan.sigma])
    if plan.solarise:
        image = F.solarize(image, 128)
    return F.pil_to_tensor(image)


def plans_of(crop: MultiCrop, height: int, width: int, seed: int) -> list[CropPlan]:
    """What `crop` draws for a picture of this size, without carrying it out."""
    draws = random.Random(seed)
    return [
        draw_plan(crop.config, kind, height, width, draws) for kind in crop.global_kinds + crop.local_kinds
    ]


def global_states() -> list[bytes]:
    legacy = np.random.get_state()  # noqa: NPY002  # the state that others use is the one to leave alone
    return [pickle.dumps(state) for state in (torch.get_rng_state().tolist(), legacy, random.getstate())]


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / ((a.double() - b.double()) ** 2).mean().clamp(min=1e-9)))


@pytest.mark.parametrize("config", [SMALL, AugmentConfig(local_size=98, blur="as_released")])
def test_pixels_equal_torchvision_on_pillow(config: AugmentConfig):
    crop = MultiCrop(config)
    quality = []
    for seed in range(12):
        image = picture(seed, 0, (200, 150))
        plans = plans_of(crop, 150, 200, seed)
        got = [*crop(image, seed)[0], *crop(image, seed)[1]]
        for plan, pixels in zip(plans, got, strict=True):
            wanted = reference(image, plan, pixels.shape[-1], config.blur_kernel)
            quality.append(psnr(pixels, wanted))
    assert np.mean(quality) > 65
    assert min(quality) > 48  # the worst are those whose hue changes: Pillow's HSV magnifies a level or two


def test_resizing_is_torchvisions():
    pixels = F.pil_to_tensor(picture(1, 2, (120, 90)))  # pyright: ignore[reportArgumentType]  # typed for tensors
    for plan in plans_of(MultiCrop(SMALL), 90, 120, seed=1):
        wanted = F.resized_crop(pixels, *plan.box, [64, 64], InterpolationMode.BICUBIC, antialias=True)
        bare = plan._replace(flip=False, colours=[], grey=False)
        assert torch.equal(cut(pixels, bare, 64), wanted)


def test_colours_are_torchvisions_on_pillow():
    image: Any = picture(2, 1, (150, 120))
    planes = F.pil_to_tensor(image).numpy()
    for index in range(3):
        for amount in (0.0, 0.6, 0.75, 1.0, 1.3, 1.4):
            wanted = F.pil_to_tensor(THEIRS[index](image, amount)).numpy()
            assert np.array_equal(recoloured(planes, [(index, amount)], grey=False), wanted)
    grey = recoloured(planes, [], grey=True)
    assert np.array_equal(grey, F.pil_to_tensor(F.rgb_to_grayscale(image, num_output_channels=3)))
    first = F.adjust_contrast(F.adjust_brightness(image, 1.4), 0.6)  # each rounds and cuts off by itself
    assert np.array_equal(recoloured(planes, [(0, 1.4), (1, 0.6)], grey=False), F.pil_to_tensor(first))


@pytest.mark.parametrize("amount", [-0.5, -0.1, -0.002, 0.03, 0.1])
def test_hue_is_pillows_but_where_a_colour_lies_on_a_step(amount: float):
    """Of a quarter of a million colours, the corners and greys among them."""
    levels = np.array([*range(0, 255, 4), 255], np.uint8)
    planes = np.stack(np.meshgrid(levels, levels, levels)).reshape(3, len(levels), -1)
    image: Any = Image.fromarray(planes.transpose(1, 2, 0).copy())
    wanted = np.array(F.adjust_hue(image, amount), np.int16).transpose(2, 0, 1)
    differ = np.abs(recoloured(planes, [(3, amount)], grey=False) - wanted)
    assert (differ > 0).mean() < 0.01
    assert differ.max() <= 6  # a step of the hue, of the most vivid colour
    draws = np.random.default_rng(0).integers(0, 256, (3, 300, 300), np.uint8)
    image = Image.fromarray(draws.transpose(1, 2, 0).copy())
    differ = (
        recoloured(draws, [(3, amount)], grey=False) - F.pil_to_tensor(F.adjust_hue(image, amount)).numpy()
    )
    assert (differ != 0).mean() < 0.003


def test_solarising_is_torchvisions():
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 2, 256)
    assert torch.equal(solarised(levels), F.solarize(levels, 128))
    assert torch.equal(solarised(levels / 255), F.solarize(levels / 255, 128 / 255))


@pytest.mark.parametrize("kernel", [3, 9, 15])
@pytest.mark.parametrize("size", [8, 32, 97])
def test_blur_equals_torchvisions_within_one_level(size: int, kernel: int):
    crops = torch.randint(
        0, 256, (6, 3, size, size + 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    sigmas = [0.1, 0.2, 0.3, 0.9, 1.5, 2.0]
    floats = crops / 255
    together = blur(floats, sigmas, kernel)
    for index, sigma in enumerate(sigmas):
        wanted = F.gaussian_blur(crops[index], [kernel, kernel], [sigma, sigma])
        own = blur_one(crops[index], sigma, kernel)
        assert (own.int() - wanted.int()).abs().max() <= 1
        assert (own != wanted).float().mean() < 0.01
        wanted = F.gaussian_blur(floats[index], [kernel, kernel], [sigma, sigma])
        assert (blur_one(floats[index], sigma, kernel) - wanted).abs().max() < 1e-4
        assert (together[index] - wanted).abs().max() < 1e-5
        assert torch.equal(blur(floats[index][None], [sigma], kernel)[0], together[index])  # alone: same bits


@pytest.mark.parametrize("shape", [(375, 500), (100, 100), (60, 480), (500, 31)])
@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_are_drawn_as_torchvision_draws_them(shape: tuple[int, int], scale: tuple[float, float]):
    draws, (height, width) = random.Random(0), shape
    kind = CropKind(64, scale, 0.0, 0.0)
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    ours = np.array([draw_plan(SMALL, kind, height, width, draws).box for _ in range(2000)])
    theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(2000)])
    for function in (
        lambda box: box[2] * box[3],  # area
        lambda box: box[3] / box[2],  # aspect
        lambda box: box[0],
        lambda box: box[1],
    ):
        assert kstest([function(box) for box in ours], [function(box) for box in theirs]).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width


@pytest.mark.parametrize(
    ("name", "blurred"), [("as_intended", (1.0, 0.1, 0.5)), ("as_released", (0.0, 0.9, 0.5))]
)
def test_edits_happen_as_often_as_the_recipe_says(name: str, blurred: tuple[float, float, float]):
    crop = MultiCrop(AugmentConfig(blur=name))
    drawn = [plans_of(crop, 300, 300, seed) for seed in range(1500)]
    first, second = [plans[0] for plans in drawn], [plans[1] for plans in drawn]
    local = [plan for plans in drawn for plan in plans[2:]]
    assert len(local) == 8 * 1500
    for plans, blur_p, solarise_p in zip((first, second, local), blurred, (0.0, 0.2, 0.0), strict=True):
        for wanted, share in (
            (0.5, np.mean([plan.flip for plan in plans])),
            (0.8, np.mean([bool(plan.colours) for plan in plans])),
            (0.2, np.mean([plan.grey for plan in plans])),
            (blur_p, np.mean([plan.sigma is not None for plan in plans])),
            (solarise_p, np.mean([plan.solarise for plan in plans])),
        ):
            assert abs(share - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / len(plans))
    sigmas = [plan.sigma for plan in local if plan.sigma is not None]
    assert kstest(sigmas, "uniform", args=(0.1, 1.9)).pvalue > 1e-3


def test_colour_changes_are_uniform_and_in_random_order():
    crop = MultiCrop(AugmentConfig(jitter_p=1.0))
    changes = [plan.colours for seed in range(400) for plan in plans_of(crop, 100, 100, seed)]
    ranges = {0: (0.6, 0.8), 1: (0.6, 0.8), 2: (0.8, 0.4), 3: (-0.1, 0.2)}  # lowest, and width
    for index, (lowest, width) in ranges.items():
        amounts = [amount for colours in changes for each, amount in colours if each == index]
        assert kstest(amounts, "uniform", args=(lowest, width)).pvalue > 1e-3
    orders = Counter(tuple(index for index, _ in colours) for colours in changes)
    assert len(orders) == 24
    assert chisquare(list(orders.values())).pvalue > 1e-3
    quiet = MultiCrop(AugmentConfig(jitter_p=1.0, jitter=[0.4, 0.0, 0.0, 0.1]))
    assert {index for plan in plans_of(quiet, 9, 9, 0) for index, _ in plan.colours} == {0, 3}


def test_a_seed_gives_the_same_bytes_and_global_random_states_stay():
    image, crop = picture(0, 0), MultiCrop(SMALL)
    states = global_states()
    first, again, other = crop(image, 5), crop(image, 5), crop(image, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert global_states() == states


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 2), (31, 400)])
def test_odd_pictures_give_crops_of_the_right_form(size: tuple[int, int]):
    for local_crops in (0, 3):
        crops = MultiCrop(AugmentConfig(global_size=28, local_size=14, local_crops=local_crops))(
            Image.new("RGB", size, (10, 200, 90)), seed=1
        )
        assert [tuple(each.shape) for each in crops] == [(2, 3, 28, 28), (local_crops, 3, 14, 14)]
        assert all(each.dtype == torch.uint8 and each.is_contiguous() for each in crops)


def test_scaled_decoding_enlarges_no_crop():
    for config in (AugmentConfig(), SMALL):
        side = MultiCrop(config).short_side
        assert side is not None
        for plan in plans_of(MultiCrop(config), side, 2 * side, seed=0)[:2]:
            assert min(plan.box[2:]) >= config.global_size
        smallest = min(
            min(plan.box[2:])
            for seed in range(300)
            for plan in plans_of(MultiCrop(config), side, side, seed)[2:]
        )
        assert config.local_size <= smallest < 1.1 * config.local_size
    assert MultiCrop(AugmentConfig(scaled_decode=False)).short_side is None


def test_normalising_is_torchvisions():
    config, crops = AugmentConfig(), MultiCrop(SMALL)(picture(0, 1), 0)[0]
    wanted = F.normalize(F.to_dtype(crops, torch.float32, scale=True), config.mean, config.std)
    assert torch.allclose(normalise(crops, config.mean, config.std), wanted, atol=1e-6)
    half = normalise(crops, config.mean, config.std, torch.bfloat16)
    assert torch.equal(half, normalise(crops, config.mean, config.std).bfloat16())


@pytest.mark.parametrize(
    "setting",
    [
        {"blur": "as_intendet"},
        {"flip_p": 1.5},
        {"global_scale": [0.0, 1.0]},
        {"local_scale": [0.4]},
        {"jitter": [0.4, 0.4, 0.2]},
        {"blur_kernel": 8},
        {"local_crops": -1},
    ],
)
def test_impossible_settings_are_refused_in_one_line(setting: dict[str, Any]):
    with pytest.raises(UserError) as error:
        AugmentConfig(**setting)
    assert next(iter(setting)) in str(error.value)
    assert "\n" not in str(error.value)
