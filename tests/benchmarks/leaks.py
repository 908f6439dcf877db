"""The LVD-style recipe on real pictures, with copies of the holdout hidden in its pool."""

import io
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from pyarrow import parquet

from demo import planted
from dinov2.data.copies import KINDS, QUALITY
from dinov2.data.sources import open_source
from tests.benchmarks.figures import Rows

HOLDOUT = ("grocery.tar/val", "imagenette112.tar/val")


def measured(folder: Path, data: Path, each: int, curate: Callable[..., dict[str, float]]) -> Rows:
    """Curate the uncurated pool, imagenette and the hidden copies; seeds are groceries."""
    hidden = hide(folder / "hidden", data, each)
    holdout = ",".join(f"{data}/{name}" for name in HOLDOUT)
    seconds = curate(
        "dinov2_lvd142m",
        f"pool={data}/messy_pool.tar,{data}/imagenette112.tar/train,{folder}/hidden",
        f"seeds={data}/grocery.tar/train",
        f"holdout={holdout}",
        f"output={folder}/out",
    )
    table = parquet.read_table(folder / "out" / "decisions.parquet").to_pylist()
    gone = {row["uri"]: row["dropped_by"] in ("duplicates", "holdout") for row in table}
    others = sum(row["dropped_by"] == "holdout" and row["uri"] not in hidden for row in table)
    return [
        ("pool, of which copies of holdout pictures", f"{len(table):,}; {len(hidden):,}"),
        ("the demo's kinds of copies: dropped", _shares(planted.KINDS, hidden, gone)),
        ("sixteen kinds: dropped", _shares(KINDS, hidden, gone)),
        ("other pictures dropped as leaks", str(others)),
        ("the whole run, two processes", f"{sum(seconds.values()):.0f} s"),
    ]


def _shares(kinds: Iterable[str], hidden: dict[str, str], gone: dict[str, bool]) -> str:
    mine = {kind: [gone[uri] for uri, own in hidden.items() if own == kind] for kind in kinds}
    shown = "; ".join(f"{kind} {sum(each)} of {len(each)}" for kind, each in mine.items())
    return f"**{sum(map(sum, mine.values()))} of {sum(map(len, mine.values()))}** ({shown})"


def hide(folder: Path, data: Path, each: int, seed: int = 0) -> dict[str, str]:
    """Write `each` copies of random pictures of each holdout by both lists of kinds; uri to kind."""
    folder.mkdir(parents=True)
    rng, draw, kinds = random.Random(seed), np.random.default_rng(seed), {}
    for place, name in enumerate(HOLDOUT):
        source = open_source(f"{data}/{name}")
        for number in range(2 * each):
            row = int(draw.integers(len(source)))
            bytes_, ending = source.read(row), Path(source.table["uri"][row].as_py()).suffix[1:].lower()
            if number < each:
                kind = list(planted.KINDS)[number % len(planted.KINDS)]
                copy, ending, _ = planted.KINDS[kind](bytes_, ending, rng)
            else:
                kind = list(KINDS)[number % len(KINDS)]
                file, image = io.BytesIO(), Image.open(io.BytesIO(bytes_)).convert("RGB")
                KINDS[kind](image, draw).save(file, "JPEG", quality=QUALITY)
                copy, ending = file.getvalue(), "jpg"
            uri = f"{place}-{number:04d}.{ending}"
            (folder / uri).write_bytes(copy)
            kinds[uri] = kind
    return kinds
