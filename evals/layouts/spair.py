"""SPair-71k (arXiv 1908.10543): `JPEGImages/CATEGORY/*.jpg` and `PairAnnotation/SPLIT/*.json`, a file a pair.

A pair's JSON has category, src_imname, trg_imname, src_kps, trg_kps (x and y in pixels of the files, in the
same order), and trg_bndbox (left, top, right, bottom). Pairs of one's own in this form are read as well.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dinov2.exits import UserError
from evals.layouts.described import Described

IMAGES, PAIRS = "JPEGImages", "PairAnnotation"
SPLITS = {"test": "test", "val": "val", "train": "trn"}


@dataclass(frozen=True)
class Pair:
    """Two pictures of a category, and the same points in both, in pixels."""

    name: str
    category: str
    source: Path
    target: Path
    source_points: Float[np.ndarray, "points 2"]
    target_points: Float[np.ndarray, "points 2"]
    box: tuple[float, float, float, float]  # of the object in the target: left, top, right, bottom


@dataclass(frozen=True)
class Pairs:
    pairs: Sequence[Pair]
    described: Described

    @property
    def sources(self) -> dict[str, Any]:
        return {"pairs": self.described}


def find(root: Path, split: str) -> Pairs:
    """The pairs of a split, sorted by name.

    Raises:
        UserError: there are none, a file lacks something, or names a picture that is not there.
    """
    folder = root / PAIRS / SPLITS[split]
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise UserError(f"there are no pairs in {folder}; data= is the folder of {IMAGES} and {PAIRS}")
    digest = hashlib.sha256()
    pairs = []
    for path in paths:
        text = path.read_bytes()
        digest.update(path.name.encode() + text)
        pairs.append(_pair(root, path, text))
    for picture in sorted({path for pair in pairs for path in (pair.source, pair.target)}):
        if not picture.is_file():
            raise UserError(f"{folder} names {picture}, which is not there")
        digest.update(str(picture.stat().st_size).encode())
    return Pairs(pairs, Described(f"{root.name}-{split}", digest.hexdigest()[:32], len(pairs)))


def _pair(root: Path, path: Path, text: bytes) -> Pair:
    try:
        content = json.loads(text)
        ours, theirs = (np.array(content[f"{side}_kps"], float).reshape(-1, 2) for side in ("src", "trg"))
        left, top, right, bottom = map(float, content["trg_bndbox"])
        images = root / IMAGES / content["category"]
        pair = Pair(
            path.stem,
            content["category"],
            images / content["src_imname"],
            images / content["trg_imname"],
            ours,
            theirs,
            (left, top, right, bottom),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no pair of pictures: {error!r}") from None
    if len(ours) != len(theirs) or not len(ours):
        raise UserError(f"{path}: {len(ours)} points in one picture, {len(theirs)} in the other")
    if left >= right or top >= bottom:
        raise UserError(f"{path}: a box of no size, {[left, top, right, bottom]}")
    return pair
