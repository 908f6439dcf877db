"""Runs of `dinov2 train` in real processes: stopped anywhere they end alike, and bad input gets one line."""

import random
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.models import load_backbone
from tests.dinov2.train.runs import finish, lines_of, on_processes, train_words, wait_for_lines
from tests.faults import assert_survives, at, when


def test_a_killed_run_continues_and_ends_with_the_same_bytes(pictures: Path, tmp_path: Path):
    labelled = [
        f"knn.train={pictures / 'train'}",
        f"knn.test={pictures / 'test'}",
        "accumulate=2",
        "checkpoint.export_every=4",
    ]
    assert_survives(
        train_words(pictures, *labelled),
        tmp_path,
        results=["run/backbone/*", "run/backbones/*/*", "run/metrics.jsonl"],
        moments=[when("run/checkpoints/00000002"), when("run/checkpoints/.part-00000006/*.distcp"), at(0.9)],
        read={"run/metrics.jsonl": lines_of},
    )
    lines = lines_of(tmp_path / "killed" / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(9))
    assert {line["step"] for line in lines if "knn.teacher" in line} == {0, 4, 8}
    backbone = load_backbone(str(tmp_path / "killed" / "run" / "backbone"))
    assert backbone.embed_dim == 192
    again = finish(train_words(pictures, *labelled), tmp_path / "killed")
    assert again.returncode == 0 and "already done" in again.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_one_rank_saves_on_all_at_the_same_step_and_asks_to_be_run_again(
    pictures: Path, tmp_path: Path, ranks: int
):
    words = train_words(pictures, "steps=10000", "checkpoint.every=10000", "teacher.targets=centering")
    runs = on_processes(words, tmp_path, ranks)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for_lines(metrics, 1, runs)
    runs[-1].send_signal(signal.SIGTERM)
    for run in runs:
        _, said = run.communicate(timeout=200)
        assert run.returncode == 75 and "saved at step" in said.splitlines()[-1], said
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert [int(name) for name in saved] == [lines_of(metrics)[-1]["step"]]


def test_two_sharded_processes_train_as_one_and_one_continues_what_two_began(pictures: Path, tmp_path: Path):
    """Stochastic depth draws on each rank for itself, so it is off; KoLeo's neighbours are of all ranks.

    A LayerScale that lets the picture through: with all features alike, KoLeo would magnify rounding.
    """
    same = ["model.drop_path=0", "model.layer_scale=0.5", "losses.koleo_across_ranks=true", "precision=fp32"]
    alone = finish(train_words(pictures, *same), _made(tmp_path / "one"))
    assert alone.returncode == 0, alone.stderr
    command = train_words(pictures, *same)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", *command[1:]]
    together = finish([sys.executable, "-m", *launch], _made(tmp_path / "two"))
    assert together.returncode == 0, together.stderr
    shutil.rmtree(tmp_path / "two" / "run" / "checkpoints" / "00000008")
    (tmp_path / "two" / "run" / "report.html").unlink()
    two = lines_of(tmp_path / "two" / "run" / "metrics.jsonl")
    resumed = finish(command, tmp_path / "two")
    assert resumed.returncode == 0, resumed.stderr
    one = lines_of(tmp_path / "one" / "run" / "metrics.jsonl")
    for other in (two, lines_of(tmp_path / "two" / "run" / "metrics.jsonl")):
        assert [line["step"] for line in other] == list(range(1, 9))
        for ours, theirs in zip(one, other, strict=True):
            for key in ("loss", "loss.dino", "loss.ibot", "loss.koleo", "norm.backbone"):
                assert theirs[key] == pytest.approx(ours[key], rel=2e-4), (key, ours["step"])


def test_training_draws_from_no_global_random_state_so_that_a_checkpoint_needs_none(
    pictures: Path, tmp_path: Path
):
    from dinov2.train.__main__ import main

    def states() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002  # the one in question

    before = states()
    recipe, data = str(pictures / "small.yaml"), f"data={pictures / 'train'}"
    main([recipe, data, f"output={tmp_path / 'run'}", "steps=3", "workers=0", "watch.every=1"])
    assert (tmp_path / "run" / "backbone").exists() and states() == before


@pytest.mark.gpu
def test_a_gpu_trains_as_the_cpu_does(pictures: Path, tmp_path: Path):
    same = ["model.drop_path=0", "model.layer_scale=0.5", "precision=fp32"]
    for device in ("cpu", "cuda"):
        done = finish(train_words(pictures, *same, f"device={device}"), _made(tmp_path / device))
        assert done.returncode == 0, done.stderr
    cpu, gpu = (lines_of(tmp_path / device / "run" / "metrics.jsonl") for device in ("cpu", "cuda"))
    for ours, theirs in zip(cpu, gpu, strict=True):
        for key in ("loss", "loss.dino", "loss.ibot", "loss.koleo"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3), (key, ours["step"])
    half = finish(train_words(pictures, "precision=bf16", "device=cuda"), _made(tmp_path / "half"))
    assert half.returncode == 0, half.stderr


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batch=1000"], "has 24 pictures, too few for batch=1000"),
        (["batch=0"], "batch=0: give 1 or more"),
        (["workers=-1"], "workers=-1: give 0 or more"),
        (["heads.dino.prototypes=0"], "heads.dino.prototypes=0: give 1 or more"),
        (["checkpoint.every=0"], "checkpoint.every=0: give 1 or more"),
        (["epochs=2"], "and not as both"),
        (["model.patch=7"], "no multiple of model.patch=7"),
        (["model.size=vit_smal"], "did you mean 'vit_small'?"),
        (["precision=fp8"], "precision=fp8: unknown"),
        (["optim.lr_scaling=cubic"], "choose from linear, none, sqrt"),
        (["device=cuda:99"], "device=cuda:99 cannot be used here"),
        (["model.size=timm:resnet10t"], "has no mask token; set losses.ibot=0"),
        (["model.size=timm:resnt50", "losses.ibot=0"], "did you mean resnet50"),
        (["model.channels=4"], "give 3 values for model.channels=4"),
        (["losses.dino=0", "losses.ibot=0", "losses.koleo=0"], "all losses have weight 0"),
        (["knn.train=/nowhere"], "needs both knn.train= and knn.test="),
        (["data=/nowhere"], "/nowhere"),
        *([] if find_spec("wandb") else [(["wandb=mine"], "wandb=mine needs a package")]),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_status_2(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    from dinov2.console import run
    from dinov2.train.__main__ import main

    given = [str(pictures / "small.yaml"), f"data={pictures / 'train'}", f"output={tmp_path / 'run'}", *words]
    with pytest.raises(SystemExit) as left:
        run(main, "train", given)
    said = capsys.readouterr().err
    assert left.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
