"""Gram anchoring in a run: what the anchor sees, when it is taken, and that checkpoints hold it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinov2.checkpoint import Checkpoints
from dinov2.config import read
from dinov2.data.augment import AugmentConfig, MultiCrop
from dinov2.exits import UserError
from dinov2.losses.gram import downsampled, gram
from dinov2.ssl.anchor import GramConfig, anchor_patches, make_anchor, take
from dinov2.train.__main__ import main
from dinov2.train.config import TrainConfig
from dinov2.train.loop import checkpoints_of
from dinov2.train.state import State, fresh_state, resume
from tests.pictures import class_folder, picture

CPU = torch.device("cpu")
SETTINGS = """batch=4 model.size=vit_tiny model.depth=1 model.patch=8 model.position=rope model.drop_path=0
    heads.dino.hidden=16 heads.dino.bottleneck=8 heads.dino.prototypes=32 augment.global_size=32
    augment.local_size=16 augment.local_crops=2 augment.gram_size=64 losses.gram=2 gram.start=0.5 gram.every=2
    gram.refreshes=1 model.local_norm=true heads.dino.weight_norm=false tensorboard=false workers=0 device=cpu
    optim.warmup=0 precision=fp32 checkpoint.every=1 checkpoint.keep=99""".split()  # noqa: SIM905


def test_the_schedule_of_weight_and_anchor():
    config = GramConfig(start=0.5, warmup=0.1, every=10, refreshes=3)
    assert [step for step in range(100) if config.due(step, 100)] == [50, 60, 70, 80]
    shares = [config.share(step, 100) for step in (0, 49, 50, 54, 59, 99)]
    assert shares == pytest.approx([0, 0, 0.1, 0.5, 1, 1])
    assert GramConfig().share(0, 7) == 1 and GramConfig().due(0, 7)


def test_the_anchor_sees_the_same_boxes_larger_and_with_colours_as_they_are():
    plain = AugmentConfig(global_size=48, local_crops=0, gram_size=48, jitter_p=0, grey_p=0, solarise_p=0)
    crops = MultiCrop(plain)
    image: Image.Image = picture(0, 0, size=(120, 90))
    shown = crops.undistorted(image, 5)
    seconds = [
        seed for seed in range(30) if torch.equal(crops(image, seed)[0][1], crops.undistorted(image, seed)[1])
    ]
    assert len(seconds) > 20  # all but the few whose second crop is blurred
    loud = MultiCrop(AugmentConfig(global_size=48, local_crops=0, gram_size=96))
    large = loud.undistorted(image, 5)
    halved = torch.nn.functional.interpolate(large.float(), size=48, mode="area")
    small = MultiCrop(AugmentConfig(global_size=48, local_crops=0, gram_size=48)).undistorted(image, 5)
    assert large.shape == (2, 3, 96, 96) and (halved - small.float()).abs().mean() < 2
    assert shown.shape == (2, 3, 48, 48)


def test_a_run_with_an_anchor_of_larger_crops(tmp_path: Path):
    class_folder(tmp_path / "train", classes=2, each=4)
    words = [*SETTINGS, f"data={tmp_path / 'train'}", f"output={tmp_path / 'run'}", "steps=6"]
    main(words)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss.gram" in line] == [4, 5, 6]
    assert all(line["loss.gram"] > 0 for line in lines if "loss.gram" in line)

    config = read(TrainConfig, words)
    checkpoints = checkpoints_of(config, tmp_path / "run")
    states = {}
    for step in (4, 5, 6):
        states[step] = _state_at(step, config, checkpoints)
    anchors = {step: _weights(state.anchor) for step, state in states.items()}
    assert torch.equal(anchors[4], anchors[5])  # taken before the fourth step, and kept
    assert torch.equal(anchors[6], _weights(states[5].teacher.backbone))  # taken anew before the sixth
    assert not torch.equal(anchors[6], anchors[5])


def _state_at(step: int, config: TrainConfig, checkpoints: Checkpoints) -> State:
    """As of a run that was stopped there."""
    checkpoints.steps = lambda: [step]
    return resume(fresh_state(config, checkpoints.load(step, {"data": ""})["data"], CPU), checkpoints)


def _weights(module: torch.nn.Module | None) -> torch.Tensor:
    assert module is not None
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_the_anchors_patches_are_the_teachers_of_larger_crops_downsampled(tmp_path: Path):
    config = read(TrainConfig, [*SETTINGS, "data=x", "output=y", "steps=2", "onednn=false"])
    state = fresh_state(config, "", CPU)
    with torch.no_grad():
        for parameter in state.teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    anchor = make_anchor(config.model.network(32), CPU)
    take(anchor, state.teacher)
    crops = torch.randn(2, 3, 64, 64)
    found = anchor_patches(anchor, crops, (32, 32))
    with torch.no_grad():
        fine = state.teacher.backbone.eval().forward_features(crops)["x_norm_patchtokens"]
    assert found.shape == (2, 16, 192)
    assert torch.equal(found, downsampled(fine, (8, 8), (4, 4)))
    assert gram(found, found) < 1e-12


def test_larger_crops_without_the_loss_are_refused():
    config = read(TrainConfig, [*SETTINGS, "data=x", "output=y", "steps=2", "losses.gram=0"])
    with pytest.raises(UserError, match=r"augment\.gram_size= is for losses\.gram"):
        config.check()


def test_each_step_draws_one_of_the_mixed_sizes_for_all_its_crops():
    mixed = MultiCrop(AugmentConfig(mixed=[[64, 32, 96], [96, 48, 0]], local_crops=3))
    steps = [mixed.at(0, step) for step in range(20)]
    sizes = {(crop.config.global_size, crop.config.local_size, crop.config.gram_size) for crop in steps}
    assert sizes == {(64, 32, 96), (96, 48, 0)}
    assert [crop.config for crop in steps] == [mixed.at(0, step).config for step in range(20)]
    shapes = {(g.shape[-1], s.shape[-1]) for g, s in (crop(picture(0, 0), 1) for crop in steps)}
    assert shapes == {(64, 32), (96, 48)}
