"""Works out what curating a pool costs, from costs that were measured, for docs/curation-at-scale.md.

python -m tests.benchmarks.plan [pictures=1.2e9] [nodes=20] [cores=64]
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import log2

Row = tuple[str, float, float, str, str]


@dataclass(frozen=True)
class Costs:
    """Of one core of the machine in docs/benchmarks/curation.md, but for what says that it is assumed."""

    ingest: float = 1 / 372  # seconds a picture of 256 pixels (`ingest`)
    product: float = 93e9  # floating-point operations a second (`graph`)
    code: float = 1 / 570e6  # seconds for each row of 64 codes of 4 bits (`ivf` less `windows`)
    ranked: float = 1.3e-6  # seconds for each stored row that a short list is ranked again by (`windows`)
    look_up: float = 13e-6  # seconds a picture and hash, 700 look-ups (`curation.hashes`)
    candidate: float = 34e-9  # seconds each hash that a look-up finds (`curation.hashes`)
    pair: float = 5e-4  # seconds to lay one picture over another, second looks counted in (`dedup`)
    edge: float = 41 / 200e6  # seconds an edge and picture for components (`components`)
    embed_gpu: float = 1 / 1500  # ASSUMED: seconds a picture of 288 pixels through a ResNet-50, one GPU
    picture: float = 100e3  # ASSUMED: bytes of an original
    written: float = 1 / 200e6  # ASSUMED: seconds a byte that is read, checked and written again


@dataclass(frozen=True)
class Pool:
    pictures: float = 1.2e9
    dimension: int = 512  # of the copy-detection embedding
    probes: int = 64  # ASSUMED; the run measures the recall that it gives, and stops under the floor
    short: int = 128  # rows that a short list is ranked again by, for k = 64
    verified: float = 2.0  # ASSUMED: pairs a picture that are looked at again, those above a cosine of 0.5
    edges: float = 1e9  # ASSUMED: above the loosest threshold
    clusters: int = 100_000  # DINOv2 app. A
    rounds: int = 20
    wide: int = 1280  # dimensions of the retrieval embedding
    holdout: float = 2e6  # ASSUMED: evaluation pictures
    suspected: float = 1.0  # ASSUMED: pairs a picture with these, of leaks.always=0
    seeds: float = 15e6  # ASSUMED: about ImageNet-22k and some smaller sets
    kept: float = 142e6  # DINOv2 app. A


def neighbours(pool: Pool, costs: Costs, base: float) -> float:
    """Core-seconds for one query's neighbours among so many rows, by IVF."""
    lists = 2 ** round(log2(base) / 2)  # as search.index=auto has them
    coarse = 2 * lists * pool.dimension / costs.product
    looked_through = pool.probes * base / lists * costs.code * pool.dimension / 256
    return coarse + looked_through + pool.short * costs.ranked


def verified(stage: str, pairs: float, costs: Costs) -> Row:
    """Of a stage that lays so many pairs over each other, and keeps 25 bytes of each."""
    return f"{stage}: verify", pairs * costs.pair, pairs * 25, "shard=i/n", "measured a pair, pairs assumed"


def rows(pool: Pool, costs: Costs) -> Iterator[Row]:
    """Stage, core-seconds, bytes left on disk, how it is cut, what the figure rests on."""
    n = pool.pictures
    thumbs, raw = 64 * 64 * 3 * n, 2 * 508 * n
    yield "ingest", n * costs.ingest, thumbs + raw + 300 * n, "shard=i/n", "measured on 1,600"
    yield "embed (GPU-hours)", n * costs.embed_gpu, 2 * pool.dimension * n, "shard=i/n", "assumed"
    yield (
        "duplicates: neighbours",
        n * neighbours(pool, costs, n),
        n * (pool.dimension // 8 + 8),
        "shard=i/n",
        "inferred from 1M x 256",
    )
    look_ups = "inferred from tables of millions"
    a_hash = costs.look_up + 700 * n / 2**21 * costs.candidate
    yield "duplicates: hashes", 2 * n * a_hash, 0, "shard=i/n", look_ups
    # within 5 bits: three parts of 21 or 22 bits, each with at most one bit flipped
    of_a_view = 66 / 700 * costs.look_up + 66 * n / 2 ** (64 / 3) * costs.candidate
    yield "duplicates: 14 views' hashes", 2 * 14 * n * of_a_view, 0, "shard=i/n", look_ups
    yield verified("duplicates", n * pool.verified, costs)
    joined = (pool.edges + n) / 2 * costs.edge
    yield "duplicates: components", joined, 12 * pool.edges, "one process", "inferred from 200M edges"
    both_ways = n * neighbours(pool, costs, pool.holdout) + pool.holdout * neighbours(pool, costs, n)
    yield "holdout: neighbours", both_ways, 0, "shard=i/n", "inferred, sets assumed"
    yield verified("holdout", n * pool.suspected, costs)
    a_round = 2 * n * pool.clusters * pool.wide / costs.product
    yield "k-means", pool.rounds * a_round, 2 * pool.wide * n, "ranks", "inferred from a product's rate"
    asked = 2 * pool.seeds * pool.clusters * pool.wide / costs.product
    yield "retrieval by clusters", asked, 0, "one process", "inferred from a product's rate"
    size = pool.kept * costs.picture
    yield "write", size * costs.written, size, "one machine", "assumed"


def table(pool: Pool, costs: Costs, nodes: int, cores: int) -> str:
    lines = [
        f"| stage | core-hours | hours on {nodes} nodes of {cores} cores | disk, TB | cut by | figure |",
        "|---|---|---|---|---|---|",
    ]
    for name, seconds, disk, how, basis in rows(pool, costs):
        shared = {"one process": 1, "one machine": cores}
        together = shared[how] if how in shared else nodes if "GPU" in name else nodes * cores
        hours = seconds / 3600
        lines.append(
            f"| {name} | {hours:,.1f} | {hours / together:,.2f} | {disk / 1e12:.2f} | {how} | {basis} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    told = dict(word.split("=", 1) for word in sys.argv[1:])
    pool = Pool(pictures=float(told.get("pictures", 1.2e9)))
    print(table(pool, Costs(), int(told.get("nodes", 20)), int(told.get("cores", 64))))
