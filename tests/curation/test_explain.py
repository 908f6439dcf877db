"""`dinov2 explain`: pictures by all their names, of the pool or not, of runs that are finished or not."""

import os
import shlex
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pytest

from curation.__main__ import main
from curation.explain import explain
from dinov2.data.sources import open_source
from dinov2.exits import UserError
from tests.curation.pools import curate, decisions
from tests.pictures import class_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two folders, a list of `file://` URLs and an as_is picture, with a leak and seeds."""
    root = tmp_path_factory.mktemp("run")
    for number, name in enumerate(("p1", "p2", "listed here", "seeds", "held", "mine")):
        class_folder(root / name, classes=1, each=2, first=number * 2, formats=("png",))
    shutil.copy(root / "p1/class_0/000.png", root / "p2/class_0/000.png")
    shutil.copy(root / "p1/class_0/001.png", root / "held/class_0/leak.png")
    urls = [path.as_uri() for path in sorted((root / "listed here").rglob("*.png"))]
    (root / "list.txt").write_text("\n".join(urls))
    curate(
        f"pool={root}/p1,{root}/p2,{root}/list.txt", f"as_is={root}/mine", f"seeds={root}/seeds",
        f"holdout={root}/held", f"output={root}/out", "retrieval.k=20", "stop_after=write",
    )  # fmt: skip
    return root


def test_file_urls_of_a_list_are_read(root: Path) -> None:
    rows = {uri: row for uri, row in decisions(root / "out").items() if uri.startswith("file://")}
    assert len(rows) == 2
    assert all("%20" in uri and row["error"] is None for uri, row in rows.items())


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("p1", "p1/class_0/000.png"),
        ("p2", "p2/class_0/000.png"),
        ("mine", "mine/class_0/010.png"),
        ("list.txt", "listed here/class_0/004.png"),
    ],
)
def test_a_path_as_one_types_it_is_the_picture_that_lies_there(
    root: Path, source: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = open_source(f"{root}/{source}").table
    (name,) = table.filter(pc.ends_with(table["uri"], Path(path).name))["id"].to_pylist()
    if not (root / "link").exists():
        (root / "link").symlink_to(root)
    monkeypatch.chdir(root)
    for form in (path, f"./{path}", f"{root}/link/{path}"):
        assert next(iter(explain(root / "out", form))).startswith(f"{name}  ")


def test_two_pictures_of_one_uri_are_told_apart_by_their_paths(root: Path) -> None:
    one, two = (next(iter(explain(root / "out", f"{root}/{name}/class_0/000.png"))) for name in ("p1", "p2"))
    assert one.split("  ")[0] != two.split("  ")[0]
    with pytest.raises(UserError, match=r"2 pictures match 'class_0/000.png'.* a path to the file"):
        list(explain(root / "out", "class_0/000.png"))


def test_an_unknown_name_says_which_are_known(root: Path) -> None:
    with pytest.raises(
        UserError, match=r"by id, by uri .*the path of a file in pool=.*nearest: .*class_0/003\.png"
    ):
        list(explain(root / "out", "elsewhere/003.png"))
    (root / "other.png").touch()
    with pytest.raises(UserError, match="though there is such a file"):
        list(explain(root / "out", str(root / "other.png")))


def test_a_holdout_picture_and_a_seed_are_called_so(root: Path) -> None:
    leak = list(explain(root / "out", f"{root}/held/class_0/leak.png"))
    assert leak == list(explain(root / "out", "class_0/leak.png"))
    assert "a picture of the holdout" in leak[1]
    assert leak[2].startswith("  leaked, similarity 1.000, as ") and leak[2].endswith(" class_0/001.png")
    clean = list(explain(root / "out", "class_0/008.png"))
    assert clean[1:] == [
        "  a picture of the holdout, not of the pool",
        "  nothing in the pool is a leak of it",
    ]
    seed = list(explain(root / "out", os.path.relpath(root / "seeds/class_0/006.png")))
    assert "a seed" in seed[1] and "  asks for, similarity" in seed[2]


def test_an_unfinished_run_says_how_far_it_is_and_how_it_goes_on(tmp_path: Path) -> None:
    class_folder(tmp_path / "pool", classes=1, each=2, formats=("png",))
    out = curate(f"pool={tmp_path}/pool", f"output={tmp_path}/out", "stop_after=duplicates")
    with pytest.raises(UserError, match="as far as duplicates") as caught:
        list(explain(out, "000.png"))
    command = str(caught.value).partition("go on with: dinov2 curate ")[2]
    main(shlex.split(command))
    assert list(explain(out, f"{tmp_path}/pool/class_0/000.png"))
    for other in (tmp_path / "pool", tmp_path / "none"):
        with pytest.raises(UserError, match="is no folder of dinov2 curate"):
            list(explain(other, "x"))
