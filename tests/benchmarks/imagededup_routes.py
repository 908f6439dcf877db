"""Runs in an interpreter that has imagededup: its CNN route on embeddings that are given, and its hashes.

usage: PYTHON -m tests.benchmarks.imagededup_routes EMBEDDINGS.npz PICTURES FOUND.npz

EMBEDDINGS.npz holds `names` (paths under PICTURES) and `vectors`. FOUND.npz gets, for each route, the pairs
that it finds, with its score of each, and its seconds; and the versions. Nothing of curation is imported.
"""

import sys
import time
import warnings
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
    results: dict[str, np.ndarray] = {}
    seconds = {}
    given = dict(zip(names, vectors, strict=True))
    for name, scores in (("cnn", False), ("cnn with scores", True)):
        start = time.perf_counter()
        pairs = cnn.find_duplicates(encoding_map=given, scores=scores)
        seconds[name] = time.perf_counter() - start
        if scores:
            results["cnn"] = _listed(pairs, place)
    hashing = PHash(verbose=False)
    start = time.perf_counter()
    hashed = hashing.encode_images(pictures, recursive=True)
    seconds["hashing"] = time.perf_counter() - start
    start = time.perf_counter()
    hashing.find_duplicates(encoding_map=hashed)
    seconds["phash"] = time.perf_counter() - start
    loose = hashing.find_duplicates(encoding_map=hashed, scores=True, max_distance_threshold=LOOSEST)
    results["phash"] = _listed(loose, place)
    said = " ".join(f"{name} {version(name)}" for name in ("imagededup", "torch", "numpy", "scikit-learn"))
    np.savez(found, seconds=np.array(list(seconds.items())), versions=np.array(said), **results)


def _listed(found: dict, place: dict[str, int]) -> np.ndarray:
    """[p, 3] rows of both pictures, the lower first, and the score of each pair."""
    rows = [(place[one], place[other], score) for one, others in found.items() for other, score in others]
    return np.array(sorted({(min(a, b), max(a, b), float(score)) for a, b, score in rows})).reshape(-1, 3)


class _Quiet:
    def info(self, *_: object) -> None: ...


if __name__ == "__main__":
    main(*map(str, map(Path, sys.argv[1:])))
