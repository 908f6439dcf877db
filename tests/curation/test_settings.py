"""Settings that cannot work are refused before anything is read."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from curation import holdout
from curation.bounds import BOUNDS
from curation.config import CurateConfig
from dinov2.config import read
from dinov2.exits import UserError
from tests.curation.pools import curate, decisions, run
from tests.pictures import class_folder


def numbers(schema: type, before: str = "") -> Iterator[str]:
    """Dotted keys of all settings that are, or may be, or hold, a number."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind, key = hints[field.name], before + field.name
        if typing.get_origin(kind) is dict:
            yield from numbers(typing.get_args(kind)[1], f"{key}.NAME.")
        elif dataclasses.is_dataclass(kind):
            yield from numbers(typing.cast(type, kind), f"{key}.")
        elif {int, float} & {kind, *typing.get_args(kind)}:
            yield key


def test_every_number_has_bounds() -> None:
    assert sorted(numbers(CurateConfig)) == sorted(BOUNDS)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("duplicates.threshold=75", "0 to 1 (75 percent is 0.75)"),
        ("leaks.threshold=70", "0 to 1 (70 percent is 0.7)"),
        ("duplicates.threshold=-1", "0 to 1"),
        ("duplicates.threshold=.nan", "0 to 1"),
        ("leaks.cosine=nan", "-1 to 1"),
        ("duplicates.hash_distance=-1", "0 to 64"),
        ("leaks.hash_distance=65", "0 to 64"),
        ("search.recall=2", "0 to 1"),
        ("search.floor=1.5", "0 to 1"),
        ("search.memory_gib=0", "1e-06 or more"),
        ("search.memory_gib=inf", "1e-06 or more"),
        ("calibrate.precision=2", "0 to 1"),
        ("budget.retrieved=-1", "0 or more"),
        ("budget.retrieved=0", "budget.clustered=0"),
        ("seed=-1", "0 to 4294967295"),
        ("duplicates.split=1", "2 or more"),
        ("clusters.levels=[5,0]", "1 or more"),
        ("filters.classifiers.nsfw.most=50", "0 to 1"),
        ("filters.classifiers.nsfw.std=[1,0,1]", "1e-06 or more"),
        ("retrieval.sets.one.minimum=1.5", "-1 to 1"),
    ],
)
def test_a_number_out_of_its_bounds_is_named_with_them(word: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        curate(f"pool={tmp_path}/none", f"output={tmp_path}/out", word)
    assert word.partition("=")[0] in str(caught.value)
    assert says in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", sorted(BOUNDS))
def test_nothing_is_as_many_as_not_a_number(key: str) -> None:
    key = key.replace("NAME", "mine")
    value = "[nan]" if key.endswith((".mean", ".std", ".levels")) else "nan"
    with pytest.raises(UserError, match=key):
        read(CurateConfig, ["pool=x", "output=y", f"{key}={value}"]).check()


def test_no_bound_holds_infinity() -> None:
    assert not any(value in bounds for bounds in BOUNDS.values() for value in (math.inf, -math.inf, math.nan))


def test_what_is_equal_leaks_whatever_the_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_ = class_folder(tmp_path / "pool", classes=1, each=4, formats=("png",))
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "bytes.png").write_bytes(first.read_bytes())
    Image.open(second).save(tmp_path / "held" / "pixels.bmp")
    monkeypatch.setattr(holdout, "threshold_of", lambda run, stage: 2.0)
    out = curate(
        f"pool={tmp_path}/pool", f"holdout={tmp_path}/held", f"output={tmp_path}/out", "stop_after=write"
    )
    lost = [uri for uri, row in decisions(out).items() if row["dropped_by"] == "holdout"]
    assert sorted(lost) == [str(path.relative_to(tmp_path / "pool")) for path in (first, second)]


def test_a_wrong_number_is_status_2(tmp_path: Path) -> None:
    done = run(f"pool={tmp_path}", f"output={tmp_path}/out", "leaks.threshold=70")
    assert done.returncode == 2
    assert done.stderr == "dinov2 curate: leaks.threshold=70.0: give 0 to 1 (70 percent is 0.7)\n"
