"""Reading by simplejpeg against reading by Pillow: the same pixels, files refused and crops."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data import pixels
from dinov2.data.augment import AugmentConfig, MultiCrop
from dinov2.data.decode import Unreadable, decode
from dinov2.data.pixels import as_pixels, read_pixels
from tests.pictures import broken_pictures, encoded, odd_pictures, picture


def test_files_are_read_as_pillow_reads_them(tmp_path: Path):
    for name, path in odd_pictures(tmp_path / "odd").items():
        data = path.read_bytes()
        assert torch.equal(read_pixels(data), as_pixels(decode(data))), name
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(picture(0, 1), "jpg", exif=exif)
        assert torch.equal(read_pixels(data), as_pixels(decode(data)))
    for name, path in broken_pictures(tmp_path / "broken").items():
        with pytest.raises(Unreadable):
            read_pixels(path.read_bytes())
            pytest.fail(name)


@pytest.mark.parametrize("size", [(640, 480), (333, 517), (97, 801)])
@pytest.mark.parametrize("least", [30, 60, 120, 240, None])
def test_jpegs_of_every_kind_are_read_as_pillow_reads_them(size: tuple[int, int], least: int | None):
    for kind in ({}, {"subsampling": 0}, {"subsampling": 1, "progressive": True}, {"quality": 30}):
        data = encoded(picture(0, 2, size), "jpg", **kind)
        assert torch.equal(read_pixels(data, least), as_pixels(decode(data, at_least=least)))


def test_damaged_jpegs_are_read_or_refused_as_by_pillow():
    """Bytes changed, left out and cut off at random places: the same pixels, or none from either."""
    draws, read = np.random.default_rng(0), 0
    files = [encoded(picture(0, 0, (96, 80)), "jpg", progressive=progressive) for progressive in (0, 1)]
    for number in range(400):
        data = bytearray(files[number % 2])
        place = int(draws.integers(len(data)))
        if number % 3 == 0:
            data[place] = int(draws.integers(256))
        else:
            del data[place : place + int(draws.integers(1, 40)) if number % 3 == 1 else len(data)]
        ours = _pixels_or_none(read_pixels, bytes(data))
        theirs = _pixels_or_none(lambda it: as_pixels(decode(it)), bytes(data))
        if ours is None or theirs is None:
            assert ours is theirs, number
        else:
            assert torch.equal(ours, theirs), number
            read += 1
    assert 100 < read < 300  # some of both


def _pixels_or_none(way: Callable[[bytes], torch.Tensor], data: bytes) -> torch.Tensor | None:
    try:
        return way(data)
    except Unreadable:
        return None


def test_without_simplejpeg_the_crops_are_the_same(monkeypatch: pytest.MonkeyPatch):
    crop = MultiCrop(AugmentConfig(global_size=64, local_size=32))
    data = encoded(picture(3, 0, (300, 200)), "jpg")
    assert pixels._simplejpeg() is not None  # else this compares nothing
    by_simplejpeg = crop(crop.open(data), 7)
    monkeypatch.setattr(pixels, "_simplejpeg", lambda: None)
    by_pillow = crop(crop.open(data), 7)
    assert all(torch.equal(a, b) for a, b in zip(by_simplejpeg, by_pillow, strict=True))
