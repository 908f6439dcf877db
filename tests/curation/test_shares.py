"""Parts done by processes that know nothing of each other make what one process makes."""

import subprocess
import time
from pathlib import Path
from random import Random

import pytest

from curation import embed, near, search
from dinov2.exits import UserError
from tests.curation.pools import command, curate, make_pool, run
from tests.curation.test_command import RESULTS, SMALL_PIECES
from tests.faults import ROOT, Spent, differences, run_killed, when
from tests.pictures import class_folder


def test_shards_in_any_order_one_of_them_killed_end_as_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_pool(tmp_path / "pictures")
    for module, name, size in (
        (search, "BLOCK", 8),
        (near, "PAIRS_PER_PIECE", 20),
        (embed, "ROWS_PER_FILE", 8),
    ):
        monkeypatch.setattr(module, name, size)  # so that there are pieces to share out
    words = [f"pool={root}/pool", f"seeds={root}/seeds", f"holdout={root}/holdout", *SMALL_PIECES]
    words += ["retrieval.k=6", "budget.pictures=8"]
    curate(*words, f"output={tmp_path}/whole/out")

    folder = tmp_path / "parts"
    folder.mkdir()
    output = f"output={folder}/out"
    others = [
        subprocess.Popen(command(*words, output, f"shard={number}/3", "workers=1"), cwd=ROOT)
        for number in (2, 0)
    ]
    while not (folder / "out" / "stages" / "ingest" / "begun.json").exists():  # they hold the folder by then
        assert all(process.poll() is None for process in others)
        time.sleep(0.02)
    killed = command(*words, "output=out", "shard=1/3", "workers=1")
    with pytest.raises(UserError, match=r"is in use|lacks"):
        curate(*words, output, "shard=merge")
    attempts = run_killed(killed, folder, [when("out/stages/ingest/pool/*.parquet")], whole=Spent())
    assert attempts[0].status is None
    assert [process.wait(100) for process in others] == [0, 0]

    draw, rounds = Random(0), 0
    while not (folder / "out" / "report.html").exists():
        curate(*words, output, "shard=merge")
        for number in draw.sample(range(3), 3):
            curate(*words, output, f"shard={number}/3")
        rounds += 1
        assert rounds < 10
    assert rounds == 6  # embed, duplicates' search and verifying, the holdout's, and the rest
    for stage in ("duplicates", "holdout"):
        assert len(list((folder / "out" / "stages" / stage / "search").glob("0*.parquet"))) > 3
    assert len(list((folder / "out" / "stages" / "duplicates" / "aligned").glob("*.parquet"))) > 3
    assert not differences(tmp_path / "whole", folder, RESULTS)


def test_a_backbones_embedding_is_shared_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "ROWS_PER_FILE", 8)
    root = make_pool(tmp_path / "pictures", each=5)
    words = [f"pool={root}/pool", f"holdout={root}/holdout", "backbone=timm:resnet10t", "embed.size=64"]
    words += ["stop_after=embed", "seed=3"]
    curate(*words, f"output={tmp_path}/whole")
    output, whole = f"output={tmp_path}/parts", tmp_path / "whole" / "stages" / "embed"
    for shard in ("0/2", "1/2", "merge", "1/2"):
        curate(*words, output, f"shard={shard}")
    with pytest.raises(UserError, match=r"embed pool lacks \d of 4 pieces"):
        curate(*words, output, "shard=merge")
    for shard in ("0/2", "merge"):
        curate(*words, output, f"shard={shard}")
    assert len(list(whole.rglob("*.npy"))) > 4
    assert not differences(whole, tmp_path / "parts" / "stages" / "embed", ["**/*.npy", "**/*.parquet"])


@pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "-1/3"])
def test_a_shard_is_a_number_of_a_number(shard: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shard=0/4"):
        curate(f"pool={tmp_path}", f"output={tmp_path}/out", f"shard={shard}")


def test_merging_says_what_is_not_there_yet(tmp_path: Path) -> None:
    class_folder(tmp_path / "pool", classes=1, each=6)
    words = [f"pool={tmp_path}/pool", f"output={tmp_path}/out", "ingest.piece=1"]
    merging = run(*words, "shard=merge")
    assert merging.returncode == 2
    assert "no shard has done its part of ingest pool; run shard=0/n" in merging.stderr
    curate(*words, "shard=1/3")
    with pytest.raises(UserError, match="lacks 4 of 6 pieces, numbers 0, 2, 3, 5; run those shards"):
        curate(*words, "shard=merge")
    for shard in ("0/3", "2/3", "merge", "merge"):  # the second time there is nothing of what comes next
        curate(*words, f"shard={shard}")
