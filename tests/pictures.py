"""Small deterministic pictures for tests: folders of classes, odd modes and formats, copies, broken files.

The same arguments give the same pixels. A class is a hue with the direction and pitch of a pattern; within it
every picture has its own ground, things, phase, place and light, so that no two are near duplicates.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

Size = tuple[int, int]  # width, height

FORMATS = ("jpg", "png", "webp")
SAVE_OPTIONS = {"jpg": {"quality": 92}, "webp": {"quality": 90}}
FORMAT_NAMES = {"jpg": "JPEG", "tif": "TIFF"}  # where Pillow's name is not the ending in capitals


def picture(kind: int, number: int, size: Size = (96, 80), seed: int = 0) -> Image.Image:
    """Picture `number` of class `kind`, RGB."""
    draw = np.random.default_rng([seed, kind, number])
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    ground = sum(
        np.cos(2 * np.pi * (draw.uniform(-2, 2) * x + draw.uniform(-2, 2) * y) + draw.uniform(0, 2 * np.pi))
        for _ in range(4)
    )
    angle = kind * 2.4 + draw.normal(0, 0.08)
    pitch = 5 + 3 * (kind % 4)
    wave = np.sin(2 * np.pi * pitch * (np.cos(angle) * x + np.sin(angle) * y) + draw.uniform(0, 2 * np.pi))
    left, top, spread = draw.uniform(0.2, 0.8), draw.uniform(0.2, 0.8), draw.uniform(0.2, 0.4)
    body = np.exp(-(((x - left) ** 2 + (y - top) ** 2) / (2 * spread**2)))
    things = np.zeros_like(x)
    for _ in range(7):
        middle, radii = draw.uniform(0, 1, 2), draw.uniform(0.05, 0.16, 2)
        shape = np.abs((x - middle[0]) / radii[0]) ** 3 + np.abs((y - middle[1]) / radii[1]) ** 3
        things = np.where(shape < 1, draw.choice([-0.35, 0.35]), things)
    light = draw.uniform(0.75, 1.0) * (0.5 + 0.1 * ground + 0.3 * wave * body + things)
    hue = 2 * np.pi * ((kind * 0.382) % 1.0) + draw.normal(0, 0.1)
    tint = 0.25 * np.cos(hue + np.array([0.0, 2.1, 4.2])) * (0.4 + 0.6 * body[..., None])
    pixels = (light[..., None] + tint + draw.normal(0, 0.01, (height, width, 3))) * 255
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def class_folder(
    root: Path,
    *,
    classes: int = 4,
    each: int = 6,
    size: Size = (96, 80),
    seed: int = 0,
    first: int = 0,
    formats: tuple[str, ...] = FORMATS,
) -> list[Path]:
    """Write `root/class_K/NNN.EXT`, `each` pictures a class numbered from `first`; returns them, sorted.

    Sizes vary a little around `size`. Another `first` gives other pictures of the same classes: a test set.
    """
    paths = []
    for kind in range(classes):
        for number in range(first, first + each):
            scale = 1 + 0.1 * ((number * 7 + kind) % 5)
            wide, high = round(size[0] * scale), round(size[1] * scale)
            ending = formats[(number + kind) % len(formats)]
            path = root / f"class_{kind}" / f"{number:03}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(kind, number, (wide, high), seed), ending))
            paths.append(path)
    return sorted(paths)


def encoded(image: Image.Image, ending: str = "png", **options: object) -> bytes:
    """The bytes of a picture file; `options` are Pillow's, over defaults of good quality."""
    file = io.BytesIO()
    name = FORMAT_NAMES.get(ending, ending.upper())
    image.save(file, name, **{**SAVE_OPTIONS.get(ending, {}), **options})
    return file.getvalue()


