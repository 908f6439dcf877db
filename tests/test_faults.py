"""The harness lets a command pass that can be killed anywhere, and catches ones that cannot."""

import sys
from pathlib import Path

import pytest

from tests.faults import (
    Moment,
    Spent,
    assert_survives,
    at,
    differences,
    random_moments,
    run_killed,
    run_whole,
    when,
)

START = """
import os, sys, time
from pathlib import Path
out = Path("out"); out.mkdir(exist_ok=True)
"""

CAREFUL = """
for piece in range(12):
    path = out / f"{piece:02}"
    if not path.exists():
        time.sleep(0.02)
        part = path.with_suffix(".part"); part.write_text(f"piece {piece}"); part.rename(path)
"""

TRUSTS_HALF_FILES = """
for piece in range(12):
    path = out / f"{piece:02}"
    if not path.exists():
        with open(path, "w") as file:
            print("first half", file=file, flush=True)
            time.sleep(0.3 if piece == 5 else 0.01)
            print("second half", file=file)
"""

APPENDS_TWICE = """
for piece in range(12):
    with open(out / "log", "a") as file:
        print(piece, file=file, flush=True); time.sleep(0.02)
"""

LEAVES_RUBBISH = """
for piece in range(12):
    path = out / f"{piece:02}"
    if not path.exists():
        part = out / f"{os.getpid()}.part"; part.write_text("x"); time.sleep(0.02); part.rename(path)
"""

CANNOT_START_AGAIN = """
(out / "lock").touch(exist_ok=False); time.sleep(0.3); (out / "done").write_text("done")
"""

CHILD_WRITES = """
import subprocess
child = "import time\\nfor i in range(12): time.sleep(0.02); open('out/beats', 'a').write('.')"
(out / "beats").write_text("")
subprocess.run([sys.executable, "-S", "-c", child])
"""

ASKS_TO_RUN_AGAIN = """
for piece in range(12):
    path = out / f"{piece:02}"
    if not path.exists():
        time.sleep(0.02)
        part = path.with_suffix(".part"); part.write_text(f"piece {piece}"); part.rename(path)
        if piece % 4 == 3:
            sys.exit(75)
"""


def check(
    body: str,
    folder: Path,
    moments: list[Moment],
    separately: bool = False,
    at_least: int = 1,
    site: str = "-S",
) -> None:
    command = [sys.executable, *filter(None, [site]), "-c", START + body]
    results = ["out/*"]
    assert_survives(
        command, folder, results=results, moments=moments, separately=separately, at_least=at_least, limit=20
    )


REPLACES = """
state = out / "state"
for piece in range(int(state.read_text()) if state.exists() else 0, 12):
    time.sleep(0.02)
    part = out / "state.part"; part.write_text(str(piece + 1)); part.rename(state)
"""


@pytest.mark.parametrize("body", [CAREFUL, ASKS_TO_RUN_AGAIN, CHILD_WRITES])
def test_what_can_be_killed_passes(body: str, tmp_path: Path) -> None:
    check(body, tmp_path, random_moments(3, seed=0, last=0.8))


def test_a_file_can_be_met_that_takes_the_place_of_another(tmp_path: Path) -> None:
    moments = [when("out/state"), *[when("out/state", new=False)] * 3]
    check(REPLACES, tmp_path, moments, at_least=4, site="")  # what kills from within comes with the site
    with pytest.raises(AssertionError, match="only 1 of 2 kills"):
        check(REPLACES, tmp_path / "other", moments[:1] * 2, at_least=2, site="")


def test_kills_can_have_a_folder_each(tmp_path: Path) -> None:
    check(CAREFUL, tmp_path, random_moments(3, seed=0, first=0.2, last=0.8), separately=True, at_least=3)


FASTER_AGAIN = """
known = Path("..", "known")
pause = 0.03 if known.exists() else 0.1
known.touch()
for piece in range(12):
    time.sleep(pause); (out / f"{piece:02}").write_text(str(piece))
"""


def test_a_kill_in_a_folder_of_its_own_that_comes_too_late_is_tried_again(tmp_path: Path) -> None:
    check(FASTER_AGAIN, tmp_path, [at(0.5), at(0.6)], separately=True, at_least=2)
    tried = {path.name for path in tmp_path.glob("killed-*")}
    assert tried == {"killed-0-0", "killed-0-1", "killed-1-0"}


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (TRUSTS_HALF_FILES, r"out/05: 11 bytes, expected 23; first difference at 11"),
        (APPENDS_TWICE, r"out/log: \d+ bytes"),
        (LEAVES_RUBBISH, r"out/\d+\.part: too many"),
        (CANNOT_START_AGAIN, r"status 1[^$]*FileExistsError"),
    ],
)
def test_what_cannot_be_killed_is_caught(body: str, complaint: str, tmp_path: Path) -> None:
    moment = when("out/05") if "path" in body else at(0.5)
    with pytest.raises(AssertionError, match=complaint):
        check(body, tmp_path, [moment])


BUSY = """
while time.process_time() < 0.6:
    sum(range(10_000))
(out / "done").write_text("done")
"""


def test_shares_of_processor_time_do_not_mind_other_programs(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", START + BUSY]
    spent = run_whole(command, tmp_path / "whole")
    assert 0.5 < spent.cpu < 0.9
    slow = Spent(clock=1000.0, cpu=spent.cpu)  # as if it had been run beside many others
    (attempt,) = run_killed(command, tmp_path / "killed", [Moment(0.5, cpu=True)], whole=slow)
    assert attempt.status is None
    assert 0.45 * spent.cpu < attempt.spent.cpu < spent.cpu


def test_kills_that_come_too_late_are_not_taken_for_proof(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="only 0 of 1 kills met a running command"):
        check(CAREFUL, tmp_path, [at(50.0)])


def test_a_command_that_never_ends_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    with pytest.raises(AssertionError, match="still running after"):
        assert_survives(command, tmp_path, results=["*"], moments=[at(0.5)], limit=0.5)


def test_a_reader_may_look_past_bytes(tmp_path: Path) -> None:
    for name, text in (("whole", "1 2"), ("killed", "1  2\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "numbers.txt").write_text(text)
    where = (tmp_path / "whole", tmp_path / "killed", ["*.txt"])
    assert differences(*where)[0].startswith("numbers.txt: 5 bytes, expected 3; first difference at 2")
    assert differences(*where, read={"*.txt": lambda path: path.read_text().split()}) == []
    assert differences(*where, ignore=["*.txt"]) == []
