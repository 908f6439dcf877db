"""`dinov2 curate` as a person runs it: killed, continued, refused, finished."""

import time
from pathlib import Path
from random import Random

import pytest

from dinov2.exits import UserError
from tests.curation.pools import command, curate, decisions, make_pool, run
from tests.faults import assert_survives, at, random_moments, when
from tests.pictures import broken_pictures, class_folder

RESULTS = [
    "out/manifest.parquet",
    "out/decisions.parquet",
    "out/shards/*",
    "out/edges/*",
    "out/clusters.parquet",
    "out/stages/calibrate/c*.parquet",
]
SMALL_PIECES = ["ingest.piece=8", "write.shard=5", "calibrate.pictures=2"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pictures"))


def same(first: Path, second: Path) -> bool:
    names = [Path(name).relative_to("out") for name in RESULTS]
    files = [sorted(folder.glob(str(name))) for name in names for folder in (first, second)]
    assert any(files)
    return all(
        [path.name for path in mine] == [path.name for path in theirs]
        and all(a.read_bytes() == b.read_bytes() for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(files[::2], files[1::2], strict=True)
    )


def test_killed_at_any_moment_it_ends_with_the_same_bytes(pool: Path, tmp_path: Path) -> None:
    words = [f"pool={pool}/pool", f"seeds={pool}/seeds", f"holdout={pool}/holdout", "output=out", "workers=2"]
    draw = Random(time.time_ns())
    # The named files come in this order, so each is met; what is left may be over before the random moment.
    files = ["stages/ingest/pool/0000?.parquet", "stages/embed/*", "stages/duplicates/*", "shards/*.tar"]
    assert_survives(
        command(*words, *SMALL_PIECES, "retrieval.k=6", "budget.pictures=8"),
        tmp_path,
        results=[*RESULTS, "out/report.html", "out/report/*"],
        moments=[*(when(f"out/{file}") for file in files), at(draw.uniform(0.05, 0.2))],
        at_least=4,
        limit=300,
    )


def test_neither_workers_nor_the_pools_order_matter(pool: Path, tmp_path: Path) -> None:
    parts = [f"{pool}/pool/class_0", f"{pool}/pool/class_1", f"{pool}/pool/copies"]
    one = run(f"pool={','.join(parts)}", f"output={tmp_path}/one", "workers=1", *SMALL_PIECES)
    two = run(f"pool={','.join(parts[::-1])}", f"output={tmp_path}/two", "workers=2", *SMALL_PIECES)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert same(tmp_path / "one", tmp_path / "two")


def test_stopping_after_a_stage_then_finishing_then_once_more(pool: Path, tmp_path: Path) -> None:
    words = [f"pool={pool}/pool", f"output={tmp_path}/out"]
    curate(*words, "stop_after=duplicates")
    assert not (tmp_path / "out" / "decisions.parquet").exists()
    out = curate(*words)
    before = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name not in (".lock", "config.yaml")
    }
    again = run(*words)
    assert again.returncode == 0
    assert "finished" in again.stderr
    after = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name not in (".lock", "config.yaml")
    }
    assert {p: t for p, t in before.items() if p.is_file()} == {p: t for p, t in after.items() if p.is_file()}


