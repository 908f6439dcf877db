"""Sources: whatever names them, the same pictures have the same rows, and every byte comes back."""

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from dinov2.data.decode import Unreadable
from dinov2.data.sources import open_source
from dinov2.data.specs import default_name, expand_braces, split_at_commas
from dinov2.exits import UserError
from tests.dinov2.data.packing import FORMATS, contents, pack
from tests.pictures import encoded, odd_pictures, picture


def test_a_tree_and_its_tar_are_the_same_source(tree: Path, cache: Path) -> None:
    folder = open_source(str(tree), cache=cache)
    paths = sorted(str(path.relative_to(tree)) for path in tree.glob("*/class_*/*"))
    assert folder.table["uri"].to_pylist() == paths
    assert folder.labels() == [path.split("/")[1] for path in paths]
    assert folder.table["split"].to_pylist() == [path.split("/")[0] for path in paths]
    assert contents(folder) == {path: (tree / path).read_bytes() for path in paths}
    for form in FORMATS.values():
        tar = open_source(str(pack(tree.parent / "set.tar", tree, form)), cache=cache)
        for name in ("id", "uri", "source", "label", "split", "size"):
            assert tar.table[name].to_pylist() == folder.table[name].to_pylist(), name
        assert tar.fingerprint == folder.fingerprint
        assert contents(tar) == contents(folder)


def test_a_split_is_a_folder_a_folder_in_a_tar_or_asked_for(tree: Path, cache: Path) -> None:
    pack(tree.parent / "set.tar", tree)
    folder = open_source(str(tree / "val"), cache=cache)
    inside = open_source(f"{tree}.tar/val", cache=cache)
    asked = open_source(f"{tree}.tar", cache=cache, split="validation")
    assert folder.name == inside.name == "set-val"
    assert folder.ids == inside.ids
    assert contents(folder) == contents(inside)
    assert list(contents(folder).values()) == list(contents(asked).values())
    for source in (folder, inside, asked):
        assert source.labels() == ["class_0", "class_1", "class_2"]
        assert source.table["split"].to_pylist() == ["val"] * 3


def test_a_class_called_train_is_no_split(tmp_path: Path, cache: Path) -> None:
    for name in ("train/1.png", "bus/1.png", "bus/deep/er.png", "loose.png"):
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "v" / name).write_bytes(b"x")
    source = open_source(str(tmp_path / "v"), cache=cache)
    assert source.labels() == ["bus", "bus", None, "train"]
    assert source.table["split"].to_pylist() == [None] * 4


def test_lists_in_every_form(tree: Path, cache: Path) -> None:
    absolute = str(tree / "val/class_0/009.jpg")
    uris = sorted([absolute, "train/class_0/000.jpg", "missing.jpg"])
    facts = {"label": ["007", "b", "c"], "split": ["valid", "dev", None], "licence": ["CC0"] * 3}
    columns = {"PATH": uris, **facts, "other": [1.5, 2, 3]}
    (tree / "l.txt").write_text("# mine\n\n" + "\n".join([*reversed(uris), uris[0]]) + "\n")
    parquet.write_table(pa.table(columns), tree / "l.parquet")
    for ending, comma in (("csv", ","), ("tsv", "\t")):
        rows = [list(columns), *zip(*columns.values(), strict=True)]
        text = "".join(comma.join("" if v is None else f'"{v}"' for v in row) + "\n" for row in rows)
        (tree / f"l.{ending}").write_text(text)
    for ending in ("txt", "csv", "tsv", "parquet"):
        source = open_source(f"mine={tree}/l.{ending}", cache=cache)
        assert source.table["uri"].to_pylist() == uris
        whole = open_source(f"mine={tree}/l.txt", cache=cache)
        assert source.fingerprint == whole.fingerprint
        assert source.read(uris.index(absolute)) == Path(absolute).read_bytes()
        with pytest.raises(Unreadable, match="No such file"):
            source.read(uris.index("missing.jpg"))
        if ending != "txt":
            assert source.labels() == ["007", "b", "c"]
            assert source.table["split"].to_pylist() == ["val", "dev", None]
            assert source.table["licence"].to_pylist() == ["CC0"] * 3


