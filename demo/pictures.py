"""The demo's own pictures: a messy pool with known truth, seeds, and a test set from regions apart.

    FOLDER/pool/LABEL/…    originals, planted copies and broken files, pictures that no seed is like
    FOLDER/seeds/LABEL/…   some of the originals: what curation is to find more of
    FOLDER/test/LABEL/…    the test windows, which are also curation's holdout
    FOLDER/truth.parquet   a line a file: see TRUTH

A label is the photograph that a window was cut from.
"""

import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from demo import planted
from demo.config import Plan
from demo.geometry import Window
from demo.photographs import UNWANTED, drawing, photographs, wanted_photographs
from demo.windows import cut, place
from dinov2.files import read_json, whole_folder, write_json, write_table

TRUTH = pa.schema(
    {
        "path": pa.string(),  # below the folder
        "kind": pa.string(),  # original, drawing, leaked, corrupt, or one of planted.KINDS
        "of": pa.string(),  # the path that it is a copy of
        "label": pa.string(),
        "wanted": pa.bool_(),  # whether there are seeds of this label
        "edit": pa.string(),  # what was done to it, in words
        "x": pa.float64(),  # the window in its photograph: centre and side in pixels, turn in degrees
        "y": pa.float64(),
        "side": pa.float64(),
        "angle": pa.float64(),
    }
)


@dataclass
class _File:
    data: bytes
    ending: str
    folder: str
    label: str
    kind: str = "original"
    of: "_File | None" = None
    edit: str | None = None
    window: Window | None = None
    wanted: bool = True
    path: str = field(default="", init=False)


def make_pictures(folder: Path, seed: int, plan: Plan) -> None:
    """Fill `folder`, whole or not at all; what is there already from the same seed and plan stays."""
    made_by = {"seed": seed, "plan": asdict(plan)}
    if (folder / "made_by.json").exists() and read_json(folder / "made_by.json") == made_by:
        return
    rng = random.Random(seed)
    files = _named(list(_files(plan, rng)), rng)
    with whole_folder(folder) as work:
        for file in files:
            path = work / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.data)
        write_table(work / "truth.parquet", pa.Table.from_pylist([_truth(file) for file in files], TRUTH))
        write_json(work / "made_by.json", made_by)


def _files(plan: Plan, rng: random.Random) -> Iterable[_File]:
    originals = [
        file for label, photo in wanted_photographs().items() for file in _windows(label, photo, plan, rng)
    ]
    unwanted = [
        file
        for label, photo in photographs(UNWANTED).items()
        for file in _windows(label, photo, plan, rng)
        if file.folder == "pool"
    ]
    for file in unwanted:
        file.wanted = False
    pool = [file for file in originals + unwanted if file.folder == "pool"]
    test = [file for file in originals if file.folder == "test"]
    yield from originals
    yield from unwanted
    for kind, edit in planted.KINDS.items():
        for of in rng.sample(pool, min(plan.copies, len(pool))):
            yield _copy(of, kind, edit(of.data, of.ending, rng))
    for of in rng.sample(test, min(plan.copies, len(test))):
        edit = planted.KINDS[rng.choice(("exact", "re-encoded", "resized"))]
        yield _copy(of, "leaked", edit(of.data, of.ending, rng))
    for of in rng.choices(pool, k=plan.corrupt):
        yield _copy(of, "corrupt", planted.corrupt(of.data, of.ending, rng))
    for _ in range(plan.drawings):
        data = planted.encoded(drawing(rng, rng.randint(64, 128)), "jpg")
        yield _File(data, "jpg", "pool", "drawings", kind="drawing", wanted=False)


def _windows(label: str, photograph: Image.Image, plan: Plan, rng: random.Random) -> Iterable[_File]:
    placed = place(photograph, rng, most_training=plan.most_training, most_test=plan.most_test)
    seeds = min(max(plan.fewest_seeds, round(plan.seeds * len(placed.training))), len(placed.training) // 2)
    for index, window in enumerate(placed.training):
        yield _photographed(label, photograph, window, "seeds" if index < seeds else "pool", rng)
    for window in placed.test:
        yield _photographed(label, photograph, window, "test", rng)


def _photographed(
    label: str, photograph: Image.Image, window: Window, folder: str, rng: random.Random
) -> _File:
    """The window as a picture file of its own: another light, some size, some format."""
    size = round(min(max(window.side * rng.uniform(1.2, 2.0), 72), 160))
    picture = _lit(cut(photograph, window, size), rng)
    (ending,) = rng.choices(("jpg", "png", "webp"), (17, 2, 1))
    data = planted.encoded(picture, ending, rng.randint(90, 95))
    return _File(data, ending, folder, label, window=window)


def _lit(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Under another light: gain, gamma, and a colour temperature that trades red for blue."""
    gain, gamma, warmth = rng.uniform(0.75, 1.25), rng.uniform(0.75, 1.35), rng.uniform(-0.15, 0.15)
    levels = (np.arange(256) / 255) ** gamma * gain * 255
    tables = [levels * (1 + warmth), levels, levels * (1 - warmth)]
    return picture.point([round(min(level, 255.0)) for table in tables for level in table.tolist()])


def _copy(of: _File, kind: str, edited: planted.Edited) -> _File:
    data, ending, words = edited
    return _File(data, ending, "pool", of.label, kind=kind, of=of, edit=words, wanted=of.wanted)


def _named(files: list[_File], rng: random.Random) -> list[_File]:
    """Number the files of each folder in random order: a name tells nothing of what the file is."""
    numbers = rng.sample(range(100_000), len(files))
    for file, number in zip(files, numbers, strict=True):
        file.path = f"{file.folder}/{file.label}/{number:05d}.{file.ending}"
    return sorted(files, key=lambda file: file.path)


def _truth(file: _File) -> dict[str, object]:
    place = vars(file.window) if file.window else {}
    return {
        "path": file.path,
        "kind": file.kind,
        "of": file.of.path if file.of else None,
        "label": file.label,
        "wanted": file.wanted,
        "edit": file.edit,
        **place,
    }
