"""What the demo works on: a pool and a test set, from its own pictures or from the user's."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from demo.config import IMAGENETTE, DemoConfig
from demo.pictures import make_pictures
from dinov2.data.manifest import read_manifest
from dinov2.data.sources import open_source
from dinov2.exits import UserError
from dinov2.files import read_json, write_json, write_table, write_text

FEWEST = 100  # pictures of one's own, below which nothing could be trained or said
TEST_SHARE = 0.2  # of one's own pictures, where no folder is called test or val
MOST_TEST = 1_000


@dataclass(frozen=True)
class Inputs:
    """Sources by role, as the other programs take them, and what is known of them."""

    pool: str
    test: str
    seeds: str | None  # source of pictures whose like is wanted
    truth: str | None  # table of what was planted
    labelled: bool
    title: str
    about: str  # a sentence for the page


def make_inputs(config: DemoConfig, folder: Path) -> None:
    """Make or find the pictures; `inputs.json` says where they are.

    Raises:
        UserError: the folder is missing or has too few pictures, or imagenette cannot be fetched.
    """
    if not config.images:
        inputs = _own(config, folder / "pictures")
    elif config.images == IMAGENETTE:
        inputs = _users(config, folder / "lists", fetched_imagenette(folder / "imagenette"), "imagenette")
    else:
        inputs = _users(config, folder / "lists", Path(config.images), Path(config.images).resolve().name)
    write_json(folder / "inputs.json", vars(inputs))


def read_inputs(folder: Path) -> Inputs:
    return Inputs(**read_json(folder / "inputs.json"))


def known_test(inputs: Inputs, folder: Path) -> str:
    """The test set without classes of which curation has left nothing: nobody could know those."""
    known = set(read_manifest(folder / "curated" / "manifest.parquet", ["label"])["label"].to_pylist())
    rows = open_source(inputs.test).table.select(["uri", "label"]).to_pylist()
    left = [row for row in rows if row["label"] in known]
    if len(left) == len(rows):
        return inputs.test
    path = folder / "known_test.parquet"
    base = Path(inputs.test)
    for row in left:
        row["uri"] = str((base if base.is_dir() else base.parent) / row["uri"])
    write_table(path, pa.Table.from_pylist(left))
    return str(path)


def _own(config: DemoConfig, folder: Path) -> Inputs:
    make_pictures(folder, config.seed, config.plan)
    return Inputs(
        pool=str(folder / "pool"),
        test=str(folder / "test"),
        seeds=str(folder / "seeds"),
        truth=str(folder / "truth.parquet"),
        labelled=True,
        title="windows of packaged photographs",
        about="The pictures are windows cut from the real photographs that scikit-image and scikit-learn "
        "carry inside their packages, at different places, scales, rotations and light. **A picture's label "
        "is the photograph it was cut from, so the numbers below measure recognising scenes, no more.** "
        "Originals overlap by at most a tenth, and test windows come from regions that no training window "
        "touches.",
    )


def _users(config: DemoConfig, folder: Path, images: Path, title: str) -> Inputs:
    if not images.is_dir():
        raise UserError(f"images={images} is no folder; name a folder of pictures, or {IMAGENETTE}")
    rows = sorted(_rows(images), key=lambda row: row["drawn"])
    given = any(row["split"] in ("val", "test") for row in rows)
    tested = [
        row for row in rows if (row["split"] in ("val", "test") if given else row["drawn"] < TEST_SHARE)
    ]
    names = {row["uri"] for row in tested}
    pool = [row for row in rows if row["uri"] not in names][: config.most]
    tested = tested[:MOST_TEST]
    if len(pool) + len(tested) < FEWEST or not tested:
        raise UserError(
            f"images={images} has {len(rows)} pictures, too few to train on; give {FEWEST} or more, "
            "several thousand for a backbone of use"
        )
    for name, chosen in (("pool", pool), ("test", tested)):
        write_table(folder / f"{name}.parquet", pa.Table.from_pylist(chosen).drop_columns(["drawn"]))
    labels = [row["label"] for row in pool + tested]
    left_out = len(rows) > len(labels)
    how = "those in its test or val folder" if given else f"{TEST_SHARE:.0%}, by a hash of their names"
    limits = f", as at most {config.most:,} and {MOST_TEST:,} are taken" if left_out else ""
    return Inputs(
        pool=str(folder / "pool.parquet"),
        test=str(folder / "test.parquet"),
        seeds=None,
        truth=None,
        labelled=None not in labels and len(set(labels)) > 1,
        title=title,
        about=f"Of the {len(rows):,} pictures in `{title}`, {len(pool):,} are the pool and "
        f"{len(tested):,} the test set ({how}){limits}.",
    )


def _rows(images: Path) -> Iterator[dict[str, Any]]:
    """Every picture with its place in a draw by name, which other pictures do not change."""
    table = open_source(str(images)).table.select(["uri", "label", "split"])
    for row in table.to_pylist():
        drawn = int.from_bytes(hashlib.sha256(row["uri"].encode()).digest()[:8]) / 2**64
        yield {**row, "uri": str(images.resolve() / row["uri"]), "drawn": drawn}


def fetched_imagenette(folder: Path) -> Path:
    """Imagenette, 160 pixels, through torchvision, which verifies it.

    Raises:
        UserError: there is no network, or not enough of it.
    """
    import dinov2.vision_ops  # noqa: F401  # declares what torchvision may miss, so it must come first

    from torchvision.datasets import Imagenette

    whole, there = folder / "whole", folder / "imagenette2-160"
    if whole.exists():
        return there
    shutil.rmtree(there, ignore_errors=True)  # unpacked in part; the archive stays and is verified
    try:
        Imagenette(folder, "train", size="160px", download=True)
    except (OSError, RuntimeError) as error:  # what urllib and torchvision's checksum raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"imagenette cannot be fetched ({reason}); it needs a network: "
            "leave images= out, or name a folder of pictures"
        ) from None
    write_text(whole, "unpacked\n")
    return there
