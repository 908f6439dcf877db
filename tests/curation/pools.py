"""A small pool with planted copies, and how to run curation on it."""

import subprocess
import sys
from pathlib import Path

from PIL import Image
from pyarrow import parquet

from curation.__main__ import main
from tests.faults import ROOT
from tests.pictures import broken_pictures, class_folder, encoded, picture

PLANTED = ("exact", "same_pixels", "recompressed", "small", "large", "cropped", "darker")


def make_pool(root: Path, *, each: int = 6, size: tuple[int, int] = (128, 112)) -> Path:
    """`pool/` with 4 x `each` originals, copies of some in `pool/copies/NAME.EXT`, and broken files.

    `seeds/` and `holdout/` have other pictures of the same classes, and `holdout/leak.jpg` copies
    one in the pool.
    """
    class_folder(root / "pool", classes=4, each=each, size=size, formats=("png",))
    class_folder(root / "seeds", classes=2, each=2, size=size, first=50, formats=("png",))
    class_folder(root / "holdout", classes=2, each=2, size=size, first=60, formats=("png",))
    broken_pictures(root / "pool" / "broken")
    for name, data in planted_copies(root / "pool" / "class_1" / "000.png").items():
        path = root / "pool" / "copies" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    leak = Image.open(root / "pool" / "class_2" / "001.png")
    (root / "holdout" / "leak.jpg").write_bytes(encoded(leak, "jpg", quality=50))
    return root


def planted_copies(path: Path) -> dict[str, bytes]:
    """Copies of a picture, by file name; the first part of the name is in PLANTED."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    small, large = ((round(width * scale), round(height * scale)) for scale in (0.6, 1.4))
    return {
        "exact.png": path.read_bytes(),
        "same_pixels.bmp": encoded(image, "bmp"),
        "recompressed.jpg": encoded(image, "jpg", quality=40),
        "small.jpg": encoded(image.resize(small, Image.Resampling.LANCZOS), "jpg"),
        "large.webp": encoded(image.resize(large, Image.Resampling.BICUBIC), "webp"),
        "cropped.jpg": encoded(image.crop((width // 5, height // 6, width, height * 5 // 6)), "jpg"),
        "darker.jpg": encoded(image.point([value * 3 // 5 + 10 for value in range(256)] * 3), "jpg"),
    }


def curate(*words: str) -> Path:
    """Run curation in this process; returns the output folder."""
    main([*words, "workers=1"])
    (output,) = [Path(word.partition("=")[2]) for word in words if word.startswith("output=")]
    return output


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "curation", *words]


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run curation as a person does."""
    return subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, timeout=120)


def decisions(output: Path) -> dict[str, dict]:
    """Rows of decisions by uri."""
    return {row["uri"]: row for row in parquet.read_table(output / "decisions.parquet").to_pylist()}


def another(kind: int, number: int) -> Image.Image:
    return picture(kind, number, (128, 112))
