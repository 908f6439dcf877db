"""The report of 100,000 pictures: how large its page is, and whether a browser opens it from the disk.

The pool is made of windows of real photographs: of each so many that the number is reached, at random places
and of 20 to 100% of the area, some mirrored. Many overlap, so that every gallery has more than it can show.
"""

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dinov2.data.copies import QUALITY, window
from dinov2.data.decode import decode
from dinov2.data.sources import open_source
from tests.dinov2.data.packing import packed
from tests.pictures import encoded

Rows = list[tuple[str, str]]
LARGEST = 20e6  # bytes that the page may have
WORDS = ("clusters.levels=[1000,100,10]", "calibrate.pictures=60", "retrieval.k=32", "budget.pictures=50000")


def make_windows(folder: Path, data: Path, count: int) -> None:
    """Write `count` windows of imagenette's photographs and those of clothes to `folder/NN.tar`."""
    draw = np.random.default_rng(0)
    sources = [open_source(f"{data}/imagenette112.tar/train"), open_source(f"{data}/messy_pool.tar/clothing")]
    rows = [(source, row) for source in sources for row in range(len(source))]
    each, names = -(-count // len(rows)), (f"{number:06d}.jpg" for number in range(count))
    folder.mkdir(parents=True)
    for shard in range(0, len(rows), 1000):
        files = {}
        for source, row in rows[shard : shard + 1000]:
            picture = decode(source.read(row), at_least=224)
            for name in islice(names, each):
                part = window(picture, draw, 0.2, 1)
                part = ImageOps.mirror(part) if draw.random() < 0.2 else part
                files[name] = encoded(part, "jpg", quality=QUALITY)
        packed(folder / f"{shard // 1000:02d}.tar", files)


def measured(folder: Path, data: Path, count: int, curate: Callable[..., dict[str, float]]) -> Rows:
    """Rows of the page; everything is left in `folder`."""
    make_windows(folder / "pool", data, count)
    sets = [f"seeds={data}/grocery.tar/train", f"holdout={data}/imagenette112.tar/val"]
    seconds = curate(folder, *sets, *WORDS)
    page, beside = folder / "out/report.html", list((folder / "out/report").iterdir())
    if page.stat().st_size > LARGEST:
        raise SystemExit(f"the page has {page.stat().st_size:,} bytes")
    pictures = len(re.findall(r"<img ", page.read_text()))
    largest = sorted(seconds.items(), key=lambda item: -item[1])[:4]
    stages = ", ".join(f"{stage} {value:.0f}" for stage, value in largest)
    return [
        (
            f"curation of {count:,} windows of photographs, two processes",
            f"**{sum(seconds.values()) / 60:.1f} minutes**",
        ),
        ("of these seconds", stages),
        ("the report's page", f"**{page.stat().st_size / 1e6:.1f} MB**, {pictures} pictures inside"),
        ("beside it", f"{len(beside)} pages, {sum(each.stat().st_size for each in beside) / 1e6:.0f} MB"),
        ("a browser opens and draws the page from the disk in", _opened(page)),
    ]


def _opened(page: Path) -> str:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return "not tried: no chromium here"
    with tempfile.TemporaryDirectory() as name:
        quiet = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={name}/profile"]
        start = time.perf_counter()
        subprocess.run(
            [browser, *quiet, "--window-size=1200,20000", f"--screenshot={name}/page.png", page.as_uri()],
            check=True,
            capture_output=True,
        )
        seconds = time.perf_counter() - start
        drawn = Image.open(f"{name}/page.png").convert("L").getextrema()
    if drawn[0] == drawn[1]:
        raise SystemExit("the browser drew nothing")
    return f"{seconds:.1f} s, with its own start"
