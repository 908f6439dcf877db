"""`make bench-evals`: what evaluation's engines cost on this machine, as a page.

    python -m tests.benchmarks.evals [NAME …] [scale=0.1] [page=docs/benchmarks/evals.md]

How it is measured: see `tests.benchmarks.figures`. The scale is of the number of queries; nothing is read
from the folder of real pictures.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from evals.heads import HeadGrid, Kind
from evals.linear import RATES
from evals.logistic import Logistic, Search
from tests.benchmarks.curation import sheet
from tests.benchmarks.figures import ROOT, Benchmark, Rows, product_rate, run

PAGE = ROOT / "docs" / "benchmarks" / "evals.md"
CLASSES, BATCH, DIM = 1000, 128, 384  # ImageNet, the published batch, ViT-S
# Columns of the full feature: the CLS tokens of the last four blocks, then the mean patch token.
KINDS = [
    Kind(blocks, mean, slice((4 - blocks) * DIM, (4 + mean) * DIM))
    for blocks in (1, 4)
    for mean in (False, True)
]


def knn(scale: float, data: Path) -> Rows:
    """The vote of training and evaluation, at the size of ImageNet's validation part."""
    from dinov2.neighbours import knn_classify

    rows = sheet(150_000, DIM)
    train, test = rows[:100_000], rows[100_000 : 100_000 + max(4096, int(50_000 * scale))]
    labels = torch.arange(len(train)) % CLASSES
    knn_classify(train[:4096], labels[:4096], test[:1024], classes=CLASSES)  # warm
    operations, found = 2 * len(train) * len(test) * DIM, []
    for k in ([20], [10, 20, 100, 200]):
        vote = partial(knn_classify, train, labels, test, classes=CLASSES, k=k)
        seconds, share = _measured(vote, operations, rounds=3 if scale <= 0.1 else 1)
        shown = ", ".join(map(str, k))
        found.append((f"k-NN, k = {shown}", f"{len(test):,} x {len(train):,} x {DIM}, {seconds:.1f} s"))
        found.append(share)
    return found


def grid(scale: float, data: Path) -> Rows:
    """A step of all 52 heads at 1,000 classes: two products for each kind of feature, and all around them."""
    heads = HeadGrid(KINDS, RATES, CLASSES, iterations=100, seed=0)
    step = partial(heads.train_step, torch.randn(BATCH, 5 * DIM), torch.arange(BATCH))
    widths = sum(kind.columns.stop - kind.columns.start for kind in KINDS)
    step()  # warm
    seconds, share = _measured(step, 4 * BATCH * len(RATES) * CLASSES * widths, rounds=5)
    return [
        (f"a step of {len(heads)} heads, {CLASSES:,} classes, batch {BATCH}", f"{1000 * seconds:.0f} ms"),
        share,
    ]


def features(scale: float, data: Path) -> Rows:
    """The published protocol: every step's crops go through the backbone. All heads against one."""
    from dinov2.features import BackboneEmbedder
    from dinov2.models import load_backbone

    backbone = load_backbone("timm:vit_small_patch14_dinov2")
    count = max(8, int(BATCH * scale))
    pictures = torch.randint(256, (count, 3, 224, 224), dtype=torch.uint8)
    labels = torch.arange(count)
    all_of_them = HeadGrid(KINDS, RATES, CLASSES, iterations=100, seed=0)
    one = HeadGrid([Kind(1, False, slice(0, DIM))], RATES[:1], CLASSES, iterations=100, seed=0)
    ways = {
        "52": (BackboneEmbedder(backbone, token="cls4+mean"), all_of_them),
        "1": (BackboneEmbedder(backbone, token="cls"), one),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(2):
        for name, (embed, heads) in ways.items():
            spent = _seconds(lambda embed=embed, heads=heads: heads.train_step(embed(pictures), labels))
            best[name] = min(best[name], spent)
    return [
        (f"a step with its features, ViT-S/14 at 224, batch {count}: 1 head", f"{best['1']:.2f} s"),
        ("all 52 heads", f"{best['52']:.2f} s, **{best['52'] / best['1']:.2f} times**"),
    ]


def logreg(scale: float, data: Path) -> Rows:
    """All values of C, each from the solution of the one before, on classes that overlap."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(int(10_000 * scale)) % 100
    rows = 0.6 * torch.randn(100, DIM, generator=generator)[labels]
    rows += 4 * torch.randn(len(labels), DIM, generator=generator)
    model, grid = Logistic(), Search().grid
    spent = _seconds(lambda: [model.fit(rows, labels, c) for c in grid])
    return [(f"{len(grid)} values of C, 100 classes", f"{len(labels):,} x {DIM}, {spent:.0f} s")]


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _measured(
    function: Callable[[], object], operations: float, rounds: int
) -> tuple[float, tuple[str, str]]:
    """Seconds, and a row: the share of the rate of a product, each time between two probes of that."""
    seconds, shares, rates = [], [], [product_rate(DIM)]
    for _ in range(rounds):
        seconds.append(_seconds(function))
        rates.append(product_rate(DIM))
        shares.append(operations / seconds[-1] / max(rates[-2:]))
    each = ", ".join(f"{share:.0%}" for share in shares)  # other programs may have shared the machine
    figure = f"**{median(shares):.0%}** of {max(rates) / 1e9:.0f} GFLOP/s (in turn {each})"
    return median(seconds), ("of the rate of a matrix product before or after, the larger", figure)


BENCHMARKS: dict[str, Benchmark] = {each.__name__: each for each in (knn, grid, features, logreg)}

if __name__ == "__main__":
    run(
        "tests.benchmarks.evals",
        sys.argv[1:],
        BENCHMARKS,
        page=PAGE,
        title="What evaluation costs",
        command="bench-evals",
    )
