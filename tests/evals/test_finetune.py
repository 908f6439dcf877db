"""Fine-tuning: its first step against torch's own parts, its average, its copies, and being killed."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dinov2.models import load_backbone
from evals.finetune import Classifier, FinetuneConfig, Tuning, mix, trainable
from tests.evals.small import evaluated
from tests.faults import assert_survives, when

PLAIN = FinetuneConfig(
    backbone="x", output="x", size=32, mixup=0, cutmix=0, smoothing=0, drop_path=0, warmup=0, clip=0, ema=0.9
)
QUICK = ["size=32", "batch=16", "batch_size=12", "lr=0.01", "layer_decay=1", "epochs=8", "ema=0.9"]


def pictures(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8), labels


def test_steps_are_those_of_adamw_on_cross_entropy(place):
    backbone = load_backbone(place / "backbone")
    tuning = Tuning(Classifier(trainable(backbone, 0.0), 3, "cls", 0), PLAIN, steps=10, pictures=12)
    by_hand = Classifier(trainable(backbone, 0.0), 3, "cls", 0).train()
    rate = PLAIN.lr * PLAIN.batch_size / 256
    groups = []
    for name, weight in by_hand.named_parameters():
        block = int(name.split(".")[2]) + 1 if "blocks" in name else 0
        behind = name.startswith(("head", "backbone.norm"))
        factor = 1.0 if behind else PLAIN.layer_decay ** (3 - block)
        decay = 0.05 if weight.ndim > 1 and not name.endswith("bias") else 0.0
        groups.append({"params": [weight], "lr": rate * factor, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups)
    images, labels = pictures()
    tuning.train_step(images, labels)
    mean, std = (255 * torch.tensor(values).view(-1, 1, 1) for values in backbone.normalisation)
    loss = F.cross_entropy(by_hand.head(by_hand.backbone((images - mean) / std)), labels)
    loss.backward()
    optimizer.step()
    assert tuning.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    ours, theirs = dict(tuning.model.named_parameters()), dict(by_hand.named_parameters())
    for name in theirs:
        gradient = theirs[name].grad
        if gradient is not None and gradient.abs().max() > 1e-5:
            assert torch.allclose(ours[name], theirs[name], atol=2e-6), name
    start = Classifier(trainable(backbone, 0.0), 3, "cls", 0).head.weight
    kept = min(0.9, 2 / 11)
    average = kept * start + (1 - kept) * ours["head.weight"]
    assert torch.allclose(tuning.scored.head.weight, average, atol=1e-7)


def test_training_continues_from_its_state(place):
    backbone, config = load_backbone(place / "backbone"), replace(PLAIN, mixup=0.8, drop_path=0.5)

    def begun():
        model = Classifier(trainable(backbone, 0.5), 3, "cls", 0)
        return Tuning(model, config, steps=6, pictures=12)

    whole, half, rest = begun(), begun(), begun()
    for step in range(6):
        whole.train_step(*pictures(seed=step))
        if step < 3:
            half.train_step(*pictures(seed=step))
    file = io.BytesIO()
    torch.save(half.state(), file)
    file.seek(0)
    rest.load_state(torch.load(file, weights_only=True))
    for step in range(rest.step, 6):
        rest.train_step(*pictures(seed=step))
    assert rest.losses == whole.losses
    for name, weight in whole.scored.state_dict().items():
        assert torch.equal(weight, rest.scored.state_dict()[name]), name


def test_mixed_pictures_and_labels_have_the_same_shares():
    images, labels = pictures()
    seen = set()
    for step in range(12):
        config = replace(PLAIN, mixup=0.8, cutmix=1.0)
        mixed, targets = mix(images.float(), labels, 3, config, step)
        again, _ = mix(images.float(), labels, 3, config, step)
        assert torch.equal(mixed, again)
        assert targets.sum(1) == pytest.approx(torch.ones(12))
        rolled = images.roll(1, 0).float()
        share = (targets.gather(1, labels[:, None])[:, 0])[labels != labels.roll(1)].mean()
        of_own = (mixed == images).all(1).float().mean()
        blended = torch.allclose(mixed, share * images + (1 - share) * rolled, atol=1e-3)
        seen.add("mixup" if blended else "cutmix")
        assert blended or of_own == pytest.approx(float(share), abs=0.02)
    assert seen == {"mixup", "cutmix"}


def test_a_trainable_copy_drops_paths_and_leaves_the_backbone_alone(place):
    for spec in (place / "backbone", "timm:vit_tiny_patch16_224", "timm:resnet18"):
        backbone = load_backbone(spec)
        copy = trainable(backbone, 0.3)
        assert all(one.requires_grad for one in copy.parameters())
        assert not any(one.requires_grad for one in backbone.parameters())
        images = torch.randn(8, 3, 32, 32)
        assert torch.allclose(copy.eval()(images), backbone(images), atol=1e-6)
        if "resnet18" not in str(spec):
            draws = [
                copy.train().forward_packed([images], generator=torch.Generator().manual_seed(s))
                for s in (0, 1)
            ]
            assert not torch.allclose(*(one[0]["x_norm_clstoken"] for one in draws))


def test_the_command_learns_and_scores_the_average(place, tmp_path):
    before = (place / "backbone" / "model.safetensors").read_bytes()
    found = evaluated(place, tmp_path, "finetune", *QUICK, "workers=1")
    assert found["metrics"]["top1"] > 60
    assert found["details"]["steps"] == 8 * 3
    assert (place / "backbone" / "model.safetensors").read_bytes() == before
    with_mean = evaluated(place, tmp_path, "finetune", *QUICK[:-2], "epochs=1", "ema=0", "token=cls+mean")
    assert with_mean["details"]["steps"] == 3


@pytest.mark.long
def test_a_killed_command_continues_to_the_same_numbers(place, tmp_path):
    def numbers(path: Path):
        return {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}

    words = [*QUICK, "save_every=4", f"data={place / 'data'}", "output=out", f"cache={place / 'cache'}"]
    assert_survives(
        [sys.executable, "-m", "evals", str(place / "backbone"), "finetune", *words],
        tmp_path,
        results=["out/results/*.json"],
        read={"out/results/*.json": numbers},
        moments=[when("out/work/*/state.pt"), when("out/work/*/state.pt")],
        env={"OMP_NUM_THREADS": "1"},
    )