@pytest.mark.parametrize("ending", ["txt", "csv", "parquet"])
def test_lists_of_file_urls(tmp_path: Path, cache: Path, ending: str) -> None:
    names = ["plain.jpg", "a blank.jpg", "50%.jpg", "häuser.jpg"]
    for name in names:
        (tmp_path / name).write_text(name)
    urls = [(tmp_path / name).as_uri() for name in names[1:]] + [f"file://localhost{tmp_path}/plain.jpg"]
    if ending == "parquet":
        parquet.write_table(pa.table({"uri": urls}), tmp_path / "l.parquet")
    else:
        (tmp_path / f"l.{ending}").write_text("\n".join([*(["uri"] if ending == "csv" else []), *urls]))
    source = open_source(f"{tmp_path}/l.{ending}", cache=cache)
    assert source.table["uri"].to_pylist() == sorted(urls)
    assert sorted(source.read(row).decode() for row in range(4)) == sorted(names)
    assert source.table["size"].null_count == 0


def test_a_list_cannot_start_programs(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "l.txt").write_text(f"pipe:touch {tmp_path}/started\nreal.jpg\n")
    (tmp_path / "real.jpg").write_bytes(b"x")
    source = open_source(f"{tmp_path}/l.txt", cache=cache)
    with pytest.raises(Unreadable):
        source.read(0)
    assert not (tmp_path / "started").exists()


def test_several_sources_and_their_names(tree: Path, cache: Path) -> None:
    source = open_source(f"{tree}/train, old={tree}/val,{tree}/val/class_0/009.jpg", cache=cache)
    assert source.name == "set-train+old+009.jpg"
    assert source.table["source"].to_pylist() == ["set-train"] * 9 + ["old"] * 3 + ["009.jpg"]
    assert len(set(source.ids)) == 13
    picked = source.select(np.array([12, 0, 9]))
    assert picked.ids == [source.ids[row] for row in (12, 0, 9)]
    assert [picked.read(row) for row in range(3)] == [source.read(row) for row in (12, 0, 9)]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/d/pets", "pets"),
        ("/d/pets/", "pets"),
        ("/d/pets.tar", "pets"),
        ("/d/pets.tar/train", "pets-train"),
        ("/d/pets/train/images", "pets-train-images"),
        ("/d/pets/train.tar", "pets-train"),
        ("/train", "train"),
        ("/d/cc-{000..999}.tar", "cc"),
        ("/d/shards/*.tar", "shards"),
        ("/d/pets/train/*.tar", "pets-train"),
        ("/d/run/manifest.parquet", "run"),
        ("/d/lists/clean.parquet", "clean"),
        ("https://host/set/cc-{00..10}.tar", "cc"),
        ("pipe:gunzip -c /d/pets.tar", "pets"),
    ],
)
def test_default_names(place: str, name: str) -> None:
    assert default_name(place) == name


def test_commas_and_braces() -> None:
    assert split_at_commas("a,{b,c}-{0..2}.tar , d=e,") == ["a", "{b,c}-{0..2}.tar", "d=e"]
    assert expand_braces("{b,c}-{08..10}") == ["b-08", "b-09", "b-10", "c-08", "c-09", "c-10"]
    assert expand_braces("{8..10}") == ["8", "9", "10"]
    with pytest.raises(UserError, match="no range of shards"):
        expand_braces("{9..1}")


def test_links_are_followed_but_not_in_circles(tree: Path, cache: Path) -> None:
    (tree / "train/again").symlink_to(tree)
    (tree / "train/class_1/again").symlink_to(tree / "train")
    (tree / "train/class_0/linked.jpg").symlink_to(tree / "val/class_0/009.jpg")
    (tree / "train/copy").symlink_to(tree / "val/class_0")
    uris = open_source(str(tree), cache=cache).table["uri"].to_pylist()
    assert {"train/class_0/linked.jpg", "train/copy/009.jpg"} <= set(uris)
    assert not any("again" in uri for uri in uris)


def test_names_that_are_not_utf8_are_read(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"coffee")
    folder = open_source(str(tmp_path / "t"), cache=cache)
    tar = open_source(str(pack(tmp_path / "t.tar", tmp_path / "t")), cache=cache)
    assert folder.read(0) == tar.read(0) == b"coffee"
    assert folder.ids == tar.ids


def test_what_cannot_be_read_is_said(tree: Path, cache: Path) -> None:
    folder = open_source(str(tree), cache=cache)
    (tree / "train/class_0/000.jpg").unlink()
    with pytest.raises(Unreadable, match="No such file"):
        folder.read(0)
    tar = pack(tree.parent / "set.tar", tree)
    source = open_source(str(tar), cache=cache)
    rows = np.argsort(source.table["offset"].to_numpy())
    last = int(rows[-1])
    os.truncate(tar, source.table["offset"][last].as_py() + 10)
    with pytest.raises(Unreadable, match="ends after 10 of the"):
        source.read(last)
    assert source.read(int(rows[0]))


