"""Run a function on several gloo ranks, each a real process, and give back what each returned."""

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`[function(*args) on rank 0, on rank 1, …]`; `function` must be importable (a module-level one)."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (count, _free_port(), folder, function, args), nprocs=count, join=True)  # pyright: ignore[reportPrivateImportUsage]  # documented, but not in __all__
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(count)]


def _work(rank: int, count: int, port: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_RANK=str(rank),
    )
    dist.init_process_group("gloo")
    try:
        Path(folder, str(rank)).write_bytes(pickle.dumps(function(*args)))
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
