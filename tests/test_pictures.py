"""The pictures that tests stand on are the same every time, tell their classes apart, and break as said."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from tests.pictures import broken_pictures, class_folder, copies, odd_pictures, picture


def test_the_same_words_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = class_folder(tmp_path / "a"), class_folder(tmp_path / "b")
    assert len(first) == 24 and len({path.read_bytes() for path in first}) == 24
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert class_folder(tmp_path / "c", seed=1)[0].read_bytes() != first[0].read_bytes()


def test_classes_can_be_told_apart_and_pictures_are_no_near_duplicates() -> None:
    classes, each = 6, 8
    spectra = np.stack([_spectrum(picture(k, n)) for k in range(classes) for n in range(each)])
    similar = spectra @ spectra.T
    labels = np.arange(len(spectra)) // each
    np.fill_diagonal(similar, -1)
    assert (labels[similar.argmax(1)] == labels).mean() > 0.9
    small = np.stack([_small(picture(k, n)) for k in range(classes) for n in range(each)])
    alike = small @ small.T
    np.fill_diagonal(alike, -1)
    edited = min(
        float(_small(picture(0, 0)) @ _small(copies(picture(0, 0))[edit])) for edit in ("resized", "grey")
    )
    assert alike.max() < 0.95 < edited


def test_odd_ones_open_and_broken_ones_do_not(tmp_path: Path) -> None:
    for path in odd_pictures(tmp_path / "odd").values():
        with Image.open(path) as image:
            image.load()
    for path in broken_pictures(tmp_path / "broken").values():
        with (
            pytest.raises((UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError)),
            Image.open(path) as image,
        ):
            image.load()


def _small(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.float64).ravel()
    pixels -= pixels.mean()
    return pixels / np.linalg.norm(pixels)


def _spectrum(image: Image.Image) -> np.ndarray:
    """Mean colour beside the magnitudes of the lowest frequencies: blind to place and phase."""
    pixels = np.asarray(image.resize((64, 64)), dtype=np.float64) / 255
    colour = pixels.mean((0, 1)) - pixels.mean()
    waves = np.abs(np.fft.fft2(pixels.mean(-1) - pixels.mean()))[:20, :]
    feature = np.concatenate([colour / np.linalg.norm(colour), (waves / np.linalg.norm(waves)).ravel()])
    return feature / np.linalg.norm(feature)
