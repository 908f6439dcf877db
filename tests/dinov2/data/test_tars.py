"""Indexing tars: members are where tarfile finds them, of all kinds; damage is named."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dinov2.data.sources import open_source
from dinov2.data.tars import CorruptTar, index, members
from dinov2.exits import UserError
from tests.dinov2.data.packing import FORMATS, contents, pack, packed

LONG = "/".join(["a folder with quite a long name indeed"] * 8)  # beyond what a plain tar header holds


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_where_tarfile_finds_them(tmp_path: Path, form: str) -> None:
    names = [
        "plain.jpg",
        "x" * 96 + ".jpg",
        "a/" * 70 + "prefix.jpg",
        "ünïcode/ü.jpg",
        "stray\udcff.jpg",
        "empty.jpg",
    ]
    names += [] if form == "ustar" else [f"{LONG}/{'n' * 200}.jpg"]
    files = {name: os.urandom(700 * number) for number, name in enumerate(reversed(names))}
    path = packed(tmp_path / "x.tar", files, FORMATS[form])
    with tarfile.open(path, "a", format=FORMATS[form]) as file:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "plain.jpg"
        file.addfile(link)
    with open(path, "rb") as raw, tarfile.open(path, errors="surrogateescape") as tar:
        found = {m.name: (m.offset, m.size) for m in members(raw.fileno(), path.stat().st_size)}
        wanted = {
            m.name.replace("\udcff", "\uf7ff"): (m.offset_data, m.size)
            for m in tar
            if m.isreg() and not m.islnk()
        }
    assert found.pop("link.jpg") == found["plain.jpg"]
    assert found == wanted
    assert len(wanted) == len(names)


def test_webdataset_tars_of_anybody(tmp_path: Path, cache: Path) -> None:
    files = {
        "a/1.seg.png": b"mask", "a/1.jpg": b"one", "a/1.cls": b"7\n",
        "a/2.jpg": b"two", "a/2.json": b'{"label": "cat", "license": "CC0", "split": "valid"}',
        "a/3.webp": b"three", "a/3.txt": b"a dog",
        "a/4.jpeg": b"four", "a/4.txt": b"a long caption " * 9, "a/4.json": b"{broken",
        "a/5.jpg": b"five", "a/5.json": b'{"label": 3, "licence": "MIT"}', "a/5.cls": b"0",
        "a/6.cls": b"1", "README.txt": b"hello",
    }  # fmt: skip
    packed(tmp_path / "s-000.tar", files)
    packed(tmp_path / "s-001.tar", {"a/1.jpg": b"other", "a/1.v2.jpg": b"plain"})
    one = open_source(str(tmp_path / "s-000.tar"), cache=cache)
    assert contents(one) == {
        "a/1.jpg": b"one", "a/2.jpg": b"two", "a/3.webp": b"three", "a/4.jpeg": b"four", "a/5.jpg": b"five"
    }  # fmt: skip
    assert one.labels() == ["7", "cat", "a dog", None, "3"]
    assert one.table["licence"].to_pylist() == [None, "CC0", None, None, "MIT"]
    assert one.table["split"].to_pylist() == [None, "val", None, None, None]
    for spec in ("s-*.tar", "s-{000..001}.tar", "{s-000,s-001}.tar", "s-00[01].tar"):
        both = open_source(f"{tmp_path}/{spec}", cache=cache)
        assert contents(both) == {
            **{f"s-000.tar/{uri}": data for uri, data in contents(one).items()},
            "s-001.tar/a/1.jpg": b"other",
            "s-001.tar/a/1.v2.jpg": b"plain",
        }
        assert both.labels() == [*one.labels(), "a", "a"]  # the second is a plain one
    assert open_source(str(tmp_path), cache=cache).ids == open_source(f"{tmp_path}/*.tar", cache=cache).ids


def test_an_index_is_kept_and_made_anew_when_the_tar_changes(tree: Path, cache: Path) -> None:
    tar = pack(tree.parent / "set.tar", tree)
    before = open_source(str(tar), cache=cache)
    kept = list((cache / "index").iterdir())
    stamp = kept[0].stat().st_mtime_ns
    assert open_source(str(tar), cache=cache).ids == before.ids
    assert kept[0].stat().st_mtime_ns == stamp
    (tree / "train/class_0/000.jpg").unlink()
    pack(tar, tree)
    assert len(open_source(str(tar), cache=cache)) == len(before) - 1
    kept[0].write_bytes(b"damaged")
    assert len(open_source(str(tar), cache=cache)) == len(before) - 1
    assert list((cache / "index").iterdir()) == kept


def damaged(tar: Path, tree: Path) -> None:
    data = bytearray(pack(tar, tree).read_bytes())
    with tarfile.open(tar) as file:
        middle = file.getmembers()[9]
    data[middle.offset + 3 : middle.offset + 9] = b"damage"
    tar.write_bytes(data)


def cut(tar: Path, tree: Path) -> None:
    with tarfile.open(pack(tar, tree)) as file:
        last = file.getmembers()[-1]
    os.truncate(tar, last.offset_data + last.size - 1)


def zipped(tar: Path, tree: Path) -> None:
    with tarfile.open(tar, "w:gz") as file:
        file.add(tree)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tar, tree: None, r"the source .*x\.tar does not exist"),
        (lambda tar, tree: tar.mkdir(), r"there are no pictures in .*x\.tar"),
        (lambda tar, tree: tar.write_bytes(b""), r"x\.tar is corrupt: it is too short"),
        (lambda tar, tree: tar.write_bytes(b"no tar" * 999), r"x\.tar is corrupt: it is not a tar"),
        (damaged, r"x\.tar is corrupt: its header at byte [\d,]+ is damaged"),
        (cut, r"x\.tar is corrupt: it is cut off inside a file at byte"),
        (zipped, r"x\.tar is corrupt: it is compressed with gzip"),
        (lambda tar, tree: packed(tar, {"readme.txt": b""}), r"there are no pictures in .*x\.tar"),
    ],
)
def test_a_bad_tar_is_named(
    tree: Path, cache: Path, make: Callable[[Path, Path], object], message: str
) -> None:
    tar = tree.parent / "x.tar"
    make(tar, tree)
    for spec in (tar, f"{tree},{tar}"):
        with pytest.raises(UserError, match=message) as caught:
            open_source(str(spec), cache=cache)
        assert "\n" not in str(caught.value)


def test_random_damage_to_a_tar_never_ends_in_a_traceback(tree: Path) -> None:
    draw = np.random.default_rng(0)
    whole = pack(tree.parent / "set.tar", tree, tarfile.PAX_FORMAT).read_bytes()
    hurt = tree.parent / "hurt.tar"
    for _ in range(150):
        data = np.frombuffer(whole, np.uint8).copy()
        block = draw.integers(0, len(data) // 512) * 512
        data[block + draw.integers(0, 512, 4)] = draw.integers(0, 256, 4)
        hurt.write_bytes(
            data[: draw.integers(0, len(data))].tobytes() if draw.random() < 0.3 else data.tobytes()
        )
        with open(hurt, "rb") as file:
            try:
                index(file.fileno(), hurt.stat().st_size)
            except CorruptTar:
                continue
