"""A tiny teacher distilled into a tinier student through the command, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dinov2.config import read
from dinov2.data.sources import open_source
from dinov2.exits import UserError
from dinov2.models import load_backbone
from dinov2.optim import Schedules
from dinov2.ssl.objective import Views, objective
from dinov2.train.__main__ import main
from dinov2.train.config import TrainConfig
from dinov2.train.distill import frozen_teacher
from dinov2.train.feed import feed
from dinov2.train.state import fresh_state
from tests.pictures import class_folder

CPU = torch.device("cpu")
SETTINGS = """batch=4 steps=3 model.size=vit_tiny model.depth=2 model.patch=8 model.drop_path=0
    heads.separate=true
    heads.dino.hidden=16 heads.dino.bottleneck=8 heads.dino.prototypes=32 heads.ibot.hidden=16
    heads.ibot.bottleneck=8 heads.ibot.prototypes=24 augment.global_size=32 augment.local_size=16
    augment.local_crops=2 tensorboard=false workers=0 device=cpu optim.warmup=0 precision=fp32""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two blocks that has ended."""
    root = tmp_path_factory.mktemp("distill")
    class_folder(root / "train", classes=2, each=4)
    main([*SETTINGS, f"data={root / 'train'}", f"output={root / 'large'}"])
    return root / "large"


def words(large: Path, name: str, *more: str) -> list[str]:
    student = ["model.depth=1", "model.registers=1", f"distill={large}"]
    return [*SETTINGS, f"data={large.parent / 'train'}", f"output={large.parent / name}", *student, *more]


def test_a_frozen_teacher_teaches_a_smaller_student(large: Path):
    main(words(large, "small"))
    line = json.loads((large.parent / "small" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 3 and line["loss.ibot"] > 0 and line["loss.dino"] > 0
    backbone = load_backbone(large.parent / "small" / "backbone")
    assert backbone.n_blocks == 1 and backbone.architecture()["registers"] == 1
    assert "distilled from" in (large.parent / "small" / "backbone" / "README.md").read_text()

    config = read(TrainConfig, words(large, "small"))
    state = fresh_state(config, "", CPU)
    taught = load_backbone(large / "backbone").state_dict()
    guide = state.guide.backbone.state_dict()  # the large run's teacher, as it was exported
    assert taught.keys() == guide.keys() and all(torch.equal(taught[key], guide[key]) for key in taught)
    start = load_backbone(large.parent / "small" / "backbone").state_dict()
    fresh = state.teacher.backbone.state_dict()  # an average of the student's way from here
    assert not all(torch.equal(start[key], fresh[key]) for key in fresh)


def test_nothing_is_hidden_and_the_patch_loss_looks_everywhere(large: Path):
    config = read(TrainConfig, words(large, "views"))
    views, _ = next(feed(config, open_source(config.data), CPU, lambda step: step, first=0, last=1))
    assert views.masks is not None and views.masks.shape == (8, 16) and views.masks.all()
    assert not views.hidden and all(not part.hidden for part in views.parts(2))
    state, schedules = (
        fresh_state(config, "", CPU),
        Schedules(optim=config.optim, teacher=config.teacher, steps=3, batch=4, pictures=8),
    )

    def losses(views: Views) -> dict[str, torch.Tensor]:
        chosen = {"losses": config.losses, "targets": config.teacher}
        return objective(state.student, state.guide, views, schedules.at(0), state.centers, **chosen).losses

    seen, hidden = losses(views), losses(replace(views, hidden=True))
    with torch.no_grad():
        # a constant would vanish in the normalisation
        state.student.backbone.get_parameter("mask_token").normal_()
    assert torch.equal(losses(views)["ibot"], seen["ibot"])  # the mask token is nowhere
    assert not torch.equal(losses(replace(views, hidden=True))["ibot"], hidden["ibot"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["heads.dino.prototypes=31"], "heads.dino.prototypes=31, there 32"),
        (["heads.separate=false"], "prototypes of patches=32, there 24"),
        (["model.patch=16"], "model.patch=16, there 8"),
        (["augment.mean=[0.5,0.5,0.5]"], "augment.mean"),
    ],
)
def test_targets_that_do_not_fit_are_refused(large: Path, more: list[str], message: str):
    with pytest.raises(UserError, match=message):
        frozen_teacher(read(TrainConfig, words(large, "other", *more)), CPU)


def test_a_backbone_alone_has_nothing_to_teach(large: Path):
    with pytest.raises(UserError, match="has no heads"):
        frozen_teacher(read(TrainConfig, [*words(large, "x"), f"distill={large / 'backbone'}"]), CPU)