def test_a_folder_belongs_to_its_settings_and_its_pictures(pool: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    class_folder(mine, classes=1, each=3)
    words = [f"pool={mine}", f"output={tmp_path}/out", "stop_after=ingest"]
    curate(*words)
    refused = run(*words, "duplicates.threshold=0.9")
    assert refused.returncode == 2
    assert "duplicates.threshold" in refused.stderr
    assert "Traceback" not in refused.stderr
    class_folder(mine, classes=1, each=1, first=9)
    with pytest.raises(UserError, match="has changed"):
        curate(*words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pool={root}/none"], "none"),
        (["pool={root}/empty"], "no pictures"),
        (["pool={root}/broken"], "none of 8 pictures can be read"),
        (["pool={root}/pool", "budget.pictures=0"], "budget.pictures=0"),
        (["pool={root}/pool", "stop_after=dupes"], "did you mean 'duplicates'"),
        (["pool={root}/pool", "duplicates.chains=hole"], "did you mean 'whole'"),
        (["pool={root}/pool", "retrieval.collisions=refil"], "did you mean 'refill'"),
        (
            ["pool={root}/pool", "ingest.small=1000"],
            "2 are flagged small (ingest.small=1000, and 'small' is in",
        ),
        (
            ["pool={root}/pool", "ingest.licences=[CC0]"],
            "2 have no licence among ingest.licences=[CC0], but: none",
        ),
        (
            ["pool={root}/list.csv", "ingest.consents=[no]"],
            "2 have no consent among ingest.consents=[no], but: yes (2)",
        ),
        (["pool={root}/pool,{root}/broken", "ingest.small=1000"], "8 cannot be read; 2 are flagged small"),
        (["pool={root}/pool", "holdout={root}/broken"], "holdout="),
        (["pool={root}/pool", "backbone=no_such"], "no_such"),
        (["pool={root}/pool", "holdout={root}/pool"], "what went last, went by holdout= and leaks.threshold"),
        (
            ["dinov2_lvd142m", "pool={root}/pool", "seeds=s={root}/seeds"],
            "than retrieval.more_than=3, but at most 3",
        ),
        (
            ["dinov2_lvd142m", "pool={root}/pool", "seeds=s={root}/seeds", "retrieval.sets.s.more_than=8"],
            "of the 3 seeds of s no cluster has more than retrieval.sets.s.more_than=8",
        ),
        (
            ["pool={root}/pool", "seeds=s={root}/seeds", "retrieval.minimum=1"],
            "of s as retrieval.minimum=1.0 asks",
        ),
    ],
)
def test_what_cannot_work_gets_one_clear_line(words: list[str], says: str, tmp_path: Path) -> None:
    broken_pictures(tmp_path / "broken")
    (tmp_path / "empty").mkdir()
    files = class_folder(tmp_path / "pool", classes=1, each=2)
    class_folder(tmp_path / "seeds", classes=1, each=3, first=9)
    (tmp_path / "list.csv").write_text("\n".join(["path,consent", *(f"{path},yes" for path in files)]))
    with pytest.raises(UserError) as caught:
        curate(*(word.format(root=tmp_path) for word in words), f"output={tmp_path}/out")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_backbone_is_met_before_the_pool_is_read_and_leaves_the_folder_free(tmp_path: Path):
    class_folder(tmp_path / "pool", classes=1, each=3)
    words = [f"pool={tmp_path}/pool", f"output={tmp_path}/out"]
    with pytest.raises(UserError, match="no backbone at 'no_such'"):
        curate(*words, "backbone=no_such")
    assert not (tmp_path / "out" / "stages").exists()
    curate(*words, "stop_after=ingest")


@pytest.mark.data
def test_odd_files_all_get_a_decision(real_pictures: Path, tmp_path: Path) -> None:
    tar = real_pictures / "messy_pool.tar"
    out = curate(f"pool={tar}/odd_files,{tar}/odd_modes", f"output={tmp_path}/out", f"cache={tmp_path}/cache")
    rows = decisions(out)
    assert len(rows) >= 60
    broken = [uri for uri, row in rows.items() if row["error"] and "flagged" not in row["error"]]
    assert broken
    assert all("corrupt" in uri or uri.endswith("svg") for uri in broken)
    resized = [row for uri, row in rows.items() if "ukbench00120_resize" in uri]
    assert all(not row["kept"] and row["evidence"] for row in resized)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_thirty_random_kills_change_nothing(pool: Path, tmp_path: Path) -> None:
    """One in each of thirty parts of the processor's time, each in a folder of its own."""
    words = [f"pool={pool}/pool", f"seeds={pool}/seeds", f"holdout={pool}/holdout", "output=out", "workers=2"]
    assert_survives(
        command(*words, *SMALL_PIECES, "retrieval.k=6", "budget.pictures=8"),
        tmp_path,
        results=[*RESULTS, "out/report.html", "out/report/*"],
        moments=random_moments(30, seed=time.time_ns(), first=0.1, cpu=True),
        separately=True,
        at_least=28,
        limit=600,
    )
