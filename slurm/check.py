"""Before a long training: does every rank come, is every node as fast as the others, and every link?

Started by the job in each of its tasks as `python -m slurm.check FOLDER LIMIT`. Measures on each rank a bf16
matrix product and a read from the disk that holds FOLDER, and between each pair of nodes an all-reduce. A
node is slow where a rate of it is below LIMIT times the median, of two nodes the better: FOLDER/JOB.slow.json
then names it, and the end of the batch script has the job queued again without it. What was measured is
FOLDER/JOB.check.json.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]  # as documented

from dinov2.exits import NoProgress, Stop
from dinov2.files import TEMPORARY, write_json
from dinov2.parallel import pick_device

COME = 120.0  # seconds in which every rank must be there
SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices
MESSAGE = {"cuda": 256, "cpu": 16}  # MiB of an all-reduce
FILE = 32  # MiB written and read
SLOW = 75  # leave with "run again": the job is queued without the nodes named

Rates = dict[str, dict[str, float]]  # of each node: the lowest TFLOP/s and MiB/s of its ranks and links


def check(folder: Path, limit: float) -> int:
    """Measure on all ranks together; the status to leave with, 0 if nothing is slow."""
    device = pick_device("auto")
    if "RANK" not in os.environ:
        return 0
    nodes = _meet(device)
    rates: Rates = {node: {} for node in nodes}
    _gather(rates, nodes, "matrix products, TFLOP/s", _matmul(device))
    _gather(rates, nodes, "disk, MiB/s", _disk(folder))
    for pair, rate in _links(nodes, device):
        for node in pair:
            rates[node]["link, MiB/s"] = max(rates[node].get("link, MiB/s", 0.0), rate)
    slow = slow_nodes(rates, limit)
    if dist.get_rank() == 0:
        _write(folder, rates, slow)
    dist.barrier()
    dist.destroy_process_group()
    return SLOW if slow else 0


def slow_nodes(rates: Rates, limit: float) -> dict[str, str]:
    """The nodes with a rate below `limit` times the median of all, each with its reason.

    Of a link, the best that a node reaches with any other counts: a slow partner is not its fault.
    """
    found: dict[str, str] = {}
    for what in sorted({key for own in rates.values() for key in own}):
        # The mean of two would call a node slow only below a third of the other.
        median = statistics.median_high(own[what] for own in rates.values() if what in own)
        for node, own in rates.items():
            if own.get(what, median) < limit * median:
                found[node] = f"{what}: {own[what]:.3g}, the median is {median:.3g}"
    return found


def _meet(device: torch.device) -> list[str]:
    """Join all ranks and return the node of each.

    Raises:
        NoProgress: names the ranks that did not come in time.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = os.environ.get("SLURMD_NODENAME", f"rank {rank}")
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*place, world, rank == 0, timeout=timedelta(seconds=COME), wait_for_workers=False)
    store.set(f"here/{rank}", own)
    until = time.monotonic() + COME
    while missing := [r for r in range(world) if not store.check([f"here/{r}"])]:
        if time.monotonic() > until:
            raise NoProgress(f"rank {', '.join(map(str, missing))} of {world} did not come within {COME:g} s")
        time.sleep(0.2)
    nodes = [store.get(f"here/{r}").decode() for r in range(world)]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("check", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=COME),
    )
    return nodes


def _gather(rates: Rates, nodes: list[str], what: str, rate: float) -> None:
    every: list[float] = [0.0] * len(nodes)
    dist.all_gather_object(every, rate)
    for node, own in zip(nodes, every, strict=True):
        rates[node][what] = min(own, rates[node].get(what, own))


def _links(nodes: list[str], device: torch.device) -> Iterator[tuple[tuple[str, str], float]]:
    """MiB/s of an all-reduce between the first ranks of two nodes; every pair, disjoint ones at a time."""
    names = list(dict.fromkeys(nodes))
    first = {name: nodes.index(name) for name in names}
    message = torch.ones(MESSAGE[device.type] * 2**18, device=device)
    for pairs in rounds(names):
        groups = [dist.new_group([first[a], first[b]]) for a, b in pairs]
        own = 0.0
        for (a, b), group in zip(pairs, groups, strict=True):
            if dist.get_rank() in (first[a], first[b]):
                seconds = _seconds(lambda group=group: dist.all_reduce(message, group=group), device)
                own = MESSAGE[device.type] / seconds
        every: list[float] = [0.0] * len(nodes)
        dist.all_gather_object(every, own)
        for a, b in pairs:
            yield (a, b), every[first[a]]


def rounds(names: list[str]) -> Iterator[list[tuple[str, str]]]:
    """Every pair once, in rounds in which nobody is in two pairs (a round-robin tournament)."""
    places: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(a, b) for a, b in pairs if a is not None and b is not None]
        places[1:] = [places[-1], *places[1:-1]]


def _matmul(device: torch.device) -> float:
    side = SIDE.get(device.type, 1024)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / _seconds(lambda: matrix @ matrix, device) / 1e12


def _disk(folder: Path) -> float:
    path = folder / f"{TEMPORARY}check-{os.getpid()}"
    path.write_bytes(os.urandom(2**20) * FILE)
    try:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
            began = time.perf_counter()
            while file.read(2**22):
                pass
            return FILE / (time.perf_counter() - began)
    finally:
        path.unlink()


def _seconds(work: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """The best of a few runs after a first one."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])


def _write(folder: Path, rates: Rates, slow: dict[str, str]) -> None:
    from slurm.ending import this_job

    job = this_job() if "SLURM_JOB_ID" in os.environ else "local"
    write_json(folder / f"{job}.check.json", {"rates": rates, "slow": slow})
    for node, why in slow.items():
        print(f"dinov2 submit: {node} is slow: {why}", file=sys.stderr)
    if slow and "SLURM_JOB_ID" in os.environ:
        write_json(folder / f"{job}.slow.json", {"nodes": sorted(slow)})


if __name__ == "__main__":
    try:
        sys.exit(check(Path(sys.argv[1]), float(sys.argv[2])))
    except Stop as stop:
        print(f"dinov2 submit: {stop}", file=sys.stderr)
        sys.exit(stop.status)
