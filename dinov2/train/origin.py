"""What a run begins from, where not from the seed alone: `init=` another run, or a backbone.

Of a run its last checkpoint's student, teacher, heads and centres are taken over; the optimiser and all
schedules begin anew. Of a backbone, anybody's, student and teacher get the weights, and the heads are fresh.
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from dinov2.checkpoint import Checkpoints
from dinov2.exits import UserError
from dinov2.files import read_json
from dinov2.models import load_backbone
from dinov2.models.backbone import Backbone
from dinov2.models.positions import resized_positions
from dinov2.ssl.networks import Branch
from dinov2.train.config import TrainConfig
from dinov2.train.state import State

FREE = {"image_size", "drop_path", "layer_scale"}  # of an architecture: what other weights may be used with
POSITIONS = "backbone.pos_embed"
ORIGIN = "origin.json"  # in the run folder


def begin(config: TrainConfig, state: State) -> dict[str, Any]:
    """Put the weights that `config.init` names into a fresh state. All ranks call it.

    Returns:
        What it was, for `origin.json`.

    Raises:
        UserError: there is nothing there, or it is of another architecture.
    """
    run = Path(config.init)
    if (run / "checkpoints").is_dir():
        return _from_run(config, state, run)
    return _from_backbone(config, state, load_backbone(config.init))


def _from_run(config: TrainConfig, state: State, run: Path) -> dict[str, Any]:
    checkpoints = Checkpoints(run / "checkpoints")
    if not checkpoints.steps():
        raise UserError(f"init={run} has no checkpoint yet; wait for its first, or name a backbone folder")
    step = checkpoints.steps()[-1]
    shapes = checkpoints.shapes(step)
    branches = {"student": state.student, "teacher": state.teacher}
    tree = {name: _receiving(branch, _under(name, shapes), config.init) for name, branch in branches.items()}
    checkpoints.load(step, tree | {"centers": state.centers})
    for name, branch in branches.items():
        given = tree[name].get(POSITIONS)
        if given is not None and given.shape != branch.get_parameter(POSITIONS).shape:
            _put(branch, {POSITIONS: given})
    settings = yaml.safe_load((run / "config.yaml").read_text())
    return {"kind": "run", "init": config.init, "step": step, "settings": settings} | {
        "versions": read_json(run / "versions.json")
    }


def _under(name: str, shapes: dict[str, torch.Size]) -> dict[str, torch.Size]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _receiving(branch: Branch, shapes: dict[str, torch.Size], where: str) -> dict[str, Tensor]:
    """Tensors to load into: the network's own, but for positions of another grid."""
    own = branch.state_dict()
    wrong = [key for key in {**own, **shapes} if key not in own or shapes.get(key) != own[key].shape]
    if wrong and wrong != [POSITIONS]:
        named = ", ".join(f"{key} {list(shapes.get(key, []))}" for key in wrong[:3])
        raise UserError(f"init={where} has another model= or other heads=: {named}, …")
    return {
        key: x if shapes[key] == x.shape else torch.empty(shapes[key], device=x.device)
        for key, x in own.items()
    }


def _from_backbone(config: TrainConfig, state: State, backbone: Backbone) -> dict[str, Any]:
    _check_alike(config.init, backbone, state.teacher.backbone)  # which, like it, draws nothing
    weights = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    for branch in (state.student, state.teacher):
        _put(branch, weights)
    return {"kind": "backbone", "init": config.init, "weights": backbone.weights_hash()}


def _check_alike(where: str, theirs: Backbone, own: Backbone) -> None:
    there, here = theirs.architecture(), own.architecture()
    differing = [key for key in here if key not in FREE and there.get(key) != here[key]]
    if bool(there.get("layer_scale")) != bool(here.get("layer_scale")):
        differing.append("layer_scale")
    if differing:
        named = ", ".join(f"{key} ({there.get(key, 'none')} there, {here[key]} here)" for key in differing)
        raise UserError(f"init={where} is another network than model= describes: {named}")
    if not torch.allclose(torch.tensor(theirs.normalisation), torch.tensor(own.normalisation), atol=1e-3):
        mean, std = (list(values) for values in theirs.normalisation)
        raise UserError(
            f"init={where} knows pixels of another scale; set augment.mean={mean} augment.std={std}"
        )


def _put(branch: Branch, weights: dict[str, Tensor]) -> None:
    """Whole tensors into a network of which each rank may hold a shard; positions resized to its grid."""
    if POSITIONS in weights:
        own = branch.get_parameter(POSITIONS)
        side = round((own.shape[1] - 1) ** 0.5)
        convention = branch.backbone.architecture()["position"]
        weights = weights | {POSITIONS: _resized(weights[POSITIONS].to(own.device), side, convention)}
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(branch, {**weights}, options=options)


def _resized(positions: Tensor, side: int, convention: str) -> Tensor:
    patches = resized_positions(positions[:, 1:], (side, side), convention)
    return torch.cat([positions[:, :1], patches], dim=1)
