"""Copy detection through the real command: stopped and resumed, on two ranks, and used by curation."""

import json
from pathlib import Path

import pytest
import torch

from dinov2.features import BackboneEmbedder
from dinov2.models import load_backbone
from tests.dinov2.train.runs import finish, lines_of, train_words
from tests.faults import assert_survives, when
from tests.pictures import picture

CONTRASTIVE = [
    "method=contrastive",
    "contrastive.dimension=24",
    "contrastive.entropy=3",
    "edits.mixup_p=0.2",
    "edits.cutmix_p=0.2",
    "teacher.update=student_copy",
    "model.layer_scale=0.5",
]


@pytest.mark.long
def test_a_killed_run_ends_with_the_same_bytes_and_leaves_a_descriptor(pictures: Path, tmp_path: Path):
    words = train_words(pictures, *CONTRASTIVE, "contrastive.pooling=mean", "optim.lr=1e-3")
    assert_survives(
        words,
        tmp_path,
        results=["run/backbone/*", "run/metrics.jsonl"],
        moments=[when("run/checkpoints/00000006")],
        read={"run/metrics.jsonl": lines_of},
    )
    run = tmp_path / "killed" / "run"
    assert all(
        {"loss.infonce", "loss.koleo", "matches.nearest"} <= line.keys()
        for line in lines_of(run / "metrics.jsonl")
    )
    backbone = load_backbone(str(run / "backbone"))
    assert backbone.embed_dim == 24
    embedder = BackboneEmbedder(backbone, size=32, resize=32)
    batch = torch.stack([embedder.prepare(picture(kind, 0)) for kind in range(3)])
    vectors = embedder(batch)
    assert vectors.shape == (3, 24)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-3)
    assert torch.equal(
        backbone.get_intermediate_layers(torch.zeros(1, 3, 32, 32), return_class_token=True)[0][1],
        backbone(torch.zeros(1, 3, 32, 32)),
    )
    curated = finish(
        [
            *words[:2],
            "curation",
            "dedup_only",
            f"pool={pictures / 'train'}",
            f"backbone={run / 'backbone'}",
            "embed.size=32",
            "output=curated",
        ],
        tmp_path,
    )
    assert curated.returncode == 0, curated.stderr
    meta = json.loads((tmp_path / "curated" / "stages" / "embed" / "pool" / "meta.json").read_text())
    assert meta["dimension"] == 24 and meta["architecture"]["kind"] == "descriptor"


@pytest.mark.long
def test_two_ranks_train_as_one(pictures: Path, tmp_path: Path):
    words = train_words(
        pictures, *CONTRASTIVE, "model.drop_path=0", "precision=fp32", "steps=6", "knn.every=0"
    )
    launch = [words[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words[1:]]
    for name, command in (("one", words), ("two", launch)):
        (tmp_path / name).mkdir()
        done = finish(command, tmp_path / name)
        assert done.returncode == 0, done.stderr
    one, two = (lines_of(tmp_path / name / "run" / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for ours, theirs in zip(one, two, strict=True):
        for key in ("loss", "loss.infonce", "loss.koleo", "norm.backbone"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3), (key, ours["step"])