def test_pickles_are_small_and_work_in_spawned_processes(tree: Path, cache: Path, tmp_path: Path) -> None:
    tar = open_source(str(pack(tree.parent / "set.tar", tree)), cache=cache)
    many = tar.select(np.arange(30_000) % len(tar))
    assert many.table.nbytes > 1 << 20
    assert len(pickle.dumps(many)) < 1000
    again = pickle.loads(pickle.dumps(many))
    assert again.fingerprint == many.fingerprint
    first = contents(tar)  # opens files, which must not travel
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for sent in (tar, many):
            assert pool.map(sent.read, range(len(tar))) == list(first.values())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no source is named"),
        ("{tree}/none", "none does not exist"),
        ("{tree}/*.tar", "nothing matches"),
        ("{tree}/x-{{0..2}}.tar", r"x-0\.tar does not exist"),
        ("{tree}/notes.txt", "none of the files listed in .*notes.txt exists"),
        ("{tree}/archive.pdf", "archive.pdf is no source"),
        ("{tree}/train,{tree}/train", "two sources are called 'set-train'"),
        ("{tree}/c.csv", r"no column of paths: name one uri, path or file \(it has: picture, label\)"),
        ("{tree}/m.csv", "m.csv has a column 'Lable': call it 'label', or something else"),
        ("{tree}/t.txt", "t.txt lists tars"),
        ("{tree}/e.csv", "cannot be read as a list: Empty CSV file"),
        ("{tree}/d.parquet", "d.parquet is dinov2.decisions, not a source"),
        ("{tree}/b.parquet", "cannot be read as a list"),
        ("{tree}.tar/none", r"there are no pictures in .*set\.tar/none"),
        ("https://localhost:9/x.tar", "https://localhost:9/x.tar cannot be fetched"),
        ("pipe:cat {tree}/none.tar", r"pipe:cat .* failed with status 1: cat: .*none\.tar"),
    ],
)
def test_a_bad_spec_is_named(tree: Path, cache: Path, spec: str, message: str) -> None:
    pack(tree.parent / "set.tar", tree)
    (tree / "c.csv").write_text("picture,label\na.jpg,1\n")
    (tree / "e.csv").write_text("")
    (tree / "m.csv").write_text("path,Lable\na.jpg,1\n")
    (tree / "t.txt").write_text("0.tar\n1.tar\n")
    (tree / "b.parquet").write_text("no")
    schema = pa.schema({"id": pa.string(), "uri": pa.string()}, {"format": "dinov2.decisions"})
    parquet.write_table(pa.table({"id": ["a"], "uri": ["b"]}, schema=schema), tree / "d.parquet")
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec.format(tree=tree), cache=cache)
    assert "\n" not in str(caught.value)


def test_a_split_that_is_not_there_is_named(tree: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="set has no split 'test'; it has train, val"):
        open_source(str(tree), cache=cache, split="test")


def test_odd_file_names_and_capitals_are_found(tmp_path: Path, cache: Path) -> None:
    odd = odd_pictures(tmp_path / "odd", (8, 6))
    found = open_source(str(tmp_path / "odd"), cache=cache)
    assert sorted(found.table["uri"].to_pylist()) == sorted(odd)
    (tmp_path / "a,b=c").mkdir()
    (tmp_path / "a,b=c/x.png").write_bytes(encoded(picture(0, 0, (8, 6))))
    assert open_source(str(tmp_path / "a,b=c"), cache=cache).name == "a,b=c"


@pytest.mark.data
def test_the_real_packs(real_pictures: Path, cache: Path) -> None:
    pool = open_source(str(real_pictures / "messy_pool.tar"), cache=cache)
    assert len(pool) == 1124  # all but a .svg
    assert set(pool.labels()) == {"clothing", "potatoes", "odd_modes", "odd_files"}
    train = open_source(f"{real_pictures}/imagenette112.tar/train", cache=cache)
    assert (train.name, len(train), len(set(train.labels()))) == ("imagenette112-train", 9469, 10)
    for split, classes in (("train", 81), ("val", 60)):
        shop = open_source(f"{real_pictures}/grocery.tar", cache=cache, split=split)
        assert len(set(shop.labels())) == classes
        assert all(shop.read(row)[:2] == b"\xff\xd8" for row in range(0, len(shop), 50))
