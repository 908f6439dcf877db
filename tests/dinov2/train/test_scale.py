"""What a process holds and receives in a step, against the model behind the tables of docs/clusters.md."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2.exits import UserError
from dinov2.optim import clip_gradients
from dinov2.parallel import own
from dinov2.train.feed import training_source
from dinov2.train.state import fresh_state
from tests.benchmarks.cluster_plan import weights_of
from tests.dinov2.train.test_objective import CPU, _config, _objective, _views
from tests.pictures import class_folder
from tests.ranks import on_ranks

SMALL = 4096  # numbers: less is a norm, a decision, a centre, and left out


class Received(TorchDispatchMode):
    """Bytes that a step's large collectives bring to this process."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies, self.within, self.between = copies, 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        match func._schema.name:
            case "c10d::_allgather_base_" | "c10d::_reduce_scatter_base_":
                self.within += abs(_bytes(args[0]) - _bytes(args[1]))
            case "c10d::allreduce_" if args[0][0].numel() > SMALL:
                self.between += 2 * _bytes(args[0][0]) * (self.copies - 1) / self.copies
        return func(*args, **(kwargs or {}))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _a_step(*words: str) -> dict[str, float]:
    config = _config("model.registers=4", *words)
    state = fresh_state(config, "", CPU)
    narrow = torch.autocast("cpu", torch.bfloat16) if config.precision == "bf16" else nullcontext()
    with Received(config.sharding.copies) as received:
        with narrow:
            loss = _objective(config, state, _views(4)).total(config.losses.weights())
        loss.backward()
    (norm, *_) = clip_gradients(state.student.parts(), 3.0)
    state.optimizer.step()
    student = list(state.student.parameters())
    moments = [own(value) for entry in state.optimizer.state.values() for value in entry.values()]
    held = [*student, *state.teacher.parameters(), *(p.grad for p in student if p.grad is not None)]
    state_bytes = sum(_bytes(own(tensor)) for tensor in held) + sum(map(_bytes, moments))
    found = {"state": state_bytes, "within": received.within, "between": received.between}
    return found | {"loss": float(loss.detach()), "norm": float(norm)}


CASES = {
    1: [[]],
    2: [[], ["precision=bf16"], ["precision=bf16", "sharding.gather=bf16"]],
    4: [[], ["sharding.copies=2"], ["precision=bf16", "sharding.copies=2", "sharding.gather=bf16"]],
}


def _steps(ranks: int) -> list[dict[str, float]]:
    return [_a_step(*words) for words in CASES[ranks]]


def test_bytes_held_and_received_are_those_of_the_model_and_numbers_those_of_one_copy():
    found = {ranks: _steps(1) if ranks == 1 else on_ranks(ranks, _steps, ranks)[-1] for ranks in CASES}
    for ranks, steps in found.items():
        for words, step in zip(CASES[ranks], steps, strict=True):
            sharding = _config(*words).sharding
            weights = weights_of(_config("model.registers=4"))
            told = {
                "state": weights.state(ranks, sharding.copies),
                "within": weights.within(ranks, sharding.copies, sharding.gather),
                "between": weights.between(ranks, sharding.copies),
            }
            for name, size in told.items():
                # positions, CLS and mask token are single rows, padded to one for each process
                assert step[name] == pytest.approx(size, rel=0.03), (ranks, words, name)
    (flat, copied, _), (_, exact, rounded) = found[4], found[2]
    assert copied["loss"] == pytest.approx(flat["loss"]) and copied["norm"] == pytest.approx(flat["norm"])
    assert rounded["within"] < 0.75 * exact["within"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=2e-3)
    assert rounded["norm"] == pytest.approx(exact["norm"], rel=0.02)


def test_copies_that_do_not_fit_are_refused(tmp_path: Path):
    class_folder(tmp_path / "pictures", classes=2, each=4)
    words = f"data={tmp_path / 'pictures'}", "sharding.copies=3"
    with pytest.raises(UserError, match=r"sharding\.copies=3 does not divide 1 processes"):
        training_source(_config(*words))
