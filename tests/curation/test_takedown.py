"""Pictures are taken out of a finished folder, and stay out."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from pyarrow import parquet

from curation.__main__ import main
from dinov2.data.manifest import read_manifest
from dinov2.data.sources import open_source
from dinov2.exits import UserError
from tests.curation.pools import command, curate, decisions, make_pool
from tests.faults import assert_survives, when


def test_only_the_shards_concerned_change_and_what_is_out_stays_out(tmp_path: Path) -> None:
    root = make_pool(tmp_path)
    words = [f"pool={root}/pool", f"output={root}/out", "write.shard=6"]
    out = curate(*words)
    before = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    manifest = read_manifest(out / "manifest.parquet").to_pylist()
    by_id, by_uri, by_hash = manifest[0], manifest[1], manifest[-1]
    listed = tmp_path / "remove.txt"
    asked = [by_id["id"], by_uri["uri"], by_hash["sha256"].upper(), "nobody.jpg"]
    listed.write_text("\n".join(["# asked for", *asked]))
    main([f"remove={listed}", f"output={out}"])
    concerned = {Path(row["shard"]).name for row in (by_id, by_uri, by_hash)}
    after = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    assert {name: after[name] for name in before.keys() - concerned} == {
        name: before[name] for name in before.keys() - concerned
    }
    assert not concerned & after.keys()
    left, pool = open_source(str(out)), open_source(f"{root}/pool")
    place = {name: row for row, name in enumerate(pool.ids)}
    gone = {by_id["id"], by_uri["id"], by_hash["id"]}
    assert sorted(left.ids) == sorted(row["id"] for row in manifest if row["id"] not in gone)
    assert all(left.read(row) == pool.read(place[name]) for row, name in enumerate(left.ids))
    assert decisions(out)[by_uri["uri"]]["dropped_by"] == "takedown"
    assert not any(name.encode() in data for name in gone for data in after.values())
    facts = json.loads(_member(out, left.ids[0]))
    assert facts["uri"] in {row["uri"] for row in manifest}
    record = parquet.read_table(out / "takedowns.parquet").to_pylist()
    assert {row["asked"] for row in record} == {by_id["id"], by_uri["uri"], by_hash["sha256"]}
    main([f"remove={listed}", f"output={out}"])  # once more changes nothing
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == after
    curate(*words, "duplicates.threshold=0.9", "from_stage=duplicates")
    assert not gone & set(open_source(str(out)).ids)
    with pytest.raises(UserError, match="none of 1"):
        listed.write_text("nobody.jpg\n")
        main([f"remove={listed}", f"output={out}"])


def test_killed_while_it_takes_out_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    root = make_pool(tmp_path)
    before = curate(f"pool={root}/pool", f"output={tmp_path}/before", "write.shard=6", "calibrate.pictures=2")
    rows = read_manifest(before / "manifest.parquet").to_pylist()
    copied = sorted(row["id"] for row in rows)[0]  # that calibration has a copy of
    listed = tmp_path / "remove.txt"
    listed.write_text(f"{copied}\n{rows[0]['uri']}\n{rows[-1]['sha256']}\ncopies/exact.png\n")
    for name in ("whole", "killed"):
        shutil.copytree(before, tmp_path / name / "out")
    steps = ["takedowns.parquet", "shards/*.tar", "manifest.parquet", "decisions.parquet"]
    steps += ["stages/write/begun.json", "stages/calibrate/copies/*.npy"]
    assert_survives(
        command(f"remove={listed}", "output=out"),
        tmp_path,
        results=["out/**/*", "out/**/.*"],
        ignore=["out/.lock"],
        moments=[when(f"out/{step}", new=False) for step in steps],
        at_least=len(steps),
    )


def _member(out: Path, name: str) -> bytes:
    for path in (out / "shards").iterdir():
        with tarfile.open(path) as tar:
            if f"{name}.json" in tar.getnames() and (file := tar.extractfile(f"{name}.json")):
                return file.read()
    raise AssertionError(name)