def copies(image: Image.Image) -> dict[str, Image.Image]:
    """Edited copies of an RGB picture by the name of the edit."""
    width, height = image.size
    written = image.copy()
    ImageDraw.Draw(written).text((width // 8, height // 3), "sample text", fill=(255, 255, 255))
    return {
        "recompressed": Image.open(io.BytesIO(encoded(image, "jpg", quality=60))).convert("RGB"),
        "resized": image.resize((width * 2 // 3, height * 2 // 3), Image.Resampling.LANCZOS),
        "cropped": image.crop((width // 12, height // 12, width - width // 12, height - height // 12)),
        "brighter": ImageEnhance.Brightness(image).enhance(1.2),
        "grey": image.convert("L").convert("RGB"),
        "flipped": ImageOps.mirror(image),
        "bordered": ImageOps.expand(image, border=max(2, width // 24), fill=(0, 0, 0)),
        "written_on": written,
    }


def odd_pictures(root: Path, size: Size = (48, 32)) -> dict[str, Path]:
    """Readable pictures of every mode and format that is often got wrong, by what is odd about them.

    All show `picture(0, 0, size)` or a grey or masked form of it.
    """
    rgb = picture(0, 0, size)
    grey = rgb.convert("L")
    mask = Image.linear_gradient("L").resize(size)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    frames = [rgb, picture(1, 0, size), picture(2, 0, size)]
    turned = Image.Exif()
    turned[0x0112] = 6  # stored on its side: to be shown after a quarter turn clockwise
    files = {
        "grey.png": encoded(grey),
        "grey_alpha.png": encoded(Image.merge("LA", (grey, mask))),
        "alpha.png": encoded(Image.merge("RGBA", (*rgb.split(), mask))),
        "palette.png": encoded(rgb.quantize(32)),
        "palette_transparent.gif": encoded(rgb.quantize(32), "gif", transparency=0),
        "two_tone.png": encoded(grey.convert("1")),
        "16bit.png": encoded(deep),
        "16bit.tif": encoded(deep, "tif"),
        "float.tif": encoded(Image.fromarray(np.asarray(grey, dtype=np.float32) / 255), "tif"),
        "int32.tif": encoded(Image.fromarray(np.asarray(grey, dtype=np.int32)), "tif"),
        "lab.tif": encoded(_as_lab(rgb), "tif"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "jpg"),
        "grey.jpg": encoded(grey, "jpg"),
        "progressive.jpg": encoded(rgb, "jpg", progressive=True),
        "turned.jpg": encoded(rgb.transpose(Image.Transpose.ROTATE_90), "jpg", exif=turned),
        "animated.gif": encoded(rgb, "gif", save_all=True, append_images=frames[1:], duration=50),
        "animated.webp": encoded(rgb, "webp", save_all=True, append_images=frames[1:], duration=50),
        "animated.png": encoded(rgb, "png", save_all=True, append_images=frames[1:], duration=50),
        "upper_case.JPG": encoded(rgb, "jpg"),
        "wrong_name.png": encoded(rgb, "jpg"),
        "bitmap.bmp": encoded(rgb, "bmp"),
        "übung spaced.png": encoded(rgb),
        "one_pixel.png": encoded(rgb.resize((1, 1))),
        "very_wide.png": encoded(rgb.resize((400, 2))),
    }
    return _written(root, files)


def broken_pictures(root: Path) -> dict[str, Path]:
    """Files that are called pictures and cannot be read as one, by what is wrong with them."""
    whole = encoded(picture(3, 0), "jpg")
    png = bytearray(encoded(picture(3, 1)))
    png[len(png) // 2] ^= 0xFF
    files = {
        "empty.jpg": b"",
        "text.jpg": b"This is not a picture.\n",
        "truncated.jpg": whole[: len(whole) // 2],
        "only_header.jpg": whole[:20],
        "truncated.png": encoded(picture(3, 1))[:-400],
        "flipped_bits.png": bytes(png),
        "noise.webp": b"RIFF" + bytes(range(256)) * 2,
        "bomb.png": _bomb(60_000),
    }
    return _written(root, files)


def _written(root: Path, files: dict[str, bytes]) -> dict[str, Path]:
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    return {name: root / name for name in files}


def _as_lab(rgb: Image.Image) -> Image.Image:
    from PIL import ImageCms

    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(rgb, srgb, lab, outputMode="LAB")
    assert converted is not None
    return converted


def _bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(side))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
