"""The state of a run: what a checkpoint holds, and nothing that can be derived from the step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from dinov2.checkpoint import Checkpoints
from dinov2.exits import UserError
from dinov2.models.backbone import Backbone
from dinov2.models.linear import use_onednn
from dinov2.models.recompute import checkpoint_layers, compile_layers
from dinov2.optim import make_optimizer
from dinov2.parallel import all_max
from dinov2.ssl.anchor import make_anchor
from dinov2.ssl.networks import Branch, freeze_patch_loss, make_branches
from dinov2.ssl.objective import first_centers
from dinov2.train.config import TrainConfig
from dinov2.train.distill import frozen_teacher


@dataclass
class State:
    """Student, teacher, optimiser, centres, and where the run is."""

    student: Branch
    teacher: Branch
    optimizer: torch.optim.Optimizer
    centers: dict[str, Tensor]
    data: str  # fingerprint of the source
    frozen: Branch | None = None  # a larger teacher in the place of the moving one, which is kept as result
    anchor: Backbone | None = None  # an earlier teacher, for losses.gram
    step: int = 0  # steps done, skipped ones too
    skipped: int = 0  # steps that were not finite
    skipped_in_a_row: int = 0

    @property
    def guide(self) -> Branch:
        """Whose targets the student learns from."""
        return self.teacher if self.frozen is None else self.frozen


def fresh_state(config: TrainConfig, data: str, device: torch.device) -> State:
    """The state before the first step, from the seed alone."""
    network = config.network()
    heads = None if config.contrasts else config.heads
    student, teacher = make_branches(network, heads, config.seed, device, config.sharding)
    if "ibot" not in config.weights():
        freeze_patch_loss(student)
    for branch in (student, teacher):
        branch.backbone.normalisation = tuple(config.augment.mean), tuple(config.augment.std)
        branch.backbone.value_range = tuple(config.augment.value_range)
        branch.trims = config.trims()
    checkpoint_layers(student.backbone.layers(), _computed_again(config, student, device))
    frozen = frozen_teacher(config, device) if config.distill else None
    anchor = make_anchor(network, device, config.sharding) if "gram" in config.weights() else None
    if config.onednn and not config.compile and device.type == "cpu":
        for each in (student, teacher, frozen, anchor):
            if each is not None:
                use_onednn(each)
    if config.compile:
        for branch in (student, teacher):
            compile_layers(branch.backbone.layers())
    return State(
        student=student,
        teacher=teacher,
        optimizer=make_optimizer(student, config.optim),
        centers={} if config.contrasts else first_centers(student, device),
        data=data,
        frozen=frozen,
        anchor=anchor,
    )


def _computed_again(config: TrainConfig, student: Branch, device: torch.device) -> str:
    """What `model.checkpointing=auto` stands for."""
    how = config.model.checkpointing
    if how != "auto":
        return how
    if config.compile or not student.backbone.layers():  # a compiler itself knows what is cheap to have again
        return "none"
    # beside products in float32 on a CPU, computing all but these again takes no time to speak of
    return "selective" if device.type == "cpu" and config.precision == "fp32" else "light"


def save(state: State, checkpoints: Checkpoints) -> bool:
    """Save the state, unless it holds a number that is not finite: no such checkpoint is ever written.

    Returns:
        Whether all ranks found their part finite, and it was saved.
    """
    tree = _tree(state)
    if not _finite(tree):
        return False
    checkpoints.save(state.step, tree)
    return True


def resume(state: State, checkpoints: Checkpoints) -> State:
    """Take up the latest checkpoint, if there is one.

    Raises:
        UserError: the pictures are not those that the checkpoint was trained on.
    """
    steps = checkpoints.steps()
    if not steps:
        return state
    tree = checkpoints.load(steps[-1], _tree(state))
    if tree["data"] != state.data:
        raise UserError(
            "data= has changed since this run began (pictures added, removed or renamed); "
            "start another output folder, or bring the pictures back"
        )
    set_state_dict(
        state.student,
        state.optimizer,
        model_state_dict=tree["student"],
        optim_state_dict=tree["optimizer"],
    )
    state.teacher.load_state_dict(tree["teacher"])
    if state.anchor is not None:
        state.anchor.load_state_dict(tree["anchor"])
    state.centers = tree["centers"]
    state.step, state.skipped, state.skipped_in_a_row = (tree[name] for name in COUNTS)
    return state


def _finite(tree: dict[str, Any]) -> bool:
    """Whether every weight, centre and moment of the optimiser is finite on every rank."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    bad = [~torch.isfinite(tensor).all() for tensor in local if tensor.numel()]
    device = next(tensor.device for tensor in local)
    return not all_max(torch.stack([flag.to(device) for flag in bad]).any().float()).item()


COUNTS = ("step", "skipped", "skipped_in_a_row")


def _tree(state: State) -> dict[str, Any]:
    student, optimizer = get_state_dict(state.student, state.optimizer)
    counts = {name: getattr(state, name) for name in COUNTS}
    anchor = {} if state.anchor is None else {"anchor": state.anchor.state_dict()}
    return (
        counts
        | anchor
        | {
            "student": student,
            "teacher": state.teacher.state_dict(),
            "optimizer": optimizer,
            "centers": state.centers,
            "data": state.data,
        }
    )
