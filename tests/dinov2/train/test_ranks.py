"""One, two and four processes at the same global batch: the same pictures, crops, masks, and losses."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from dinov2.config import read
from dinov2.folders import claim
from dinov2.parallel import barrier, is_main
from dinov2.train.config import TrainConfig
from dinov2.train.feed import training_source
from dinov2.train.loop import train
from dinov2.train.rollback import Rollbacks
from dinov2.train.state import fresh_state
from tests.pictures import class_folder
from tests.ranks import on_ranks

STEPS = 20
WORDS = f"""steps={STEPS} batch=8 precision=fp32 tensorboard=false workers=0 device=cpu
model.size=vit_tiny model.depth=2 model.patch=8 model.registers=1 model.drop_path=0 model.layer_scale=0.5
heads.separate=true heads.dino.hidden=32 heads.dino.bottleneck=16 heads.dino.prototypes=64
heads.ibot.hidden=32 heads.ibot.bottleneck=16 heads.ibot.prototypes=32
augment.global_size=32 augment.local_size=16 augment.local_crops=2
losses.koleo_across_ranks=true checkpoint.every=1000""".split()


def _train(data: str, output: str, *words: str) -> None:
    """What the command does between its process group and its report."""
    config = read(TrainConfig, [*WORDS, f"data={data}", f"output={output}", *words])
    source = training_source(config)
    with claim(output, config) if is_main() else nullcontext(Path(output)) as folder:
        state = fresh_state(config, source.fingerprint, torch.device("cpu"))
        barrier()
        train(config, folder, source, state, Rollbacks(folder, state.step))
        barrier()


def test_one_two_and_four_sharded_ranks_have_the_same_losses_over_twenty_steps(tmp_path: Path):
    """A LayerScale that lets the picture through: with all features alike, KoLeo would magnify rounding."""
    class_folder(tmp_path / "pictures", classes=3, each=8, size=(48, 40))
    runs = {}
    for world, *words in ((1,), (2,), (4, "sharding.copies=2")):
        folder = tmp_path / f"{world} {words}"
        folder.mkdir()
        where = str(tmp_path / "pictures"), str(folder / "run"), *words
        _train(*where) if world == 1 else on_ranks(world, _train, *where)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        runs[folder.name] = [json.loads(line) for line in lines]
        assert [line["step"] for line in runs[folder.name]] == list(range(1, STEPS + 1))
    alone, *others = runs
    assert runs[alone][-1]["loss"] != pytest.approx(runs[alone][0]["loss"], rel=1e-2)  # it does learn
    for world in others:
        for one, many in zip(runs[alone], runs[world], strict=True):
            for key in ("loss", "loss.dino", "loss.ibot", "loss.koleo", "norm.backbone"):
                assert many[key] == pytest.approx(one[key], rel=1e-3), (world, one["step"], key)
