"""Pictures of other depths and channels: read with all their bits, and augmented as those of 8 bits are."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image

from dinov2.data.arrays import decode_array
from dinov2.data.augment import AugmentConfig, CropPlan, MultiCrop, cut, normalise
from dinov2.data.decode import Unreadable, decode
from dinov2.data.pixels import as_pixels
from dinov2.data.sources import open_source
from dinov2.exits import UserError
from tests.pictures import broken_pictures, encoded, picture

SIZE = (48, 40)  # width, height
DRAW = np.random.default_rng(0)
DEEP = DRAW.integers(0, 2**16, (40, 48, 13), dtype=np.uint16)


def npy(array: NDArray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array: NDArray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def planes(count: int) -> NDArray[np.float32]:
    return (np.moveaxis(DEEP[..., :count], 2, 0) / 65_535).astype(np.float32)


def test_sixteen_bits_of_any_number_of_channels_are_kept():
    grey = Image.fromarray(DEEP[..., 0])
    for data in (
        encoded(grey),
        encoded(grey, "tif"),
        encoded(grey, "tif", compression="tiff_lzw"),
        npy(DEEP[..., 0]),
    ):
        assert np.array_equal(decode_array(data, 1), planes(1))
    for count in (2, 4, 13):
        array = DEEP[..., :count]
        pages = np.ascontiguousarray(np.moveaxis(array, 2, 0))
        files = {
            "last": npy(array),
            "first": npy(pages),
            "interleaved": tiff(array, photometric="minisblack", planarconfig="contig"),
            "separate": tiff(pages, photometric="minisblack", planarconfig="separate"),
            "pages": tiff(pages, photometric="minisblack"),
            "deflated": tiff(array, photometric="minisblack", planarconfig="contig", compression="zlib"),
        }
        for name, data in files.items():
            assert np.array_equal(decode_array(data, count), planes(count)), (name, count)


def test_a_range_of_values_is_what_becomes_0_and_1():
    values = np.array([[-5.0, 0.0, 10.0, 15.0, 20.0, 30.0, np.nan, np.inf]], dtype=np.float32)
    wanted = [0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.0]
    for data in (npy(values), tiff(values), encoded(Image.fromarray(values), "tif")):
        assert decode_array(data, 1, [10, 20])[0, 0].tolist() == wanted
    twelve = npy(np.array([[0, 4095]], dtype=np.uint16))
    assert decode_array(twelve, 1, [0, 4095]).ravel().tolist() == [0.0, 1.0]
    assert decode_array(npy(np.array([[0.25, 0.5]])), 1).ravel().tolist() == [0.25, 0.5]  # floats: 0 to 1


def test_pictures_of_eight_bits_are_what_decode_makes_of_them():
    rgb = picture(0, 0, SIZE)
    grey = np.asarray(rgb.convert("L"), dtype=np.float32)
    for ending in ("png", "jpg", "webp", "tif"):
        data = encoded(rgb, ending)
        assert np.array_equal(decode_array(data, 3), as_pixels(decode(data)).numpy() / np.float32(255)), (
            ending
        )
    assert np.abs(decode_array(encoded(rgb), 1)[0] * 255 - grey).max() <= 0.51
    assert np.array_equal(decode_array(encoded(rgb.convert("L")), 3)[1], grey / np.float32(255))
    assert decode_array(encoded(rgb.convert("RGBA")), 4)[3].min() == 1.0
    assert decode_array(encoded(rgb.convert("RGBA")), 3).shape == (3, 40, 48)
    assert decode_array(encoded(rgb.quantize(16)), 3).shape == (3, 40, 48)


def test_what_cannot_be_read_so_says_why(tmp_path: Path):
    colour = bytearray(encoded(picture(0, 0, SIZE)))
    colour[24] = 16  # as its header would say of 16 bits
    for data, message in (
        (bytes(colour), "store it as TIFF or .npy"),
        (npy(DEEP[..., :5]), "5 channels, and 4 are wanted"),
        (npy(DEEP[0, 0]), "is no picture"),
        (npy(DEEP)[:-9], "."),
        (tiff(DEEP[..., 0])[:200], "."),
        (npy(np.array([{}], dtype=object)), "allow_pickle"),
    ):
        with pytest.raises(Unreadable, match=message) as caught:
            decode_array(data, 4)
        assert "\n" not in str(caught.value)
    for path in broken_pictures(tmp_path).values():
        with pytest.raises(Unreadable):
            decode_array(path.read_bytes(), 3)


def test_floats_are_augmented_as_eight_bits_are():
    """Within the roundings of 8 bits, which every change of colour adds again."""
    settings = {"global_size": 32, "local_size": 16, "local_crops": 3, "solarise_p": 0.0}
    shallow, deep = (
        MultiCrop(AugmentConfig(**settings)),
        MultiCrop(AugmentConfig(**settings, value_range=[0, 255])),
    )
    for number in range(12):
        data = encoded(picture(number % 3, number, (70, 60)))
        for coarse, fine in zip(
            shallow(shallow.open(data), number), deep(deep.open(data), number), strict=True
        ):
            assert fine.dtype == torch.float32 and coarse.dtype == torch.uint8
            assert float((coarse / 255 - fine).abs().mean()) < 3 / 255
            mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
            assert float((normalise(coarse, mean, std) - normalise(fine, mean, std)).abs().mean()) < 0.05


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_every_channel_goes_through_the_same_changes_of_place_and_light(channels: int):
    config = {"global_size": 32, "local_size": 16, "local_crops": 2, "jitter": [0.4, 0.0, 0.2, 0.1]}
    many = MultiCrop(AugmentConfig(**config, mean=[0.5] * channels, std=[0.2] * channels))
    one = MultiCrop(AugmentConfig(**config, mean=[0.5], std=[0.2]))
    for seed in range(8):
        crops = many(many.open(npy(DEEP[..., :channels])), seed)
        for channel in range(channels):
            alone = one(one.open(npy(DEEP[..., channel])), seed)
            for together, single in zip(crops, alone, strict=True):
                assert torch.allclose(together[:, channel], single[:, 0], atol=1e-6)
        assert len(torch.unique(crops[0])) > 1500  # more than 8 bits hold
        assert float(crops[0].min()) >= 0 and float(crops[0].max()) <= 1


def test_contrast_moves_all_channels_away_from_or_towards_their_common_mean():
    plan = CropPlan((0, 0, 32, 32), False, [(1, 0.7)], True, None, False)
    pixels = torch.from_numpy(planes(2)[:, :32, :32].copy())
    wanted = pixels.mean() + (pixels - pixels.mean()) * 0.7
    assert torch.allclose(cut(pixels, plan, 32), wanted, atol=1e-5)


def test_arrays_are_a_source_where_a_folder_has_no_pictures(tmp_path: Path):
    for name in ("a/0.npy", "a/1.npy", "b/0.npy"):
        (tmp_path / "arrays" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "arrays" / name).write_bytes(npy(DEEP))
    arrays = open_source(str(tmp_path / "arrays"), cache=tmp_path / "cache")
    assert arrays.labels() == ["a", "a", "b"]
    assert decode_array(arrays.read(0), 13).shape == (13, 40, 48)
    (tmp_path / "arrays" / "photo.png").write_bytes(encoded(picture(0, 0, SIZE)))
    assert len(open_source(str(tmp_path / "arrays"), cache=tmp_path / "cache")) == 1


def test_a_range_has_two_ends():
    with pytest.raises(UserError, match="the lower first"):
        AugmentConfig(value_range=[1.0, 0.0])
