"""Edited views: a function of the seed, each edit by itself, and mixed pictures that the loss is told of."""

from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.augment import AugmentConfig
from dinov2.data.edits import EDITS, EditConfig, EditedViews, compressed
from dinov2.data.loader import batches
from dinov2.data.order import Order
from dinov2.data.sources import open_source
from dinov2.exits import UserError
from tests.pictures import class_folder, picture

NONE = {"mixup_p": 0, "cutmix_p": 0, "rotate_p": 0, "canvas_p": 0, "shapes_p": 0, "text_p": 0, "jpeg_p": 0}


def views(**edits: float) -> EditedViews:
    size = {"global_size": 48, "local_size": 16, "local_crops": 0}
    return EditedViews(AugmentConfig(**size), EditConfig(**NONE | edits))  # pyright: ignore[reportArgumentType]


def test_same_seed_same_bytes_and_no_global_random_state():
    crop = EditedViews(AugmentConfig(global_size=48, local_size=16, local_crops=0), EditConfig())
    state = torch.get_rng_state()
    first, again, other = (crop(picture(0, 0), seed, picture(1, 1))[0] for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (2, 3, 48, 48) and first.dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[0], first[1])


def test_each_edit_is_made_as_often_as_asked_and_changes_the_picture():
    image = picture(0, 0)
    plain = views()
    for name in [*EDITS, "jpeg_p"]:
        always, half = views(**{name: 1.0}), views(**{name: 0.5})
        changed = [not torch.equal(half(image, seed)[0][0], plain(image, seed)[0][0]) for seed in range(200)]
        assert 65 < sum(changed) < 135, name
        for seed in range(20):
            assert not torch.equal(always(image, seed)[0], plain(image, seed)[0]), (name, seed)


def test_edits_change_as_much_as_they_say():
    image = picture(0, 0, (96, 96))
    before = np.asarray(image, dtype=np.float64)

    def touched(name: str, seed: int) -> float:
        return float((np.asarray(EDITS[name](image.copy(), Random(seed))) != before).any(axis=2).mean())

    for seed in range(30):
        assert 0 < touched("text_p", seed) < 0.4
        assert 0.005 < touched("shapes_p", seed) < 0.6
        assert touched("canvas_p", seed) > 0.15
    rough, fine = (np.abs(np.asarray(compressed(image, quality)) - before).mean() for quality in (10, 90))
    assert rough > 2 * fine > 0


@pytest.mark.parametrize("edits", [{"mixup_p": 1.0}, {"cutmix_p": 1.0}])
def test_mixing_shows_both_pictures_in_the_second_view_alone(edits: dict[str, float]):
    size = {"global_size": 48, "local_size": 16, "local_crops": 0, "jitter_p": 0, "solarise_p": 0}
    crop = EditedViews(AugmentConfig(**size), EditConfig(**NONE | edits))  # pyright: ignore[reportArgumentType]
    black, white = Image.new("RGB", (60, 60)), Image.new("RGB", (60, 60), (255, 255, 255))
    shares = []
    for seed in range(30):
        first, second = crop(black, seed, white)[0].float().mean(dim=(1, 2, 3)) / 255
        assert first == 0
        shares.append(float(second))
    assert min(shares) > 0.28 and max(shares) < 0.72 and max(shares) - min(shares) > 0.2


def test_a_partner_is_another_picture_of_the_same_batch():
    crop = views(mixup_p=0.1, cutmix_p=0.1)
    partners = {position: crop.partner(3, position, 16) for position in range(16 * 200)}
    mixed = {position: partner for position, partner in partners.items() if partner is not None}
    assert 0.15 < len(mixed) / len(partners) < 0.25
    assert all(partner != position and partner // 16 == position // 16 for position, partner in mixed.items())
    assert len(Counter((partner - position) % 16 for position, partner in mixed.items())) == 15
    assert crop.partner(3, 0, 1) is None


def test_mixed_batches_are_the_same_on_any_number_of_ranks(tmp_path: Path):
    class_folder(tmp_path / "pool", classes=2, each=6, size=(48, 40))
    source = open_source(str(tmp_path / "pool"), cache=tmp_path / "cache")
    crop = views(mixup_p=0.3, cutmix_p=0.3)

    def step(rank: int, world: int) -> torch.Tensor:
        stream = batches(source, Order(12, 0), crop, seed=1, global_batch=6, rank=rank, world=world)
        return next(islice(stream, 2, None)).global_crops.unflatten(0, (2, -1))

    assert torch.equal(torch.cat([step(0, 2), step(1, 2)], dim=1), step(0, 1))
    unmixed = next(islice(batches(source, Order(12, 0), views(), seed=1, global_batch=6), 2, None))
    differs = (step(0, 1) != unmixed.global_crops.unflatten(0, (2, -1))).flatten(2).any(dim=2)
    partners = [crop.partner(1, position, 6) is not None for position in range(12, 18)]
    assert differs.tolist() == [[False] * 6, partners]


def test_impossible_edits_are_refused():
    for wrong in ({"text_p": 1.5}, {"mixup_p": 0.6, "cutmix_p": 0.6}, {"jpeg_quality": [0, 50]}):
        with pytest.raises(UserError, match="edits:"):
            EditConfig(**wrong)  # pyright: ignore[reportArgumentType]
