"""A finished folder decides again, takes up new pictures, and lets sets of seeds ask each its own way."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from curation import ingest, near
from curation.config import RetrievalConfig, SetConfig
from curation.retrieval import Pool, ask
from dinov2.exits import UserError
from tests.curation.pools import command, curate, decisions, make_pool
from tests.faults import assert_survives, when
from tests.pictures import class_folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pictures"))


def test_deciding_again_is_as_a_new_folder_and_searches_nothing(pool: Path, tmp_path: Path) -> None:
    words = [f"pool={pool}/pool", f"holdout={pool}/holdout", f"output={tmp_path}/out"]
    new = ["duplicates.threshold=0.99", "budget.pictures=9"]
    curate(*words)
    searched = [tmp_path / "out/stages" / stage / "candidates.parquet" for stage in ("duplicates", "holdout")]
    before = [path.stat().st_mtime_ns for path in searched]
    with pytest.raises(UserError, match="from_stage=duplicates"):
        curate(*words, *new)
    with pytest.raises(UserError, match=r"duplicates\.threshold"):
        curate(*words, *new, "from_stage=retrieval")
    again = curate(*words, *new, "from_stage=duplicates")
    assert [path.stat().st_mtime_ns for path in searched] == before
    fresh = curate(*words[:2], *new, f"output={tmp_path}/fresh")
    for name in ("decisions.parquet", "manifest.parquet", "clusters.parquet", "edges/duplicate.parquet"):
        assert (again / name).read_bytes() == (fresh / name).read_bytes()
    shards = [sorted((out / "shards").iterdir()) for out in (again, fresh)]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


def test_killed_while_it_decides_again_it_ends_with_the_same_bytes(pool: Path, tmp_path: Path) -> None:
    words = [f"pool={pool}/pool", f"holdout={pool}/holdout", "write.shard=5", "stop_after=write"]
    before = curate(*words, f"output={tmp_path}/before")
    for name in ("whole", "killed"):
        shutil.copytree(before, tmp_path / name / "out")
    new = ["duplicates.threshold=0.99", "budget.pictures=9", "from_stage=duplicates", "output=out"]
    replaced = ["stages/duplicates/begun.json", "edges/holdout.parquet", "shards/*.tar"]
    assert_survives(
        command(*words, *new, "workers=1"),
        tmp_path,
        results=["out/*.parquet", "out/shards/*", "out/edges/*", "out/stages/*/*.parquet"],
        moments=[when(f"out/{name}", new=False) for name in replaced],
        at_least=3,
    )


@pytest.mark.parametrize("backbone", ["descriptor", "timm:resnet10t"])
def test_of_a_pool_that_grew_only_what_is_new_is_read(
    tmp_path: Path, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    one = ingest._ingest_one
    monkeypatch.setattr(
        ingest,
        "_ingest_one",
        lambda source, row, how: (read.append(source.ids[row]), one(source, row, how))[1],
    )
    mine = tmp_path / "mine"
    class_folder(mine, classes=2, each=4, formats=("png",))
    words = [f"pool={mine}", f"output={tmp_path}/out", f"backbone={backbone}", "embed.size=64"]
    out = curate(*words)
    old = np.load(out / "stages/embed/pool/00000.npy")
    old_ids = parquet.read_table(out / "stages/embed/pool/ids.parquet")["id"].to_pylist()
    path = mine / "class_0" / "000.png"
    whole = path.read_bytes()
    class_folder(mine, classes=1, each=2, first=20, formats=("png",))
    with pytest.raises(UserError, match="from_stage=ingest"):
        curate(*words)
    (mine / "class_0" / "001.png").touch()
    path.write_bytes(bytes(len(whole)))  # as long as it was
    read.clear()
    curate(*words, "from_stage=ingest")
    broken = decisions(out)
    assert broken["class_0/000.png"]["error"]
    new = {"class_0/000.png", "class_0/020.png", "class_0/021.png"}
    assert sorted(read) == sorted(broken[name]["id"] for name in new)
    path.write_bytes(whole)
    class_folder(mine, classes=1, each=1, first=30, formats=("png",))
    curate(*words, "from_stage=ingest")
    assert len(decisions(out)) == 11
    assert decisions(out)["class_0/000.png"]["error"] is None
    assert not (out / "stages.before").exists()
    now = np.load(out / "stages/embed/pool/00000.npy")
    ids = parquet.read_table(out / "stages/embed/pool/ids.parquet")["id"].to_pylist()
    assert np.array_equal(now[[ids.index(name) for name in old_ids]], old)
    shutil.rmtree(mine / "class_1")
    curate(*words, "from_stage=ingest")
    assert len(decisions(out)) == 7


def test_of_a_pool_that_grew_only_new_pairs_are_laid_over_each_other(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = tmp_path / "pool"
    shutil.copytree(pool / "pool", grown)
    more = [grown / "class_0/000.png", grown / "class_1/001.png"]
    left_out = [path.rename(tmp_path / path.name) for path in more]
    words = [f"pool={grown}", f"holdout={pool}/holdout"]
    curate(*words, f"output={tmp_path}/again")
    shutil.copytree(tmp_path / "again", tmp_path / "whole")
    for path, old in zip(more, left_out, strict=True):
        shutil.copy(old, path)
    laid: list[int] = []
    align = near.align
    monkeypatch.setattr(
        near, "align", lambda thumbs, pairs: (laid.append(len(pairs)), align(thumbs, pairs))[1]
    )
    counts = []
    for name in ("again", "whole"):
        if name == "whole":
            monkeypatch.setattr(
                near, "_scores_before", lambda run, stage, now, *_: np.full(len(now.pairs), np.nan)
            )
        laid.clear()
        curate(*words, f"output={tmp_path}/{name}", "from_stage=ingest")
        counts.append(sum(laid))
    assert 0 < counts[0] < counts[1] / 2
    for path in ("edges/duplicate.parquet", "decisions.parquet", "manifest.parquet"):
        assert (tmp_path / "again" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


def test_a_picture_that_was_replaced_after_it_was_judged_is_not_written(tmp_path: Path) -> None:
    class_folder(tmp_path / "mine", classes=1, each=3, formats=("bmp",))
    words = [f"pool={tmp_path}/mine", f"output={tmp_path}/out"]
    curate(*words, "stop_after=budget")
    path = tmp_path / "mine/class_0/000.bmp"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 255]))  # one pixel
    with pytest.raises(UserError, match=r"class_0/000\.bmp in mine has other bytes"):
        curate(*words)


def test_clusters_are_asked_for_by_enough_seeds_up_to_the_caps() -> None:
    # three clusters of 40 pictures along the axes; 5 seeds lie on the first, 3 on the second
    draw = np.random.default_rng(0)
    rows = np.repeat(np.eye(3), 40, axis=0) + draw.normal(size=(120, 3)) * 0.01
    seeds = (np.repeat(np.eye(3)[:2], [5, 3], axis=0)).astype(np.float16)
    pool = Pool(rows.astype(np.float16), 0, np.repeat(np.arange(3), 40), np.eye(3, dtype=np.float32))
    seed, place, how = ask(pool, seeds, RetrievalConfig(mode="clusters"))
    assert np.array_equal(np.sort(place), np.arange(40))  # 3 seeds are not more than 3
    assert set(seed.tolist()) <= set(range(5))
    assert how.min() > 0.9
    seed, place, _ = ask(pool, seeds, RetrievalConfig(mode="clusters", more_than=2, each=7))
    assert np.bincount(place // 40).tolist() == [7, 7]
    assert len(ask(pool, seeds, RetrievalConfig(mode="clusters", more_than=2, cap=9))[1]) == 9


def test_sets_of_seeds_ask_each_in_their_own_way(pool: Path, tmp_path: Path) -> None:
    settings = RetrievalConfig(mode="auto", large=10, k=4, sets={"one": SetConfig(mode="samples", k=1)})
    assert (settings.of("one", 3).mode, settings.of("one", 3).k) == ("samples", 1)
    assert (settings.of("two", 3).mode, settings.of("two", 10).mode) == ("clusters", "samples")
    seeds = f"one={pool}/seeds/class_0,two={pool}/seeds/class_1"
    out = curate(
        f"pool={pool}/pool/class_0,{pool}/pool/class_1", f"seeds={seeds}", f"as_is=kept={pool}/pool/class_2",
        f"output={tmp_path}/out", "retrieval.sets.one.k=1", "retrieval.sets.two.k=2", "retrieval.only=false",
        "budget.pictures=12", "budget.clustered=1",
    )  # fmt: skip
    edges = parquet.read_table(out / "edges/retrieval.parquet").to_pylist()
    assert len(edges) == 2 * 1 + 2 * 2
    kept = parquet.read_table(out / "manifest.parquet").to_pylist()
    assert len(kept) == 12
    assert sum(row["source"] == "kept" for row in kept) == 6  # all of them, whatever seeds ask for
    with pytest.raises(UserError, match="did you mean 'one'"):
        curate(
            f"pool={pool}/pool", f"seeds={seeds}", f"output={tmp_path}/other", "retrieval.sets.on.k=1",
        )  # fmt: skip


def test_a_holdout_that_comes_later_is_taken_up_by_the_stage_that_the_message_names(tmp_path: Path) -> None:
    files = class_folder(tmp_path / "pool", classes=1, each=3, formats=("png",))
    (tmp_path / "held").mkdir()
    shutil.copy(files[0], tmp_path / "held" / "leak.png")
    words = [f"pool={tmp_path}/pool", f"output={tmp_path}/out"]
    curate(*words)
    for stage in ([], ["from_stage=holdout"]):
        with pytest.raises(UserError, match="add from_stage=ingest"):
            curate(*words, f"holdout={tmp_path}/held", *stage)
    out = curate(*words, f"holdout={tmp_path}/held", "from_stage=ingest")
    assert decisions(out)["class_0/000.png"]["dropped_by"] == "holdout"


def test_licences_travel_and_can_be_asked_for(pool: Path, tmp_path: Path) -> None:
    files = sorted((pool / "pool").glob("class_?/*.png"))[:6]
    licences = ["CC0", "CC0", "MIT", "", "CC0", "own"]
    consents = ["yes", "no", "yes", "", "on", "yes"]
    rows = [",".join([str(path), *facts]) for path, *facts in zip(files, licences, consents, strict=True)]
    listed = tmp_path / "listed.csv"
    listed.write_text("\n".join(["path,licence,consent", *rows]))
    words = [f"pool={listed}", f"output={tmp_path}/out"]
    out = curate(*words)
    read = [path.stat().st_mtime_ns for path in (out / "stages/ingest/pool").iterdir()]
    assert Counter(parquet.read_table(out / "manifest.parquet")["licence"].to_pylist())["CC0"] == 3
    curate(*words, "ingest.licences=[CC0, MIT]", "from_stage=ingest")
    assert set(parquet.read_table(out / "manifest.parquet")["licence"].to_pylist()) == {"CC0", "MIT"}
    assert {row["error"] for row in decisions(out).values()} == {None, "licence: none given", "licence: own"}
    assert [path.stat().st_mtime_ns for path in (out / "stages/ingest/pool").iterdir()] == read
    curate(*words, "ingest.consents=[yes]", "from_stage=ingest")
    assert parquet.read_table(out / "manifest.parquet")["consent"].to_pylist() == ["yes"] * 3
