"""A larger network in the moving teacher's place: the frozen teacher of a finished run, with its heads.

DINOv2 (arXiv 2304.07193), sec. 5: the loop is that of training, but nothing is masked, the patch loss looks
at every patch of both global crops, and the average of the student, which teaches nobody, is the result.
"""

from pathlib import Path

import torch

from dinov2.checkpoint import Checkpoints
from dinov2.config import read
from dinov2.exits import UserError
from dinov2.ssl.networks import Branch, make_branch
from dinov2.train.config import TrainConfig


def frozen_teacher(config: TrainConfig, device: torch.device) -> Branch:
    """The teacher of the run `config.distill` at its last checkpoint, split over the ranks. All call it.

    Raises:
        UserError: there is no run with heads, or its targets do not fit the student.
    """
    run = Path(config.distill)
    if not (run / "checkpoints").is_dir():
        raise UserError(
            f"distill={run} is no run: give the folder of a run with its checkpoints/, for a backbone alone "
            "has no heads, and with fresh ones it has nothing to teach"
        )
    checkpoints = Checkpoints(run / "checkpoints")
    if not checkpoints.steps():
        raise UserError(f"distill={run} has no checkpoint yet; wait for its first")
    theirs = read(TrainConfig, [str(run / "config.yaml")], recipes="train")
    if theirs.contrasts:
        raise UserError(f"distill={run} has no prototypes: it was trained by method=contrastive")
    _check_alike(config, theirs)
    network = theirs.model.network(theirs.augment.global_size).still()
    branch = make_branch(network, theirs.heads, 0, device, config.sharding).requires_grad_(False)
    checkpoints.load(checkpoints.steps()[-1], {"teacher": branch.state_dict()})
    return branch


def _check_alike(config: TrainConfig, theirs: TrainConfig) -> None:
    there, here = _fits(theirs, config), _fits(config, config)
    differing = [f"{key}={here[key]}, there {there[key]}" for key in here if here[key] != there[key]]
    if differing:
        raise UserError(f"distill={config.distill} has other targets: {'; '.join(differing)}; set the same")


def _fits(config: TrainConfig, student: TrainConfig) -> dict[str, object]:
    """What must be the same for both networks; of patches only where the student has a patch loss."""
    same: dict[str, object] = {
        "heads.dino.prototypes": config.heads.dino.prototypes,
        "augment.mean": list(config.augment.mean),
        "augment.std": list(config.augment.std),
    }
    if student.losses.ibot:
        patches = config.heads.ibot if config.heads.separate else config.heads.dino
        same |= {"model.patch": config.model.patch, "prototypes of patches": patches.prototypes}
    return same
