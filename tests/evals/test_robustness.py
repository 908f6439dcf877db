"""Corruptions: what each does, measured; and the commands that measure backbones by them and by size."""

import colorsys
import io
import itertools

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import convolve

from evals.corrupt import KINDS, _plasma, corrupt
from tests.evals.small import evaluated
from tests.pictures import picture

SMALL = ["size=32", "batch=16"]
GREY = np.full((224, 224, 3), 128, dtype=np.uint8)


def shown(number: int = 0, side: int = 112) -> np.ndarray:
    return np.asarray(picture(number, number, (side, side)))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_a_function_of_picture_and_seed_and_grows_with_strength(kind):
    pictures = [shown(number) for number in range(3)]
    distances = []
    for strength in range(1, 6):
        made = [corrupt(one, kind, strength) for one in pictures]
        assert all(one.dtype == np.uint8 and one.shape == pictures[0].shape for one in made)
        assert np.array_equal(made[0], corrupt(pictures[0].copy(), kind, strength))
        apart = [np.abs(a.astype(float) - b).mean() for a, b in zip(made, pictures, strict=True)]
        distances.append(np.mean(apart))
    assert distances[0] > 0.5
    assert distances == sorted(distances)
    drawn = kind not in (
        "defocus_blur",
        "zoom_blur",
        "brightness",
        "contrast",
        "pixelate",
        "jpeg_compression",
    )
    assert np.array_equal(corrupt(pictures[0], kind, 3, seed=1), corrupt(pictures[0], kind, 3)) != drawn
    for size in ((9, 40), (1, 1), (33, 20)):
        assert corrupt(np.asarray(picture(0, 0, size)), kind, 5).shape == (size[1], size[0], 3)


def test_the_noises_have_their_deviations():
    gaussian = corrupt(GREY, "gaussian_noise", 1) / 255.0
    assert gaussian.std() == pytest.approx(0.08, rel=0.02) and gaussian.mean() == pytest.approx(
        0.5, abs=0.005
    )
    shot = corrupt(GREY, "shot_noise", 1) / 255.0
    assert shot.std() == pytest.approx((128 / 255 / 60) ** 0.5, rel=0.03)
    changed = corrupt(GREY, "impulse_noise", 5) != 128
    assert changed.mean() == pytest.approx(0.27, abs=0.01)
    assert not np.array_equal(changed[..., 0], changed[..., 1])


def test_defocus_is_a_disc_and_keeps_what_is_even():
    found = corrupt(shown(side=224), "defocus_blur", 2)
    y, x = np.mgrid[-4:5, -4:5]
    disc = np.clip(3.5 + 0.5 - np.hypot(x, y), 0, 1)
    reference = convolve(shown(side=224) / 255.0, (disc / disc.sum())[..., None], mode="reflect")
    assert np.abs(found / 255.0 - reference).max() < 0.003
    for kind in ("defocus_blur", "motion_blur", "zoom_blur", "glass_blur", "elastic_transform", "pixelate"):
        assert np.abs(corrupt(GREY, kind, 5).astype(int) - 128).max() <= 1


def test_digital_kinds_are_those_of_their_definitions():
    image = shown()
    quality = io.BytesIO()
    Image.fromarray(image).save(quality, "JPEG", quality=7)
    assert np.array_equal(corrupt(image, "jpeg_compression", 5), np.asarray(Image.open(quality)))
    pale = corrupt(image, "contrast", 3).astype(float)
    assert pale.std((0, 1)) == pytest.approx(0.2 * image.std((0, 1)), rel=0.03)
    assert pale.mean((0, 1)) == pytest.approx(image.mean((0, 1)), abs=0.6)
    bright = corrupt(image, "brightness", 2)
    for row, column in ((5, 5), (40, 70), (100, 3)):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[row, column] / 255.0)
        reference = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + 0.2))
        assert bright[row, column] / 255.0 == pytest.approx(reference, abs=0.003)
    coarse = corrupt(image, "pixelate", 5)
    assert len(np.unique(coarse.reshape(-1, 3), axis=0)) <= 28**2


def test_the_surface_of_fog_is_rough_at_every_scale():
    surface = _plasma((256, 256), np.random.default_rng(0), 0.5)
    assert surface.min() == 0 and surface.max() == 1
    steps = [np.abs(surface - np.roll(surface, lag, 1)).mean() for lag in (1, 4, 16, 64)]
    assert steps == sorted(steps) and steps[3] > 4 * steps[0] > 0


def test_corruptions_are_measured_with_a_head_of_clean_pictures(place, tmp_path):
    """As if the corrupted pictures lay in a folder. They are not cut, so that cropping leaves them alone."""
    whole, cells = ["size=32", "resize=32"], [("gaussian_noise", 5), ("contrast", 3), ("motion_blur", 5)]
    for kind, number in itertools.product(range(8), range(30)):
        image = picture(kind, number, (32, 32))
        made = {"train": image} if number < 12 else {"test": image}
        if "test" in made:
            made |= {name: Image.fromarray(corrupt(np.asarray(image), name, s)) for name, s in cells}
        for part, one in made.items():
            (tmp_path / part / str(kind)).mkdir(parents=True, exist_ok=True)
            one.save(tmp_path / part / str(kind) / f"{number}.png")

    def top1(part):
        words = [f"train={tmp_path / 'train'}", f"test={tmp_path / part}"]
        return evaluated(place, tmp_path / "out", "knn", *whole, *words)["metrics"]["top1_k20"]

    words = [f"train={tmp_path / 'train'}", f"test={tmp_path / 'test'}", "strengths=[3,5]"]
    words += ["kinds=[gaussian_noise,contrast,motion_blur]"]
    found = evaluated(place, tmp_path / "out", "corruptions", *whole, *words, "workers=2")
    table, by_hand = found["details"]["top1"], {name: top1(name) for name, _ in cells}
    assert len({*by_hand.values()}) == 3
    assert {name: table[name][str(s)] for name, s in cells} == pytest.approx(by_hand)
    assert top1("test") == pytest.approx(found["metrics"]["clean"])
    assert found["metrics"]["mean"] == pytest.approx(np.mean([list(row.values()) for row in table.values()]))
    assert found["metrics"]["contrast"] == pytest.approx(np.mean(list(table["contrast"].values())))
    assert set(found["intervals"]) == {"mean", "clean", *table}


def test_corruptions_of_some_pictures_by_another_head_and_without_a_backbone(place, tmp_path):
    words = ["corruptions", *SMALL, "kinds=[contrast]", "strengths=[5]"]
    some = evaluated(place, tmp_path, *words, "head=logreg", "pictures=7")
    assert some["data"]["test"]["pictures"] == 7 and some["metrics"]["clean"] > 50
    assert evaluated(place, tmp_path, *words, backbone="pixels")["metrics"]["clean"] > 50


def test_sizes_are_measured_in_whole_patches(place, tmp_path):
    found = evaluated(place, tmp_path, "resolution", *SMALL, "sizes=[15,32,50]")
    assert found["details"]["sizes"] == [16, 32, 48]
    at_32 = evaluated(place, tmp_path, "knn", *SMALL)["metrics"]["top1_k20"]
    assert found["metrics"]["top1_32"] == pytest.approx(at_32)
    at_48 = evaluated(place, tmp_path, "knn", "size=48", "batch=16")["metrics"]["top1_k20"]
    assert found["metrics"]["top1_48"] == pytest.approx(at_48)
    once = evaluated(place, tmp_path, "resolution", *SMALL, "sizes=[32,48]", "learnt_at=size")
    assert once["metrics"]["top1_32"] == pytest.approx(at_32)
