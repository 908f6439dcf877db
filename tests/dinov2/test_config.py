"""Settings, folder claims and the front door, as a user meets them."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from dinov2.config import (
    at_least,
    by_name,
    fingerprint,
    identity,
    listed,
    read,
    required,
    runtime,
    section,
    usage,
)
from dinov2.exits import UserError
from dinov2.files import lock, whole_folder, write_whole
from dinov2.folders import claim
from dinov2.train.ablations import AblationConfig
from dinov2.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1e-3  # how fast
    sizes: list[int] = listed(1, 2)
    words: list[str] = listed()
    quick: bool = False
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: str = required()  # where pictures lie
    output: str = runtime("out")
    count: int = 1
    inner: Inner = section(Inner)
    machine: Inner = runtime(Inner)
    shares: dict[str, float] = by_name()
    sets: dict[str, Inner] = by_name()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("inner.rte=1", "did you mean 'inner.rate'?"),
        ("rate=1", "did you mean 'inner.rate'?"),
        ("count=many", "could not be converted to Integer"),
        ("count=1.5", "could not be converted to Integer"),
        ("count=null", "Incompatible value 'None'"),
        ("inner.sizes=[a]", "could not be converted to Integer"),
        ("inner.words=yes", "give a list, as in inner.words=[yes]"),
        ("inner=3", "is a section"),
        ("count.deeper=3", "there is no setting"),
        ("loose", "no test recipe 'loose'"),
        ("data.yaml", "there is no recipe file"),
        ("inner.rate=.1", "data= is missing"),
    ],
)
def test_a_wrong_word_is_one_line_that_says_what_to_do(word: str, message: str):
    with pytest.raises(UserError) as caught:
        read(Settings, [word], recipes="test")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["12e3", "a,b", "x/{000..003}.tar", "${data}", "name=a: b", "null/x", "1"])
def test_text_stays_text_however_much_it_looks_like_yaml(path: str):
    assert read(Settings, [f"data={path}"]).data == path


@pytest.mark.parametrize(
    "text", ["yes", "no", "on", "off", "true", "1.10", "007", "1e3", "2024-01-02", "CC0"]
)
def test_words_in_lists_and_recipes_are_not_read_as_something_else(text: str, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {text}\ninner: {{words: [{text}, a], note: {text}}}\n")
    for config in (
        read(Settings, [f"data={text}", f"inner.words=[{text}, a]", f"inner.note={text}"]),
        read(Settings, [str(recipe)], recipes="test"),
    ):
        assert config == Settings(data=text, inner=Inner(words=[text, "a"], note=text))


def test_booleans_numbers_and_nothing_are_still_read_as_such(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: x\ncount: 1_000\nshares: {on: 1e-4}\ninner: {quick: yes, note: null, sizes: [0x10]}\n"
    )
    inner = Inner(quick=True, sizes=[16])
    words = [
        "data=x",
        "count=1_000",
        "shares.on=1e-4",
        "inner.quick=yes",
        "inner.note=null",
        "inner.sizes=[0x10]",
    ]
    for config in (read(Settings, words), read(Settings, [str(recipe)], recipes="test")):
        assert config == Settings(data="x", count=1000, inner=inner, shares={"on": 1e-4})
    assert read(Settings, ["data=x", "shares={no: 1}"]).shares == {"no": 1}
    assert read(Settings, ["data=x", "inner.words=['${a}']"]).inner.words == ["${a}"]


def test_recipe_then_words_override_defaults_and_exponents_are_numbers(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: pictures\ncount: 2\ninner:\n  rate: 0.5\n  sizes: [3]\n")
    config = read(Settings, [str(recipe), "count=3", "inner.rate=1e-4", "inner.note=null"], recipes="test")
    assert config == Settings(data="pictures", count=3, inner=Inner(rate=1e-4, sizes=[3]))
    recipe.write_text("cuont: 2\n")
    with pytest.raises(UserError, match=r"recipe\.yaml: cuont.*did you mean 'count'"):
        read(Settings, [str(recipe)], recipes="test")


def test_runtime_settings_are_no_part_of_the_identity():
    one, other = read(Settings, ["data=x"]), read(Settings, ["data=x", "output=y", "machine.rate=2"])
    assert identity(one) == identity(other) and fingerprint(one) == fingerprint(other)
    assert fingerprint(one) != fingerprint(read(Settings, ["data=x", "count=2"]))


def test_help_shows_each_setting_with_default_and_comment():
    text = usage(Settings, "", "What it does.")
    assert "data=(required)" in text and "where pictures lie" in text and "inner.rate=0.001" in text


def test_help_lists_the_recipes_of_this_command_alone():
    train, ablate = (usage(kind, "train", "") for kind in (TrainConfig, AblationConfig))
    assert "\n  small_cpu " in train and "\n  ablation_losses " not in train
    assert "\n  small_cpu " not in ablate and "\n  ablation_losses " in ablate


def test_a_setting_that_a_folder_is_older_than_counts_as_its_default(tmp_path: Path):
    def opens(*words: str) -> bool:
        try:
            with claim(tmp_path, read(Settings, ["data=x", *words])):
                return True
        except UserError as error:
            assert "belongs to other settings" in str(error)
            return False

    (tmp_path / "result").touch()
    for older in ("data: x\n", "data: x\ninner: {rate: 0.001}\nsets: {}\n", "data: x\ngone: 5\n"):
        for words in (["count=2"], ["inner.sizes=[3]"], ["shares={a: 1}"], ["sets.a.rate=0.001"]):
            (tmp_path / "config.yaml").write_text(older)
            assert not opens(*words)
        assert opens() and opens("output=elsewhere")
    (tmp_path / "config.yaml").write_text("data: x\nsets: {a: {rate: 0.5}}\n")
    assert not opens() and not opens("sets.a.rate=0.5", "sets.a.note=new") and opens("sets.a.rate=0.5")
    (tmp_path / "config.yaml").write_text("count: 1\n")
    assert not opens()  # what must be given has no default


def test_numbers_that_are_too_small_are_named_by_their_keys():
    settings = read(Settings, ["data=x", "inner.rate=-0.5"])
    at_least(1, settings, "count")
    with pytest.raises(UserError, match=r"^inner\.rate=-0\.5: give 0 or more$"):
        at_least(0, settings, "count", "inner.rate")


def test_a_folder_belongs_to_its_settings(tmp_path: Path):
    first = read(Settings, ["data=x"])
    run = tmp_path / "run"
    with claim(run, first), pytest.raises(UserError, match="in use by process"), claim(run, first):
        pass
    with claim(run, read(Settings, ["data=x", "machine.rate=2"])):
        pass  # a runtime setting may change
    other = read(Settings, ["data=x", "count=5"])
    with claim(run, other):
        pass  # nothing was done with the first settings
    with claim(run, first):
        (run / "result").touch()
    with pytest.raises(UserError, match=r"count \(1 there, 5 here\)"), claim(run, other):
        pass
    named = read(Settings, ["data=x", "shares={a: 1, b: 2}"])
    with claim(tmp_path / "named", named) as folder:
        (folder / "result").touch()
    with claim(tmp_path / "named", named), claim(run, first):
        pass  # settings with names of the user's own, or none of them, are found again
    with pytest.raises(UserError, match="shares"), claim(tmp_path / "named", first):
        pass
    with pytest.raises(UserError, match="cannot be made"), claim("/proc/none", first):
        pass
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(UserError, match="holds something else"), claim(tmp_path / "photos", first):
        pass
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "config.yaml").write_text("title: mine")
    with pytest.raises(UserError, match="is not of this command"), claim(tmp_path / "site", first):
        pass
    assert (tmp_path / "site" / "config.yaml").read_text() == "title: mine"


def test_files_and_folders_appear_whole_or_not_at_all(tmp_path: Path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), write_whole(tmp_path / "file", "w") as file:
        file.write("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "folder") as work:
        (work / "half").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_lock_dies_with_its_process(tmp_path: Path):
    code = (
        "import sys, time\nfrom dinov2.files import lock\n"
        "with lock(sys.argv[1]): print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "l")], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
    with pytest.raises(BlockingIOError, match=str(holder.pid)), lock(tmp_path / "l", blocking=False):
        pass
    holder.kill()
    holder.wait()
    with lock(tmp_path / "l", blocking=False):
        pass


def _dinov2(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dinov2", *words], capture_output=True, text=True, timeout=200
    )


def test_the_front_door_answers_fast_and_names_every_command():
    took = []
    for _ in range(3):  # the fastest of three: other programs may share the machine
        began = time.perf_counter()
        said = _dinov2("--help").stdout
        took.append(time.perf_counter() - began)
        assert all(f"\n  {name} " in said for name in ("curate", "eval", "train"))
    assert min(took) < 0.5


def test_a_misspelt_command_is_one_line_and_status_2():
    done = _dinov2("trian")
    assert (
        done.returncode == 2
        and done.stderr == "dinov2 trian: there is no command 'trian'; did you mean 'train'?\n"
    )
