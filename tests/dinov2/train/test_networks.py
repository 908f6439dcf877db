"""Student and teacher of any backbone: the same weights however they come into being, and runs of timm's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov2.models import load_backbone
from dinov2.models.config import TimmConfig, ViTConfig, vit_config
from dinov2.models.recompute import CHECKPOINTING, checkpoint_layers
from dinov2.models.timm_backbone import TimmBackbone
from dinov2.parallel import whole
from dinov2.ssl.networks import Branch, HeadConfig, HeadsConfig, make_branch, make_branches
from tests.pictures import class_folder
from tests.ranks import on_ranks

CPU = torch.device("cpu")
HEADS = HeadsConfig(
    separate=True,
    dino=HeadConfig(hidden=24, bottleneck=8, prototypes=33),
    ibot=HeadConfig(hidden=16, bottleneck=8, prototypes=20, norm_last=False),
)
VIT = vit_config("vit_tiny", depth=2, patch=8, image_size=32, registers=2, drop_path=0.2)
NETWORKS = {
    "vit": VIT,
    "timm_vit": TimmConfig(name="vit_tiny_patch16_224"),
    "resnet": TimmConfig(name="resnet10t", channels=2),
}


def _all_weights_and_scores() -> list[tuple[dict[str, Tensor], Tensor]]:
    weights = [_weights_and_scores(config) for config in NETWORKS.values()]
    return weights + [({how: _gradient(how)}, torch.zeros(())) for how in CHECKPOINTING]


def _gradient(how: str) -> Tensor:
    """Of the same batch on every rank, with rotary positions and nothing dropped."""
    branch = make_branch(replace(VIT, position="rope", drop_path=0.0), HEADS, 7, CPU)
    checkpoint_layers(branch.backbone.layers(), how)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    branch([images, images[:, :, :16, :16]]).dino.scores().square().mean().backward()
    found = [p.grad for p in branch.backbone.parameters() if p.grad is not None]
    return torch.cat([whole(gradient).flatten() for gradient in found]) * 1e3


def _weights_and_scores(config: ViTConfig | TimmConfig) -> tuple[dict[str, Tensor], Tensor]:
    branch = make_branch(config, HEADS, 7, CPU)
    weights = {name: whole(tensor).clone() for name, tensor in branch.state_dict().items()}
    images = torch.randn(4, config.channels, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return weights, branch.eval()([images, images[:, :, :16, :16]]).dino.scores()


def test_ranks_begin_with_the_weights_that_one_process_begins_with():
    """Bit for bit: the ViT block by block from the meta device, timm's whole and then split.

    And their gradients are the same, whatever the backward pass computes again.
    """
    for found in on_ranks(2, _all_weights_and_scores):
        for (weights, scores), (others, scored) in zip(_all_weights_and_scores(), found, strict=True):
            assert weights.keys() == others.keys()
            for key in weights:
                if key in CHECKPOINTING:
                    torch.testing.assert_close(others[key], weights[key], rtol=1e-3, atol=1e-4)
                else:
                    assert torch.equal(weights[key], others[key]), key
            torch.testing.assert_close(scored, scores)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_teacher_begins_as_the_student_and_stands_still(name: str):
    student, teacher = make_branches(NETWORKS[name], HEADS, 3, CPU)
    mine, others = student.state_dict(), teacher.state_dict()
    assert mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)
    assert any(parameter.std() > 0 for parameter in student.dino_head.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = torch.randn(4, NETWORKS[name].channels, 32, 32)
    with torch.no_grad():
        first, again = teacher([images]), teacher([images])
    assert torch.equal(
        first.dino.scores(), again.dino.scores()
    )  # nothing is dropped, whatever the student drops
    assert not torch.equal(_weights(make_branch(NETWORKS[name], HEADS, 4, CPU)), _weights(student))


def _weights(branch: Branch) -> Tensor:
    return torch.cat([p.detach().flatten() for p in branch.parameters()])


def test_timms_stochastic_depth_follows_the_step():
    config = TimmConfig(name="vit_tiny_patch16_224", drop_path=0.5)
    branch = make_branch(config, HEADS, 0, CPU)
    images, state = torch.randn(4, 3, 32, 32), torch.get_rng_state()
    with torch.no_grad():
        a, b, c = (branch([images], generator=torch.Generator().manual_seed(s)).cls for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())


def test_a_convolutional_network_trains_by_the_image_losses_and_comes_back(tmp_path: Path):
    """With batch norm in backbone and head, whose averages both networks keep for themselves, as in DINO."""
    from dinov2.train.__main__ import main

    class_folder(tmp_path / "train", classes=2, each=4)
    words = f"""data={tmp_path / "train"} output={tmp_path / "run"} steps=2
        model.size=timm:resnet10t losses.ibot=0 losses.koleo=0 teacher.targets=centering batch=4
        heads.dino.hidden=16 heads.dino.bottleneck=8
        heads.dino.prototypes=32 heads.dino.batch_norm=true augment.global_size=64 augment.local_size=32
        augment.local_crops=2 tensorboard=false workers=0 device=cpu model.drop_path=0 optim.warmup=0"""
    main(words.split())
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 2 and "loss.ibot" not in line and line["loss.dino"] > 0
    backbone = load_backbone(tmp_path / "run" / "backbone")
    assert isinstance(backbone, TimmBackbone)
    assert backbone.architecture() == {"kind": "timm", "name": "resnet10t", "channels": 3}
    assert backbone.image_size == 64
    assert backbone.state_dict()["model.conv1.1.num_batches_tracked"] == 2  # the teacher's own
    fresh = TimmBackbone("resnet10t")
    assert not torch.equal(backbone(torch.ones(1, 3, 64, 64)), fresh.eval()(torch.ones(1, 3, 64, 64)))
