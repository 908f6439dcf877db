"""Batches: the same bits for any workers, ranks and start; unreadable pictures; workers that end."""

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2.data.augment import AugmentConfig, MultiCrop
from dinov2.data.decode import decode
from dinov2.data.loader import Batch, batches
from dinov2.data.order import Order, derive_seed
from dinov2.data.sources import Source, open_source
from dinov2.exits import UserError
from tests.pictures import class_folder

CROP = MultiCrop(AugmentConfig(global_size=32, local_size=16, local_crops=3))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = tmp_path_factory.mktemp("pool")
    class_folder(root / "pictures", classes=3, each=7, size=(48, 40))
    return open_source(str(root / "pictures"), cache=root / "cache")


def stream(source: Source, **changes: Any) -> Generator[Batch, None, None]:
    settings = {"seed": 1, "global_batch": 4, **changes}
    return batches(source, Order(len(source), seed=0), CROP, **settings)


def bits(batch: Batch) -> tuple:
    tensors = (batch.global_crops, batch.local_crops, batch.positions, batch.rows)
    return *((tuple(each.shape), each.numpy().tobytes()) for each in tensors), tuple(batch.replaced)


def test_a_batch_holds_the_crops_of_its_positions_crop_by_crop(source: Source):
    order = Order(len(source), seed=0)
    batch = next(islice(stream(source), 2, None))
    assert batch.positions.tolist() == [8, 9, 10, 11]
    assert batch.rows.tolist() == [order.sample(position) for position in batch.positions.tolist()]
    assert batch.replaced == []
    global_crops, local_crops = (
        batch.global_crops.unflatten(0, (2, 4)),
        batch.local_crops.unflatten(0, (3, 4)),
    )
    for place, position in enumerate(batch.positions.tolist()):
        image = decode(source.read(order.sample(position)))
        wanted = CROP(image, derive_seed("augment", 1, position))
        assert torch.equal(global_crops[:, place], wanted[0])
        assert torch.equal(local_crops[:, place], wanted[1])


def test_workers_and_start_change_no_bit_and_no_global_random_state(source: Source):
    states = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    here = [bits(batch) for batch in islice(stream(source), 9)]
    for workers in (1, 2):
        with closing(stream(source, workers=workers)) as batch_stream:
            assert [bits(batch) for batch in islice(batch_stream, 9)] == here
    assert [bits(batch) for batch in stream(source, start_step=6, stop_step=9, workers=2)] == here[6:]
    assert [bits(batch) for batch in stream(source, start_step=5, stop_step=7)] == here[5:7]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), torch.get_num_threads()) == states[1:]


def test_ranks_share_the_batch_in_order(source: Source):
    whole = next(islice(stream(source), 3, None))
    parts = [next(islice(stream(source, rank=rank, world=2), 3, None)) for rank in range(2)]
    assert torch.cat([part.rows for part in parts]).tolist() == whole.rows.tolist()
    views = torch.cat([part.global_crops.unflatten(0, (2, 2)) for part in parts], dim=1).flatten(0, 1)
    assert torch.equal(views, whole.global_crops)
    with pytest.raises(UserError, match="shared equally by 3"):
        stream(source, world=3)


def test_what_workers_get_can_be_pickled(source: Source):
    # where processes are spawned and not forked, all of this travels
    parts = pickle.loads(pickle.dumps((source, Order(len(source), seed=0), CROP)))
    assert bits(next(batches(*parts, seed=1, global_batch=4))) == bits(next(stream(source)))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_replaced_and_named(tmp_path: Path, workers: int):
    paths = class_folder(tmp_path / "pool", classes=2, each=6, size=(48, 40))
    for path in paths[::3]:
        path.write_bytes(path.read_bytes()[:50])
    damaged = open_source(str(tmp_path / "pool"), cache=tmp_path / "cache")
    broken = {row for row in range(12) if damaged.table["uri"][row].as_py() in relative(paths[::3], tmp_path)}
    order = Order(12, seed=0)
    seen = list(batches(damaged, order, CROP, seed=1, global_batch=4, stop_step=6, workers=workers))
    for batch in seen:
        wanted = [order.sample(position) for position in batch.positions.tolist()]
        assert not broken & set(batch.rows.tolist())
        for position, row, original in zip(
            batch.positions.tolist(), batch.rows.tolist(), wanted, strict=True
        ):
            assert (row == original) == (original not in broken)
            if original in broken:
                tried = (order.replacement(position, attempt) for attempt in range(12))
                assert row == next(other for other in tried if other not in broken)
    named = [name for batch in seen for name, _ in batch.replaced]
    assert set(named) == {damaged.ids[row] for row in broken}
    assert all(reason for batch in seen for _, reason in batch.replaced)


