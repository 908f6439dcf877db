"""Several ranks as one: the first carries a task out and deals out what can be split, the others serve it.

So a task knows nothing of ranks, and its result is that of one process: what each rank computes is a piece
that does not depend on how many there are.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dinov2.exits import Stop
from dinov2.parallel import broadcast_object, gather_objects, is_main, rank, world

if TYPE_CHECKING:
    from evals.bench import Bench

MINUTES = 60.0 * 24 * 30  # that the others wait for the first: training a head on it may take long


def dealt(bench: "Bench", function: Callable[..., Any], items: Sequence[Any], *common: Any) -> Iterator[Any]:
    """`function(bench, item, *common)` for each item, in order; each rank does every n-th of them.

    On the first rank alone, the others being in `serve`. All is pickled, so the function lies in a module.
    Where it gives an iterator, its values come as a list; of one process it stays as it is.
    """
    for start in range(0, len(items), world()):
        group = items[start : start + world()]
        if world() == 1:
            yield function(bench, group[0], *common)
        else:
            broadcast_object(("do", function, group, common))
            yield from _done(bench, function, group, common)


def serve(bench: "Bench") -> Any:
    """On every rank but the first: do what is dealt out; returns what `dismiss` was given."""
    while True:
        match broadcast_object(None):
            case ("do", function, group, common):
                _done(bench, function, group, common)
            case (_, answer):
                return answer


def dismiss(answer: Any) -> None:
    """On the first rank: let the others go."""
    broadcast_object(("end", answer))


def _done(bench: "Bench", function: Callable[..., Any], group: Sequence[Any], common: tuple) -> list[Any]:
    """What every rank made of its item, on the first one; what failed on any is raised there."""
    mine: Any = None
    if rank() < len(group):
        try:
            mine = function(bench, group[rank()], *common)
            mine = list(mine) if isinstance(mine, Iterator) else mine
        except Stop as error:
            mine = error
        except Exception:  # it may not be possible to pickle it
            mine = RuntimeError(f"rank {rank()}: {traceback.format_exc()}")
    found = gather_objects(mine)[: len(group)]
    if is_main():
        for one in found:
            if isinstance(one, Stop | RuntimeError):
                raise one
    return found
