"""Ten thousand pictures deduplicated by curation and by imagededup, from the same embeddings."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pyarrow import parquet

from dinov2.data.sources import open_source
from tests.benchmarks.copies import plant

ROOT = Path(__file__).parents[2]
Rows = list[tuple[str, str]]
Pairs = NDArray[np.float64]  # [p, 3] rows of both pictures and the score


def hide(folder: Path, data: Path, count: int, originals: int) -> None:
    """`count` pictures: photographs of clothes, as many copies of these, and others among them."""
    planted = 2 * plant(f"{data}/messy_pool.tar/clothing", folder, most=originals)
    others = open_source(f"{data}/imagenette112.tar/train")
    (folder / "other").mkdir()
    for row in np.random.default_rng(0).permutation(len(others))[: count - planted].tolist():
        (folder / "other" / f"other{row:05d}.jpg").write_bytes(others.read(row))


def measured(folder: Path, curate: Callable[..., dict[str, float]], interpreter: str | None) -> Rows:
    """Rows of the page. `folder/pool` holds what `hide` made; `interpreter` has imagededup."""
    before = curate(folder, "stop_after=embed")
    seconds = min(_searched(folder, curate) for _ in range(2))
    names, vectors = _embedded(folder / "out", folder / "pool")
    truth = _Truth(names)
    ours = _edges(folder / "out", truth.place)
    rows = [
        (
            f"{len(names):,} pictures, {truth.count} of them copies, embedded: pairs found in",
            f"**{seconds:.1f} s**",
        ),
        ("recall and precision", truth.said(ours)),
        (
            "each figure of seconds is that of the faster of two runs; reading and embedding before that",
            f"{sum(before.values()):.0f} s",
        ),
    ]
    if interpreter is None:
        return [
            *rows,
            ("imagededup", "not measured: no interpreter was given that has it (IMAGEDEDUP=PYTHON)"),
        ]
    np.savez(folder / "embeddings.npz", names=np.array(names), vectors=vectors)
    said = [folder / "embeddings.npz", folder / "pool", folder / "found.npz"]
    subprocess.run(
        [interpreter, "-m", "tests.benchmarks.imagededup_routes", *map(str, said)], cwd=ROOT, check=True
    )
    with np.load(folder / "found.npz") as found:
        theirs = {name: float(value) for name, value in found["seconds"]}
        alike, hashed, versions = found["cnn"], found["phash"], str(found["versions"])
    near = np.argwhere(np.triu(vectors @ vectors.T, 1) >= 0.3)
    cosine = (vectors[near[:, 0]] * vectors[near[:, 1]]).sum(axis=1)
    close = np.column_stack([near, cosine]).astype(np.float64)
    best = max(np.arange(0.3, 1, 0.01), key=lambda least: truth.f1(close[cosine >= least]))
    bits = max(range(17), key=lambda most: truth.f1(hashed[hashed[:, 2] <= most]))
    return [
        *rows,
        ("with", versions),
        ("its CNN route from the same embeddings, pairs alone", _against(theirs["cnn"], seconds)),
        (
            "its CNN route, pairs and their similarity, as curation gives",
            _against(theirs["cnn with scores"], seconds),
        ),
        ("recall and precision at its 0.9", truth.said(alike)),
        (f"at {best:.2f}, the best that there is", truth.said(close[cosine >= best])),
        ("its perceptual hashes, pairs from hashes", _against(theirs["phash"], seconds)),
        ("hashing before that", f"{theirs['hashing']:.0f} s"),
        ("recall and precision at its 10 bits", truth.said(hashed[hashed[:, 2] <= 10])),
        (f"at {bits} bits, the best that there is", truth.said(hashed[hashed[:, 2] <= bits])),
    ]


def _searched(folder: Path, curate: Callable[..., dict[str, float]]) -> float:
    """Seconds that the stage takes, from nothing."""
    shutil.rmtree(folder / "out/stages/duplicates", ignore_errors=True)
    return curate(folder, "stop_after=duplicates")["duplicates"]


def _against(theirs: float, ours: float) -> str:
    return f"{theirs:.1f} s: curation takes **{ours / theirs:.2f}** of that"


def _embedded(out: Path, pool: Path) -> tuple[list[str], NDArray[np.float32]]:
    folder = out / "stages/embed/pool"
    names = parquet.read_table(folder / "ids.parquet")["uri"].to_pylist()
    rows = np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))]).astype(np.float32)
    assert all((pool / name).exists() for name in names[:3])
    return names, rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _edges(out: Path, place: dict[str, int]) -> Pairs:
    table = parquet.read_table(out / "edges/duplicate.parquet")
    decided = parquet.read_table(out / "stages/embed/pool/ids.parquet")
    name = dict(zip(decided["id"].to_pylist(), decided["uri"].to_pylist(), strict=True))
    ends = [[place[name[row]] for row in table[end].to_pylist()] for end in "ab"]
    score = table["similarity"].to_numpy()
    return np.column_stack([*ends, score])[score >= 0.75]  # what counts by default


class _Truth:
    """Which pairs are an original and its copy. What the other pictures are to one another is not known."""

    def __init__(self, names: list[str]) -> None:
        self.place = {name: row for row, name in enumerate(names)}
        self.other = np.array([name.startswith("other/") for name in names])
        self.picture = np.array([-1 if name.startswith("other/") else int(Path(name).stem) for name in names])
        self.count = int((~self.other).sum()) // 2

    def measure(self, pairs: Pairs) -> tuple[float, float]:
        """Recall and precision of pairs that one of the copies or originals is in."""
        a, b = pairs[:, 0].astype(int), pairs[:, 1].astype(int)
        known = ~(self.other[a] & self.other[b])
        right = int((known & (self.picture[a] == self.picture[b])).sum())
        return right / self.count, right / max(1, int(known.sum()))

    def f1(self, pairs: Pairs) -> float:
        recall, precision = self.measure(pairs)
        return 2 * recall * precision / max(1e-9, recall + precision)

    def said(self, pairs: Pairs) -> str:
        recall, precision = self.measure(pairs)
        return f"**{recall:.1%}; {precision:.1%}**"
