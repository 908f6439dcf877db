"""Shards: the same samples give the same bytes, offsets are right, and others' programs can read them."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from webdataset.compat import WebDataset

from dinov2.data.manifest import MANIFEST_SCHEMA, picture_id, write_manifest
from dinov2.data.shards import ShardSample, write_shard
from dinov2.data.sources import open_source
from dinov2.exits import UserError
from tests.pictures import encoded, picture

FORMATS = ("jpg", "png", "webp")


def samples() -> list[ShardSample]:
    made = []
    for number in range(6):
        ending = FORMATS[number % 3]
        made.append(
            ShardSample(
                id=picture_id("made", f"{number}"),
                extension=ending,
                data=encoded(picture(number, 0, (40, 30)), ending),
                facts={"uri": f"übung/{number}.{ending}", "number": number},
                label=None if number == 5 else f"class {number % 2}",
                class_index=None if number == 5 else number % 2,
            )
        )
    return made


def test_offsets_lead_to_the_original_bytes_and_bytes_are_deterministic(tmp_path: Path) -> None:
    places = write_shard(tmp_path / "a.tar", samples())
    assert write_shard(tmp_path / "b.tar", iter(samples())) == places
    whole = (tmp_path / "a.tar").read_bytes()
    assert whole == (tmp_path / "b.tar").read_bytes()
    for sample, (offset, size) in zip(samples(), places, strict=True):
        assert whole[offset : offset + size] == sample.data


def test_tarfile_reads_them(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", samples())
    with tarfile.open(tmp_path / "a.tar") as tar:
        found = {member.name: member for member in tar}
        assert all((m.mtime, m.uid, m.gid, m.uname) == (0, 0, 0, "root") for m in found.values())
        for sample in samples():
            read = {name: tar.extractfile(member) for name, member in found.items()}
            described = read[f"{sample.id}.json"]
            assert described
            label = {"label": sample.label} if sample.label else {}
            assert json.loads(described.read()) == {**sample.facts, **label}
            assert (f"{sample.id}.cls" in found) == (sample.label is not None)
    assert len(found) == 6 * 3 - 1


def test_webdataset_reads_and_decodes_them(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", samples())
    stream: Any = WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode("pil")
    read = list(stream)
    assert [item["__key__"] for item in read] == [sample.id for sample in samples()]
    for sample, item in zip(samples(), read, strict=True):
        assert (
            item[sample.extension].tobytes() == Image.open(io.BytesIO(sample.data)).convert("RGB").tobytes()
        )
        assert item.get("cls") == sample.class_index
        assert item["json"]["number"] == sample.facts["number"]


def test_a_failing_sample_leaves_no_shard(tmp_path: Path) -> None:
    def broken() -> Iterator[ShardSample]:
        yield samples()[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        write_shard(tmp_path / "a.tar", broken())
    assert not list(tmp_path.iterdir())


def test_shards_are_sources_by_themselves_and_through_their_manifest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    spans = {"000000.tar": samples()[:4], "000001.tar": samples()[4:]}
    rows = []
    for name, part in spans.items():
        places = write_shard(run / "shards" / name, part)
        rows += [
            {"id": s.id, "uri": s.facts["uri"], "source": "made", "shard": f"shards/{name}", "offset": offset,
             "size": size, "label": s.label, "licence": "CC0", "consent": "asked"}
            for s, (offset, size) in zip(part, places, strict=True)
        ]  # fmt: skip
    write_manifest(run / "manifest.parquet", pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    cache = tmp_path / "cache"
    for spec in (run, run / "manifest.parquet"):
        source = open_source(str(spec), cache=cache)
        assert source.name == "run"
        assert source.ids == [sample.id for sample in samples()]  # theirs, in the order of the shards
        assert [source.read(row) for row in range(6)] == [sample.data for sample in samples()]
        assert source.table["licence"].to_pylist() == ["CC0"] * 6
        assert set(source.table["source"].to_pylist()) == {"made"}
    alone = open_source(f"{run}/shards/*.tar", cache=cache)
    by_uri = dict(zip(alone.table["uri"].to_pylist(), range(6), strict=True))
    for name, part in spans.items():
        for sample in part:
            row = by_uri[f"{name}/{sample.id}.{sample.extension}"]
            assert alone.read(row) == sample.data
            assert alone.labels()[row] == sample.label  # the text, not the number in .cls

    with pytest.raises(UserError, match="named twice"):
        open_source(f"{run},{run / 'manifest.parquet'}".replace("run,", "run,again="), cache=cache)
    shard = run / "shards" / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"000001.tar is cut off"):
        open_source(str(run), cache=cache)
    shard.unlink()
    with pytest.raises(UserError, match=r"000001.tar of the manifest does not exist"):
        open_source(str(run), cache=cache)
