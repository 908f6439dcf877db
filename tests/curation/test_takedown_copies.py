"""With a picture go its copies; it is not shown again; and a list that leaves nothing changes nothing."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from curation.__main__ import main
from curation.explain import explain
from curation.report.pictures import GREY
from dinov2.data.manifest import read_manifest, write_manifest
from dinov2.data.sources import Source, open_source
from dinov2.exits import UserError
from tests.curation.pools import curate, decisions
from tests.pictures import class_folder, encoded

KEPT, EXACT, PIXELS, AGAIN = "class_0/000.png", "class_0/000_exact.png", "later/pixels.bmp", "later/small.jpg"


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pool/`, `holdout/` with one picture of no concern and a copy of one in the pool, and `out/`."""
    root = tmp_path_factory.mktemp("pictures")
    class_folder(root / "pool", classes=2, each=4, size=(128, 112), formats=("png",))
    class_folder(root / "holdout", classes=1, each=1, size=(128, 112), first=60, formats=("png",))
    picture = Image.open(root / "pool" / KEPT)
    (root / "pool" / EXACT).write_bytes((root / "pool" / KEPT).read_bytes())
    (root / "pool" / "later").mkdir()
    (root / "pool" / PIXELS).write_bytes(encoded(picture, "bmp"))
    (root / "pool" / AGAIN).write_bytes(encoded(picture, "jpg", quality=60))
    (root / "holdout" / "same.png").write_bytes((root / "pool" / "class_1" / "001.png").read_bytes())
    curate(*_words(root))
    return root


@pytest.fixture
def root(before: Path, tmp_path: Path) -> Path:
    """The pool, and a folder of one's own."""
    for name in ("pool", "holdout"):
        (tmp_path / name).symlink_to(before / name)
    shutil.copytree(before / "out", tmp_path / "out")
    return tmp_path


def _words(root: Path) -> list[str]:
    pool, holdout = ((root / name).resolve() for name in ("pool", "holdout"))
    return [
        f"pool={pool}", f"seeds={pool}/class_0", f"holdout={holdout}", f"output={root}/out",
        "retrieval.k=8", "duplicates.keep=first", "calibrate.pictures=2", "duplicates.threshold=0.75",
        "leaks.threshold=0.7",
    ]  # fmt: skip


def _remove(root: Path, *named: str, copies: bool = True) -> None:
    (root / "remove.txt").write_text("\n".join(named))
    main([f"remove={root}/remove.txt", f"output={root}/out", f"copies={str(copies).lower()}"])


def _reasons(root: Path) -> dict[str, str | None]:
    return {uri: row["dropped_by"] for uri, row in decisions(root / "out").items()}


def _kept(root: Path) -> set[str]:
    return {row["uri"] for row in read_manifest(root / "out" / "manifest.parquet").to_pylist()}


@pytest.mark.parametrize("named", [KEPT, AGAIN])
def test_all_copies_go_at_once_and_none_comes_back(
    root: Path, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {KEPT, EXACT, PIXELS, AGAIN}
    stays = next(uri for uri, reason in _reasons(root).items() if uri in whole and reason is None)
    others = _kept(root) - whole
    _remove(root, named)
    said = capsys.readouterr().err
    equal = 0 if named == AGAIN else 2
    assert ("2 more with equal bytes or pixels" in said) == (equal == 2)
    assert f"{3 - equal} more that are copies" in said
    record = parquet.read_table(root / "out" / "takedowns.parquet").to_pylist()
    assert {row["uri"]: row["why"] for row in record}[named] == "named"
    assert {row["uri"] for row in record} == whole
    assert {row["asked"] for row in record} == {named}
    assert _kept(root) == others
    after = decisions(root / "out")
    assert {uri for uri, row in after.items() if row["dropped_by"] == "takedown"} == whole
    curate(*_words(root), "from_stage=write", "stop_after=write")
    assert decisions(root / "out") == after
    curate(*_words(root), "from_stage=duplicates", "stop_after=write")
    assert decisions(root / "out") == after
    assert stays not in _kept(root)
    assert _kept(root) == others


def test_copies_false_takes_only_what_is_equal(root: Path) -> None:
    _remove(root, KEPT, copies=False)
    assert {uri for uri, reason in _reasons(root).items() if reason == "takedown"} == {KEPT, EXACT, PIXELS}
    curate(*_words(root), "from_stage=duplicates", "stop_after=write")
    assert AGAIN in _kept(root)
    _remove(root, KEPT)  # its group is no longer one
    assert AGAIN in _kept(root)


def test_what_is_out_is_not_read_or_shown_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = "class_1/001.png"  # that the holdout has too
    _remove(root, KEPT, twin)
    pool, held = open_source(f"{root}/pool"), open_source(f"{root}/holdout")
    gone = {row["id"] for row in pool.table.to_pylist() if _reasons(root)[row["uri"]] == "takedown"}
    assert len(gone) == 5
    _count_reads(monkeypatch, read := set())
    drawn = _count_tiles(monkeypatch)
    curate(*_words(root), "from_stage=report")
    held_twin = next(row["id"] for row in held.table.to_pylist() if row["uri"] == "same.png")
    assert read
    assert not read & {*gone, held_twin}
    assert drawn
    told = "\n".join(explain(root / "out", AGAIN))
    assert f"dropped by takedown: taken for a copy of {KEPT}, on " in told
    assert "sha256" not in told
    read.clear()
    curate(*_words(root), "ingest.small=20", "from_stage=ingest")  # reads all others anew
    assert len(read) > len(pool) - len(gone)
    assert not read & gone
    assert not gone & set(open_source(f"{root}/out").ids)


def test_a_list_of_everything_changes_nothing(root: Path) -> None:
    before = _bytes(root / "out")
    with pytest.raises(UserError, match="would leave nothing"):
        _remove(root, *_kept(root))
    assert _bytes(root / "out") == before


def test_a_hash_that_only_the_manifest_had_is_known_once_more(root: Path) -> None:
    """As of a picture that is written with faces blurred, when the command was killed after the manifest."""
    path, blurred = root / "out" / "manifest.parquet", "f" * 64
    manifest = read_manifest(path)
    hashes = pa.array([blurred, *manifest["sha256"].to_pylist()[1:]], manifest.schema.field("sha256").type)
    name = manifest["id"][0].as_py()
    place = manifest.schema.get_field_index("sha256")
    write_manifest(path, manifest.set_column(place, manifest.schema.field(place), hashes))
    _remove(root, blurred)
    after = _bytes(root / "out")
    record = parquet.read_table(root / "out" / "takedowns.parquet").to_pylist()
    (row,) = (row for row in record if row["id"] == name)
    assert (row["asked"], row["sha256"] == blurred) == (blurred, False)
    _remove(root, blurred)
    assert _bytes(root / "out") == after


def _bytes(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _count_reads(monkeypatch: pytest.MonkeyPatch, read: set[str]) -> None:
    """Ids of the pictures that are read from now on."""
    real = Source.read

    def reading(self: Source, row: int) -> bytes:
        read.add(self.table["id"][row].as_py())
        return real(self, row)

    monkeypatch.setattr(Source, "read", reading)


def _count_tiles(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """Grey tiles that the report's page shows from now on."""
    from curation.report import page

    drawn: list[Image.Image] = []
    real = page.Card

    def card(images: list[Image.Image], *words: Any) -> object:
        drawn.extend(image for image in images if image.getextrema() == ((GREY, GREY),) * 3)
        return real(images, *words)

    monkeypatch.setattr(page, "Card", card)
    return drawn
