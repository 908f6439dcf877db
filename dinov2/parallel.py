"""Many processes as one: what spans ranks goes through these few functions.

On one process each is the identity and needs no process group. None changes its argument.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dinov2.exits import UserError

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def all_sum(value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Sum over ranks; no gradient."""
    return _reduced(value, dist.ReduceOp.SUM)


def all_max(value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Elementwise maximum over ranks; no gradient."""
    return _reduced(value, dist.ReduceOp.MAX)


def all_gather(rows: Float[Tensor, "batch dim"], group: int = 0) -> Float[Tensor, "ranks*batch dim"]:
    """The rows of all ranks in rank order, equally many on each; gradients reach the rank that owns a row.

    Args:
        group: of this many neighbouring ranks only, a divisor of their number; 0 for all. All ranks call it.
    """
    return rows if world() == 1 else _Gather.apply(rows, group or world())


def all_gather_objects(value: T) -> list[T]:
    """Any small value of each rank, in rank order. It is pickled: not for every step."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Any small value of the first rank, on every rank. It is pickled: not for every step."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: T) -> list[T]:
    """Any value of each rank, in rank order, on the first rank; nothing on the others."""
    if world() == 1:
        return [value]
    values: list[Any] | None = [None] * world() if is_main() else None
    dist.gather_object(value, values, dst=0)
    return values or []


def barrier() -> None:
    if world() > 1:
        dist.barrier()


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How the weights of a network are split over processes."""

    copies: int = 1  # 1: over all; n: n times, each over neighbours, such as those of a node
    gather: str = "fp32"  # or bf16: half the traffic of blocks, rounding their norms and LayerScale too


ONE_COPY = ShardingConfig()


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    device: torch.device,
    prepare: Callable[[nn.Module], None],
    config: ShardingConfig = ONE_COPY,
) -> None:
    """Split parameters, gradients and optimiser state over the ranks (FSDP2): each block, and what is left.

    `module` must be entered by calling it. Always reshards after the forward, so that between steps every
    parameter is a shard in its own type, the teacher's too, whose forward no backward follows.

    Args:
        prepare: brings a part to `device` just before it is split, so that no rank holds more than one part
            whole. It meets what was split before as well, and leaves that alone.
    """
    narrow = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for part in (*blocks, module):
        prepare(part)
        if world() > 1:
            policy = narrow if config.gather == "bf16" and part is not module else MixedPrecisionPolicy()
            mesh = _mesh(device.type, config.copies)
            fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


@cache
def _mesh(kind: str, copies: int) -> DeviceMesh:
    """Ranks as a line, or as copies x shards; made once, by all ranks."""
    if copies == 1:
        return init_device_mesh(kind, (world(),))
    return init_device_mesh(kind, (copies, world() // copies), mesh_dim_names=("copies", "shards"))


def copies_of(value: Tensor) -> int:
    """On how many ranks each number of a tensor lies."""
    if not isinstance(value, DTensor):
        return world()
    sizes = zip(value.device_mesh.shape, value.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def whole(value: Tensor) -> Tensor:
    """All of a tensor of which each rank may hold a shard, or a part of a sum. All ranks call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own(value: Tensor) -> Tensor:
    """This rank's shard of a tensor, or all of it where nothing is sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def pick_device(name: str) -> torch.device:
    """`auto` (this rank's GPU, else MPS, else CPU) or a torch device's name.

    Raises:
        UserError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device(
                "cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(torch.cuda.device_count(), 1)
            )
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


@contextmanager
def process_group(device: torch.device, *, minutes: float = 10.0) -> Iterator[None]:
    """Join the ranks that torchrun or SLURM started (`RANK`, `WORLD_SIZE`, … in the environment), if any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=minutes)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _reduced(value: Tensor, operation: "dist.ReduceOp.RedOpType") -> Tensor:
    if world() == 1:
        return value
    result = value.detach().clone()
    dist.all_reduce(result, operation)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, size: int) -> Tensor:
        ctx.size = size
        gathered = rows.new_empty(size * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=_group(size))
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # of two inputs
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=_group(ctx.size))
        return total.chunk(ctx.size)[rank() % ctx.size], None


@cache
def _group(size: int) -> dist.ProcessGroup | None:
    """The group of `size` neighbouring ranks that this one is in; made once, by all ranks."""
    if size == world():
        return None
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world(), size)]
    own_group = groups[rank() // size]
    assert isinstance(own_group, dist.ProcessGroup)  # a number stands for a group that a rank is not in
    return own_group
