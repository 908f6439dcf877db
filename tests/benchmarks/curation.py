"""`make bench-curation`: what curation costs and finds, on this machine, as a page.

    python -m tests.benchmarks.curation [NAME …] [scale=0.1] [data=FOLDER] [page=docs/benchmarks/curation.md]

`dedup` also runs imagededup where IMAGEDEDUP names an interpreter that has it, and says so where none does.

Each benchmark runs in a process of its own, so that its peak memory is its own. Its rows are kept beside the
page (curation.json) with machine, date, versions and scale; the page is made from them. All is compared with
what the same process measures next to it, since other programs may share the machine.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from threadpoolctl import threadpool_limits

from tests.benchmarks.figures import ROOT, Rows, product_rate, run

if TYPE_CHECKING:
    from curation.descriptor import Whitening

PAGE = ROOT / "docs" / "benchmarks" / "curation.md"


def sheet(count: int, dimension: int, seed: int = 0) -> np.ndarray:
    """fp16 rows of length 1 on a bent sheet of 30 dimensions, with a little noise."""
    draw = np.random.default_rng(seed)
    turn = draw.standard_normal((30, dimension)).astype(np.float32) / 3
    rows = np.empty((count, dimension), np.float16)
    for at in range(0, count, 50_000):
        flat = draw.standard_normal((min(50_000, count - at), 30), dtype=np.float32)
        bent = np.tanh(flat @ turn) + 0.02 * draw.standard_normal((len(flat), dimension), dtype=np.float32)
        rows[at : at + len(flat)] = bent / np.linalg.norm(bent, axis=1, keepdims=True)
    return rows


def graph(scale: float, data: Path) -> Rows:
    """Exact neighbours of rows among all, each time between two probes of the rate of a float32 product."""
    from dinov2.neighbours import exact

    rows, count = sheet(200_000, 512), max(8192, int(scale * 200_000))
    exact.nearest(rows[:2048], rows[:20_000], 64, exclude_self=True)  # so that threads and memory are there
    rates = [product_rate(512)]

    def measured(queries: int) -> tuple[float, float]:
        start = time.perf_counter()
        exact.nearest(rows[:queries], rows, 64, exclude_self=True)
        seconds = time.perf_counter() - start
        rates.append(product_rate(512))
        return seconds, 2 * queries * len(rows) * 512 / seconds / max(rates[-2:])

    seconds, shares = zip(*(measured(count) for _ in range(4 if count == 8192 else 1)), strict=True)
    exact.COARSE_FROM = sys.maxsize
    _, without = measured(8192)
    middle = sorted(seconds)[(len(seconds) - 1) // 2]
    each = f" (in turn {', '.join(f'{share:.0%}' for share in shares)})" if len(shares) > 1 else ""
    return [
        ("exact k-NN graph, k = 64", f"{count:,} of 200,000 x 512 against all: {middle:.1f} s"),
        (
            "of the rate of a float32 product before or after, the larger",
            f"**{np.median(shares):.0%}** of {max(rates) / 1e9:.0f} GFLOP/s{each}",
        ),
        ("the same where float32 proposes, 8,192 queries", f"{without:.0%}"),
        ("a query against all", f"{1e3 * middle / count:.2f} ms"),
    ]


def components(scale: float, data: Path) -> Rows:
    """Components of a random graph that is read from Parquet."""
    from curation.components import components as find

    count, draw = int(200_000_000 * scale), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(20):
            ends = {name: draw.integers(count, size=count // 20, dtype=np.int32) for name in "ab"}
            parquet.write_table(pa.table(ends), f"{folder}/{number:02d}.parquet", use_dictionary=False)
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        label = find(count, sorted(Path(folder).glob("*.parquet")))
        seconds = time.perf_counter() - start
    roots = sum(
        int((label[at : at + 2**20] == np.arange(at, min(at + 2**20, count))).sum())
        for at in range(0, count, 2**20)
    )
    return [
        (f"components of {count:,} edges over as many pictures", f"**{seconds:.0f} s**, {roots:,} found"),
        ("before it began, the process had held", f"{held / 2**20:.2f} GiB"),
    ]


def ivf(scale: float, data: Path) -> Rows:
    """IVF with product-quantised codes, ranked again, on the fixed generator."""
    rows = sheet(int(1_000_000 * scale), 256)
    return _approximate(rows, "the generator")


def windows(scale: float, data: Path) -> Rows:
    """The same on descriptors of windows of the demo's photographs; WINDOWS=FILE keeps those, or is them."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(os.environ.get("WINDOWS", f"{name}/windows.npy"))
        if not path.exists():
            np.save(path, _descriptors(int(1_000_000 * scale)))
        return _approximate(np.load(path, mmap_mode="r"), "descriptors of windows of photographs")


