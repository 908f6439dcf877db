"""`init=`: a run that begins from another's networks, or from a backbone with fresh heads behind it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2.checkpoint import Checkpoints
from dinov2.config import read
from dinov2.console import run
from dinov2.models import load_backbone
from dinov2.models.positions import resized_positions
from dinov2.parallel import whole
from dinov2.train.__main__ import main
from dinov2.train.config import TrainConfig
from dinov2.train.origin import begin
from dinov2.train.state import fresh_state
from tests.ranks import on_ranks

CPU = torch.device("cpu")
POSITIONS = "backbone.pos_embed"


def _words(pictures: Path, output: Path, *words: str) -> list[str]:
    return [
        str(pictures / "small.yaml"),
        f"data={pictures / 'train'}",
        f"output={output}",
        "workers=0",
        *words,
    ]


@pytest.fixture(scope="module")
def origin(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run at 32 px."""
    folder = tmp_path_factory.mktemp("origin") / "run"
    main(_words(pictures, folder, "steps=2", "optim.warmup=0"))
    return folder


def _resized(positions: Tensor, side: int) -> Tensor:
    grid = resized_positions(positions[:, 1:], (side, side), "exact_antialias")
    return torch.cat([positions[:, :1], grid], dim=1)


def test_a_run_begins_with_anothers_networks_at_a_higher_resolution(
    pictures: Path, origin: Path, tmp_path: Path
):
    """With a learning rate of zero and an average that stands still it ends with them too."""
    still = ["optim.lr=0", "optim.min_lr=0", "teacher.momentum=1"]
    still += ["augment.global_size=48", "checkpoint.every=1"]
    moved = shutil.copytree(origin, tmp_path / "origin")
    words = _words(pictures, tmp_path / "high", f"init={moved}", "steps=2", *still)
    main(words)
    recipe = str(pictures / "small.yaml")
    before = _state_of(recipe, origin, 2)
    after = _state_of(recipe, tmp_path / "high", 2, "augment.global_size=48")
    for name in ("student", "teacher"):
        assert before[name].keys() == after[name].keys()
        assert before[name][POSITIONS].shape[1] == 17 and after[name][POSITIONS].shape[1] == 37
        before[name][POSITIONS] = _resized(before[name][POSITIONS], 6)
        for key, tensor in before[name].items():
            assert torch.equal(tensor, after[name][key]), key
    assert not torch.equal(before["student"][POSITIONS], before["teacher"][POSITIONS])
    kept = json.loads((tmp_path / "high" / "origin.json").read_text())
    assert (kept["kind"], kept["step"], kept["settings"]["augment"]["global_size"]) == ("run", 2, 32)
    assert load_backbone(tmp_path / "high" / "backbone").image_size == 48
    # once it has a checkpoint of its own, it needs the origin no more
    shutil.rmtree(moved)
    shutil.rmtree(tmp_path / "high" / "checkpoints" / "00000002")
    (tmp_path / "high" / "report.html").unlink()
    main(words)


def test_a_frozen_backbone_keeps_its_features_until_it_thaws(pictures: Path, origin: Path, tmp_path: Path):
    words = f"""init={origin / "backbone"} steps=8 optim.freeze_backbone=0.5 optim.freeze_last_layer=0
        heads.separate=false checkpoint.every=4 knn.train={pictures / "train"} knn.test={pictures / "test"}
        knn.every=1""".split()
    main(_words(pictures, tmp_path / "run", *words))
    given = {f"backbone.{k}": v for k, v in load_backbone(origin / "backbone").state_dict().items()}
    recipe = str(pictures / "small.yaml")
    warm, end = (_state_of(recipe, tmp_path / "run", step, "heads.separate=false") for step in (4, 8))
    fresh = fresh_state(_config(recipe, tmp_path, "heads.separate=false"), "", CPU).student.state_dict()
    for name in ("student", "teacher"):
        assert all(torch.equal(warm[name][key], tensor) for key, tensor in given.items())
        heads = [key for key in warm[name] if key not in given and "bias" not in key]
        assert heads and not any(torch.equal(warm[name][key], fresh[key]) for key in heads)
        assert not any(torch.equal(end[name][key], given[key]) for key in given if key.endswith("qkv.weight"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["knn.student"], line["knn.teacher"]) for line in lines]
    assert len(curve) == 9 and len(set(curve[:5])) == 1
    assert json.loads((tmp_path / "run" / "origin.json").read_text())["kind"] == "backbone"


def _config(recipe: str, folder: Path, *words: str) -> TrainConfig:
    return read(TrainConfig, [recipe, "data=x", f"output={folder}", *words], recipes="train")


def _state_of(recipe: str, folder: Path, step: int, *words: str) -> dict[str, Any]:
    state = fresh_state(_config(recipe, folder, *words), "", CPU)
    tree = {"student": state.student.state_dict(), "teacher": state.teacher.state_dict()}
    return Checkpoints(folder / "checkpoints").load(step, tree)


def _begun(recipe: str, inits: list[str]) -> list[dict[str, Tensor]]:
    found = []
    for init in inits:
        config = _config(recipe, Path("x"), f"init={init}", "augment.global_size=48")
        state = fresh_state(config, "", CPU)
        begin(config, state)
        found.append({name: whole(tensor).clone() for name, tensor in state.student.state_dict().items()})
    return found


def test_sharded_networks_begin_alike(pictures: Path, origin: Path):
    words = str(pictures / "small.yaml"), [str(origin), str(origin / "backbone")]
    alone = _begun(*words)
    assert not torch.equal(alone[0][POSITIONS], alone[1][POSITIONS])  # a student, and a teacher
    for found in on_ranks(2, _begun, *words):
        for ours, theirs in zip(alone, found, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init=/nowhere"], "no backbone at '/nowhere'"),
        (["init={origin}/backbone", "model.depth=3"], "depth (2 there, 3 here)"),
        (["init={origin}", "heads.separate=false"], "has another model= or other heads=: ibot_head."),
        (["init={origin}", "heads.dino.prototypes=65"], "dino_head.prototypes.weight [64, 16]"),
        (
            ["init={origin}/backbone", "augment.mean=[0.5,0.5,0.5]"],
            "of another scale; set augment.mean=[0.4",
        ),
        (["optim.freeze_backbone=0.95"], "together less than 1"),
    ],
)
def test_what_cannot_be_begun_from_is_one_line(
    pictures: Path,
    origin: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
):
    given = _words(pictures, tmp_path / "run", *(word.replace("{origin}", str(origin)) for word in words))
    with pytest.raises(SystemExit) as left:
        run(main, "train", given)
    said = capsys.readouterr().err
    assert left.value.code == 2 and message in said and said.count("\n") == 1
