"""How many copies of each kind, hidden among their originals, curation finds."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from pyarrow import parquet

from dinov2.data.copies import KINDS, QUALITY
from dinov2.data.sources import open_source


def plant(originals: str, folder: Path, *, seed: int = 0, most: int | None = None) -> int:
    """Write `most` originals and a copy of each, of all kinds in turn; returns how many originals there are.

    They go to `folder/original/NNNNN.png` and `folder/KIND/NNNNN.jpg`, all at most 256 pixels high.
    """
    source, draw = open_source(originals), np.random.default_rng(seed)
    count = min(most or len(source), len(source))
    for row in range(count):
        image = Image.open(io.BytesIO(source.read(row))).convert("RGB")
        image.thumbnail((256, 256))
        kind = list(KINDS)[row % len(KINDS)]
        copy = KINDS[kind](image, draw)
        for name, picture in (("original", image), (kind, copy)):
            ending = "png" if name == "original" else "jpg"
            path = folder / name / f"{row:05d}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, quality=QUALITY)  # which PNG has none of
    return count


def found(decisions: Path, components: Path) -> tuple[dict[str, float], float]:
    """Share of each kind's copies in one component with their original; share of such pairs that are true."""
    uris = {row["id"]: row["uri"] for row in parquet.read_table(decisions, columns=["id", "uri"]).to_pylist()}
    group = {uris[row["id"]]: row["component"] for row in parquet.read_table(components).to_pylist()}
    hits: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for uri in uris.values():
        kind, _, name = uri.partition("/")
        if kind in hits:
            original = group.get(f"original/{Path(name).stem}.png")
            hits[kind].append(original is not None and original == group.get(uri))
    members: dict[int, list[str]] = {}
    for uri, number in group.items():
        members.setdefault(number, []).append(Path(uri).stem)
    pairs = sum(len(each) * (len(each) - 1) // 2 for each in members.values())
    right = sum(
        each.count(stem) * (each.count(stem) - 1) // 2 for each in members.values() for stem in set(each)
    )
    return {kind: float(np.mean(each)) for kind, each in hits.items() if each}, right / max(1, pairs)