def _descriptors(count: int) -> np.ndarray:
    """[count, 256] fp16 of windows, half an hour of two cores for a million."""
    from curation.descriptor import Whitening, describe
    from curation.synthetic import changes

    draw = np.random.default_rng(0)
    thumbs = _windows(0, min(count, 20_000))
    raw = np.stack([describe(thumb) for thumb in thumbs])
    white = Whitening.fit(raw, changes(thumbs[:400], raw[:400], draw), 256)
    sizes = [min(10_000, count - at) for at in range(0, count, 10_000)]
    with ProcessPoolExecutor() as processes:
        parts = processes.map(partial(_described, white), range(1, 1 + len(sizes)), sizes)
        return np.concatenate(list(parts))


def _windows(seed: int, count: int) -> np.ndarray:
    """[count, 64, 64, 3] thumbnails of windows of photographs."""
    from demo.photographs import wanted_photographs

    draw, thumbs = np.random.default_rng([0, seed]), []
    pictures = [picture for picture in wanted_photographs().values() if min(picture.size) >= 128]
    for _ in range(count):
        picture = pictures[draw.integers(len(pictures))]
        side = int(draw.integers(64, min(picture.size) + 1))
        left, top = (int(draw.integers(length - side + 1)) for length in picture.size)
        thumbs.append(np.asarray(picture.resize((64, 64), 2, box=(left, top, left + side, top + side))))
    return np.stack(thumbs)


def _described(white: "Whitening", seed: int, count: int) -> np.ndarray:
    from curation.descriptor import describe

    with threadpool_limits(1):
        return white(np.stack([describe(thumb) for thumb in _windows(seed, count)])).astype(np.float16)


def _approximate(rows: np.ndarray, what: str) -> Rows:
    from dinov2.neighbours import Searcher

    how = Searcher(engine="ivf")
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        said = how.prepare(rows, rows, Path(name), inside=True)
        prepared = time.perf_counter() - start
        start = time.perf_counter()
        for _ in how.search(rows, rows, 10, Path(name), how.blocks(len(rows)), inside=True):
            pass
        seconds = time.perf_counter() - start
    return [
        (
            f"IVF{said['lists']},PQ64x4fs, {len(rows):,} x 256 of {what}",
            f"{said['probes']} lists probed, k = 10",
        ),
        (
            "recall@10, the row itself left out, after ranking again",
            f"**{said['recall']:.3f}** on 500 queries",
        ),
        ("training, adding, tuning; searching all", f"{prepared:.0f} s; {seconds:.0f} s"),
    ]


def kmeans(scale: float, data: Path) -> Rows:
    """One level against scikit-learn."""
    from sklearn.cluster import KMeans

    from curation.kmeans import kmeans as cluster

    rows, found = sheet(int(50_000 * scale), 64).astype(np.float32), []
    for seed in range(3):
        start = time.perf_counter()
        ours = cluster(rows, 500, seed=seed)
        middle = time.perf_counter()
        theirs = KMeans(500, random_state=seed, n_init=1).fit(rows)  # pyright: ignore[reportArgumentType]
        found.append(
            (ours.objective / float(theirs.inertia_ or 0), middle - start, time.perf_counter() - middle)
        )
    ratios, mine, others = np.array(found).T
    return [
        (
            f"k-means, {len(rows):,} x 64, 500 clusters, 3 seeds",
            f"{mine.mean():.1f} s; scikit-learn {others.mean():.1f} s",
        ),
        (
            "objective against scikit-learn's full KMeans",
            f"**{', '.join(f'{ratio:.4f}' for ratio in ratios)}**",
        ),
    ]


