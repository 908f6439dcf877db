"""Runs in an interpreter that has imagededup: its CNN route on embeddings that are given, and its hashes.

usage: PYTHON -m tests.benchmarks.imagededup_routes EMBEDDINGS.npz PICTURES FOUND.npz

EMBEDDINGS.npz holds `names` (paths under PICTURES) and `vectors`. FOUND.npz gets, for each route, the pairs
that it finds, with its score of each, and its seconds; and the versions. Nothing of curation is imported.
"""

import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import dinov2.vision_ops  # noqa: F401  (torchvision beside a CPU-only torch)

import numpy as np

LOOSEST = 16  # bits of a hash: thresholds up to it can be tried afterwards; the route's own default is 10


def main(embeddings: str, pictures: str, found: str) -> None:
    from imagededup.methods import CNN, PHash  # pyright: ignore[reportMissingImports]

    warnings.filterwarnings("ignore")
    with np.load(embeddings) as stored:
        names, vectors = stored["names"].tolist(), stored["vectors"].astype(np.float32)
    place = {name: row for row, name in enumerate(names)}
    # Its constructor would fetch a network, which given embeddings do without.
    cnn = CNN.__new__(CNN)
    cnn.verbose, cnn.logger = False, _Quiet()
    seconds = {}
    given = dict(zip(names, vectors, strict=True))
    seconds["cnn"], _ = _fastest(lambda: cnn.find_duplicates(encoding_map=given))
    seconds["cnn with scores"], alike = _fastest(lambda: cnn.find_duplicates(encoding_map=given, scores=True))
    hashing = PHash(verbose=False)
    seconds["hashing"], hashed = _fastest(lambda: hashing.encode_images(pictures, recursive=True))
    seconds["phash"], _ = _fastest(lambda: hashing.find_duplicates(encoding_map=hashed))
    loose = hashing.find_duplicates(encoding_map=hashed, scores=True, max_distance_threshold=LOOSEST)
    said = " ".join(f"{name} {version(name)}" for name in ("imagededup", "torch", "numpy", "scikit-learn"))
    times = np.array(list(seconds.items()))
    np.savez(
        found, seconds=times, versions=np.array(said), cnn=_listed(alike, place), phash=_listed(loose, place)
    )


def _fastest(route: Callable[[], dict]) -> tuple[float, dict]:
    """Seconds of the faster of two runs, and what it finds."""
    seconds, found = [], {}
    for _ in range(2):
        start = time.perf_counter()
        found = route()
        seconds.append(time.perf_counter() - start)
    return min(seconds), found


def _listed(found: dict, place: dict[str, int]) -> np.ndarray:
    """[p, 3] rows of both pictures, the lower first, and the score of each pair."""
    rows = [(place[one], place[other], score) for one, others in found.items() for other, score in others]
    return np.array(sorted({(min(a, b), max(a, b), float(score)) for a, b, score in rows})).reshape(-1, 3)


class _Quiet:
    def info(self, *_: object) -> None: ...


if __name__ == "__main__":
    main(*map(str, map(Path, sys.argv[1:])))
