"""Decoding: every mode and every kind of damage that Pillow knows becomes RGB or `Unreadable`, silently."""

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dinov2.data.decode import Unreadable, decode, picture_extensions
from dinov2.data.sources import open_source
from tests.pictures import broken_pictures, encoded, odd_pictures, picture

SIZE = (48, 32)
PHOTO = np.asarray(picture(0, 0, SIZE), dtype=np.float64)
GREY = np.asarray(picture(0, 0, SIZE).convert("L"))
LOOSE = {"two_tone.png", "palette_transparent.gif", "one_pixel.png", "very_wide.png"}  # lose what is compared


def test_odd_pictures_show_what_they_should(tmp_path: Path) -> None:
    mask = np.asarray(Image.linear_gradient("L").resize(SIZE), dtype=np.float64)[..., None] / 255
    for name, path in odd_pictures(tmp_path, SIZE).items():
        shown = decode(path.read_bytes())
        assert shown.mode == "RGB", name
        if name in LOOSE:
            continue
        grey = name.startswith(("grey", "16bit", "float", "int32"))
        wanted = np.repeat(GREY[..., None], 3, axis=2).astype(np.float64) if grey else PHOTO
        if "alpha" in name:
            wanted = wanted * mask + 255 * (1 - mask)
        lossless = name.endswith((".png", ".bmp", ".tif")) and name not in {"palette.png", "wrong_name.png"}
        error = np.abs(np.asarray(shown) - wanted).mean()
        assert error < (3 if name == "lab.tif" else 1 if lossless else 12), (name, error)


def test_sixteen_bits_equal_their_eight_bit_version_exactly() -> None:
    full = GREY.copy()
    full[0, 0] = 255  # a photograph that uses its range
    deep = Image.fromarray(full.astype(np.uint16) * 257)
    for ending in ("png", "tif"):
        assert (np.asarray(decode(encoded(deep, ending)))[..., 0] == full).all()
    assert (np.asarray(decode(encoded(Image.fromarray(full.astype(np.int32)), "tif")))[..., 1] == full).all()


def test_numbers_of_any_range_are_neither_black_nor_white() -> None:
    ramp = np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)
    spoilt = ramp * 1000 - 300
    spoilt[3, 4:7] = np.nan, np.inf, -np.inf
    twelve_bits = (ramp * 4095).astype(np.uint16)
    for values in (ramp, ramp * 255, spoilt, ramp * -1e30, twelve_bits, (ramp * 2e9 - 1e9).astype(np.int32)):
        shown = np.asarray(decode(encoded(Image.fromarray(values), "tif")))
        assert shown.min() <= 1, values.dtype
        assert shown.max() >= 254, values.dtype
    assert np.asarray(decode(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "tif"))).max() == 0


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_all_orientations_are_turned_upright(ending: str) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(picture(0, 0, SIZE), ending, exif=exif)
        path_of_pillow = ImageOps.exif_transpose(_opened(data)).convert("RGB")
        shown = decode(data)
        assert np.array_equal(np.asarray(shown), np.asarray(path_of_pillow)), orientation
        assert 0x0112 not in shown.getexif()  # nobody turns it a second time


@settings(deadline=None, max_examples=25)
@example(wide=115, high=115, least=29)
@given(wide=st.integers(1, 600), high=st.integers(1, 600), least=st.integers(1, 200))
def test_scaled_decoding_keeps_the_short_side(wide: int, high: int, least: int) -> None:
    data = encoded(Image.new("RGB", (wide, high), (90, 120, 60)), "jpg")
    small = decode(data, at_least=least)
    assert min(small.size) >= min(least, wide, high)
    sizes = {n: (-(-wide // n), -(-high // n)) for n in (8, 4, 2, 1)}
    factor = next((n for n, size in sizes.items() if size == small.size), None)
    assert factor is not None
    assert factor == 8 or min(wide, high) < 2 * factor * least  # half of it would be too small


def test_broken_and_oversized_pictures_are_unreadable(tmp_path: Path) -> None:
    for name, path in broken_pictures(tmp_path).items():
        with pytest.raises(Unreadable) as caught:
            decode(path.read_bytes())
        assert "\n" not in str(caught.value), name
    with pytest.raises(Unreadable, match=r"48 x 32 pixels are more than 1,000"):
        decode(encoded(picture(0, 0, SIZE)), max_pixels=1000)


def test_any_damage_gives_a_picture_or_unreadable_and_nothing_on_standard_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    whole = [path.read_bytes() for path in odd_pictures(tmp_path, SIZE).values()]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for _ in range(600):
            data = bytearray(draw.choice(whole))
            if draw.random() < 0.3:
                data = data[: draw.randrange(len(data))]
            else:
                for _ in range(draw.choice([1, 3, 30])):
                    data[draw.randrange(min(len(data), draw.choice([64, 512, 1 << 20])))] = draw.randrange(
                        256
                    )
            try:
                assert decode(bytes(data), max_pixels=1 << 20).mode == "RGB"
            except Unreadable:
                continue
    assert capfd.readouterr().err == ""


def test_programs_and_stubs_are_no_pictures() -> None:
    assert {"jpg", "jpeg", "png", "webp", "tif", "bmp", "gif"} <= picture_extensions()
    assert not {"eps", "ps", "pdf", "mpg", "h5", "txt", "json", "cls"} & picture_extensions()
    with pytest.raises(Unreadable):  # would start Ghostscript
        decode(encoded(picture(0, 0, SIZE), "eps"))


@pytest.mark.data
def test_the_messy_pool_is_read_but_for_its_corrupt_files(real_pictures: Path, tmp_path: Path) -> None:
    source = open_source(f"{real_pictures / 'messy_pool.tar'}/odd_files", cache=tmp_path)
    source_modes = open_source(f"{real_pictures / 'messy_pool.tar'}/odd_modes", cache=tmp_path)
    unreadable = []
    for pool in (source, source_modes):
        for row, uri in enumerate(pool.table["uri"].to_pylist()):
            try:
                decode(pool.read(row), at_least=64)
            except Unreadable:
                unreadable.append(uri)
    assert len(unreadable) == 2
    assert all("corrupt" in uri for uri in unreadable)


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image