def hierarchy(scale: float, data: Path) -> Rows:
    """Evenness of a balanced sample over groups of very unequal size."""
    from curation.hierarchy import hierarchical, sampled

    draw, count = np.random.default_rng(0), int(50_000 * scale)
    group = (200 * draw.random(count) ** 3).astype(int)
    rows = draw.standard_normal((200, 64))[group] * 0.6 + 0.3 * draw.standard_normal((count, 64))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    start = time.perf_counter()
    levels = hierarchical(rows, [1000, 200, 40], seed=0, resamplings=2).levels
    seconds = time.perf_counter() - start
    budget = count // 20
    chosen = {"balanced": sampled(levels, budget, draw), "at random": draw.permutation(count)[:budget]}
    even = {name: _effective(group[rows]) for name, rows in chosen.items()}
    return [
        (f"hierarchical k-means, {count:,} x 64, 1000, 200, 40 clusters", f"{seconds:.1f} s"),
        (
            f"groups that a sample of {budget:,} speaks of (exp entropy, of {len(np.unique(group))})",
            f"**{even['balanced']:.0f}** balanced, {even['at random']:.0f} at random",
        ),
    ]


def _effective(group: np.ndarray) -> float:
    share = np.bincount(group) / len(group)
    return float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))


def ingest(scale: float, data: Path) -> Rows:
    """Pictures that one core reads."""
    with tempfile.TemporaryDirectory() as name:
        count = _planted(Path(name), data, scale)
        seconds = _curate(Path(name), "stop_after=ingest", "workers=1")["ingest"]
    return [
        (f"ingest, {count:,} pictures of at most 256 pixels", f"**{count / seconds:.0f}** a second and core")
    ]


def copies(scale: float, data: Path) -> Rows:
    """Kinds of copies of clothes' photographs that the laptop recipe finds."""
    from tests.benchmarks.copies import found

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = _planted(folder, data, scale)
        seconds = sum(_curate(folder, "stop_after=report").values())
        recall, precision = found(
            folder / "out/decisions.parquet", folder / "out/stages/duplicates/components.parquet"
        )
    kinds = "; ".join(f"{kind} {share:.0%}" for kind, share in recall.items())
    return [
        (f"copies found among {count:,} pictures, half of them copies", kinds),
        (
            "recall over all kinds; precision of pairs in one component",
            f"**{np.mean(list(recall.values())):.1%}; {precision:.1%}**",
        ),
        ("the whole run, two processes", f"{seconds:.0f} s"),
    ]


def dedup(scale: float, data: Path) -> Rows:
    """Ten thousand pictures, against imagededup in an interpreter of its own (IMAGEDEDUP=PYTHON)."""
    from tests.benchmarks.dedup import hide, measured

    with tempfile.TemporaryDirectory() as name:
        hide(Path(name) / "pool", data, int(10_000 * scale), int(800 * scale))
        return measured(Path(name), _curate, os.environ.get("IMAGEDEDUP"))


def leaks(scale: float, data: Path) -> Rows:
    """The LVD-style recipe: which of the copies of evaluation pictures hidden in its pool it drops."""
    from tests.benchmarks.leaks import measured

    with tempfile.TemporaryDirectory() as name:
        return measured(Path(name), data, int(240 * scale), _run)


def report(scale: float, data: Path) -> Rows:
    """A hundred thousand pictures, and what the report makes of them; REPORT=FOLDER keeps all of it."""
    from tests.benchmarks.large_report import measured

    with tempfile.TemporaryDirectory() as name:
        return measured(Path(os.environ.get("REPORT", name)), data, int(100_000 * scale), _curate)


def _planted(folder: Path, data: Path, scale: float) -> int:
    from tests.benchmarks.copies import plant

    return 2 * plant(f"{data}/messy_pool.tar/clothing", folder / "pool", most=int(800 * scale))


def _curate(folder: Path, *words: str) -> dict[str, float]:
    return _run("laptop", f"pool={folder}/pool", f"output={folder}/out", *words)


def _run(*words: str) -> dict[str, float]:
    """Seconds of each stage of a run of these words."""
    start = time.perf_counter()
    said = subprocess.run(
        [sys.executable, "-m", "curation", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    found = {}
    for line in said.splitlines():
        stage, colon, rest = line.partition(": ")
        if colon and rest.endswith(" s)"):
            found[stage] = float(rest.rpartition("(")[2].removesuffix(" s)"))
    return found or {"all": time.perf_counter() - start}


BENCHMARKS: dict[str, Callable[[float, Path], Rows]] = {
    each.__name__: each
    for each in (graph, components, ivf, windows, kmeans, hierarchy, ingest, copies, dedup, leaks, report)
}


if __name__ == "__main__":
    run(
        "tests.benchmarks.curation",
        sys.argv[1:],
        BENCHMARKS,
        page=PAGE,
        title="What curation costs and finds",
        command="bench-curation",
    )