def relative(paths: list[Path], root: Path) -> set[str]:
    return {path.relative_to(root / "pool").as_posix() for path in paths}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_cannot_be_read_at_all_is_an_error_of_one_line(tmp_path: Path, workers: int):
    for path in class_folder(tmp_path / "pool", classes=1, each=5, size=(24, 20)):
        path.write_bytes(b"not a picture")
    broken = open_source(str(tmp_path / "pool"), cache=tmp_path / "cache")
    with pytest.raises(UserError, match="pictures in a row could not be read") as error:
        next(batches(broken, Order(5, seed=0), CROP, seed=0, global_batch=2, workers=workers))
    assert multiprocessing.active_children() == []
    assert "\n" not in str(error.value)
    assert "pool" in str(error.value)


def test_a_killed_worker_is_said_to_be_one(source: Source):
    handler = signal.getsignal(signal.SIGCHLD)
    with closing(stream(source, workers=2)) as batch_stream:
        next(batch_stream)
        assert signal.getsignal(signal.SIGCHLD) == handler  # nothing is raised but by next()
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        os.kill(workers[0].pid or 0, signal.SIGKILL)
        with pytest.raises(UserError, match=r"ended by signal 9; .* fewer workers="):
            for _ in range(50):
                next(batch_stream)


def test_signals_meant_for_the_run_do_not_end_workers(source: Source):
    with closing(stream(source, workers=1)) as batch_stream:
        next(batch_stream)
        worker = multiprocessing.active_children()[0]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(worker.pid or 0, number)
        assert len([*islice(batch_stream, 8)]) == 8  # more than were ready before


def test_workers_end_when_the_iterator_is_dropped(source: Source):
    batch_stream = stream(source, workers=2)
    next(batch_stream)
    assert len(multiprocessing.active_children()) == 2
    began = time.monotonic()
    del batch_stream
    assert multiprocessing.active_children() == []
    assert time.monotonic() - began < 5


RUN = """
import sys, multiprocessing
from dinov2.data.augment import AugmentConfig, MultiCrop
from dinov2.data.loader import batches
from dinov2.data.order import Order
from dinov2.data.sources import open_source

source = open_source(sys.argv[1], cache=sys.argv[2])
crop = MultiCrop(AugmentConfig(global_size=32, local_size=16, local_crops=1))
stream = batches(source, Order(len(source), 0), crop, seed=0, global_batch=2, workers=2)
next(stream)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
if sys.stdin.readline() == "fail\\n":
    raise KeyError("a bug")
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a worker looks for its parent every few seconds"
)
def test_workers_end_with_the_run_however_it_ends(tmp_path: Path):
    class_folder(tmp_path / "pool", classes=1, each=4, size=(24, 20))
    command = [sys.executable, "-c", RUN, str(tmp_path / "pool"), str(tmp_path / "cache")]
    killed, failed = (
        subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for _ in range(2)
    )
    with killed, failed:
        workers = [int(pid) for run in (killed, failed) for pid in run.stdout.readline().split()]  # pyright: ignore[reportOptionalMemberAccess]  # pipes
        assert len(workers) == 4
        killed.kill()
        failed.communicate("fail\n", timeout=100)
    assert (killed.returncode, failed.returncode) == (-signal.SIGKILL, 1)
    assert within(2.0, lambda: not any(map(alive, workers)))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def within(seconds: float, true: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()
