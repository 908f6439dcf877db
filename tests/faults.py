"""Kill a command at chosen moments, run it again until it ends, and compare what it made.

    assert_survives(
        [sys.executable, "-m", "curation", f"pool={pool}", "output=out"],
        tmp_path,
        results=["out/manifest.parquet", "out/shards/*"],
        moments=[*random_moments(3, seed=0), when("out/shards/000000.tar")],
    )

The same words run in folders of their own, `whole/` and `killed/`, so outputs are named relative to the
working directory and inputs absolutely. Every process of the command dies with it, as when a machine stops.
A file that gets its name by a rename in Python is met exactly (see killer/); other files are polled for.
Where other programs may come and go, shares of the processor time are met better than those of the clock.
"""

import os
import random
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUN_AGAIN = 75  # the command saved its state and asks to be started again
TRIES = 3  # at a moment that came after the command's end, since no two runs take equally long
KILLER = Path(__file__).parent / "killer"
POLL = 0.002  # seconds between looks at the file that a kill waits for
TICKS = os.sysconf("SC_CLK_TCK")  # of processor time, a second


@dataclass(frozen=True)
class Moment:
    """When to kill: at a share of the uninterrupted time after the start, or once a file appears."""

    share: float | None = None
    cpu: bool = False  # of the processor time of all processes, not of the clock's
    file: str | None = None  # a glob in the working directory
    new: bool = True  # only a file that was not there when this attempt started; else also one that
    # takes the place of another, by a rename in Python

    def __str__(self) -> str:
        return f"when {self.file} appears" if self.file else f"at {self.share:.0%} of the uninterrupted time"


@dataclass(frozen=True)
class Spent:
    """Seconds of the clock, and of processors."""

    clock: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.clock + other.clock, self.cpu + other.cpu)

    def at_most(self, other: "Spent") -> "Spent":
        return Spent(min(self.clock, other.clock), min(self.cpu, other.cpu))

    def until(self, moment: Moment) -> float:
        """Seconds of the kind that the moment counts."""
        return (self.cpu if moment.cpu else self.clock) * (moment.share or 0.0)


@dataclass(frozen=True)
class Attempt:
    """One start of the command: how long it ran, and its exit status, or None if it was killed."""

    spent: Spent
    status: int | None
    said: str


def at(share: float) -> Moment:
    return Moment(share=share)


def when(file: str, *, new: bool = True) -> Moment:
    return Moment(file=file, new=new)


def random_moments(
    count: int, seed: int, first: float = 0.05, last: float = 0.95, *, cpu: bool = False
) -> list[Moment]:
    """`count` moments, one in each of as many equal parts of the time, in random order."""
    draw = random.Random(seed)
    step = (last - first) / count
    moments = [Moment(first + step * (part + draw.random()), cpu) for part in range(count)]
    draw.shuffle(moments)
    return moments


def assert_survives(
    command: Sequence[str],
    folder: Path,
    *,
    results: Sequence[str],
    moments: Sequence[Moment],
    separately: bool = False,
    at_least: int = 1,
    read: Mapping[str, Callable[[Path], Any]] | None = None,
    ignore: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    limit: float = 120.0,
) -> None:
    """Fail unless the command, killed at the moments and run again, ends with what it makes uninterrupted.

    Args:
        command: the words to run. The repository is on the Python path.
        folder: an empty one, for `whole/` and `killed/` (`killed-0-0/` and so on if separately).
        results: globs of the files to compare; the sets of names must be equal too.
        moments: one kill each, one after the other in the same folder, or each in a folder of its own; of
            these one that came too late is tried again, as a share of the time that the command took then.
        at_least: how many kills must have met a running command; fewer would prove little.
        read: for files that match a glob here, what to compare in place of the bytes.
        ignore: globs of results that may differ.
        limit: seconds for each single run.
    """
    whole = folder / "whole"
    spent = run_whole(command, whole, env=env, limit=limit)
    landed = met = 0
    groups = [[moment] for moment in moments] if separately else [list(moments)]
    for number, group in enumerate(groups):
        for again in range(TRIES if separately else 1):
            killed = folder / (f"killed-{number}-{again}" if separately else "killed")
            attempts = run_killed(command, killed, group, whole=spent, env=env, limit=limit)
            _assert_same(group, differences(whole, killed, results, read=read or {}, ignore=ignore))
            met = sum(attempt.status is None for attempt in attempts)
            if met:
                break
            spent = spent.at_most(sum((attempt.spent for attempt in attempts), Spent()))
        landed += met
    if landed < at_least:
        raise AssertionError(
            f"only {landed} of {len(moments)} kills met a running command (it takes {spent.clock:.2f} s)"
        )


def _assert_same(moments: Sequence[Moment], found: Sequence[str]) -> None:
    if found:
        tale = [f"  {moment}" for moment in moments] + [
            "and run to its end, it differs from an uninterrupted run:"
        ]
        raise AssertionError("\n".join(["Killed", *tale, *("  " + line for line in found)]))


def run_whole(
    command: Sequence[str], folder: Path, *, env: Mapping[str, str] | None = None, limit: float = 120.0
) -> Spent:
    """Run the command in `folder`, again while it asks for that; returns its time. Other statuses fail."""
    folder.mkdir(parents=True, exist_ok=True)
    spent = Spent()
    while True:
        attempt = _attempt(command, folder, None, env=env, left=0.0, limit=limit)
        spent += attempt.spent
        if attempt.status != RUN_AGAIN:
            _must_be_well(attempt, command, "uninterrupted" if spent == attempt.spent else "run again")
            return spent


def run_killed(
    command: Sequence[str],
    folder: Path,
    moments: Sequence[Moment],
    *,
    whole: Spent,
    env: Mapping[str, str] | None = None,
    limit: float = 120.0,
) -> list[Attempt]:
    """Start the command, kill it at each moment in turn, and at last let it end.

    One that asks to be started again is, and the moment's clock goes on. `whole`: the uninterrupted time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    attempts = []
    for number, moment in enumerate(moments):
        left = whole.until(moment)
        while True:
            attempt = _attempt(command, folder, moment, env=env, left=left, limit=limit)
            attempts.append(attempt)
            left -= attempt.spent.cpu if moment.cpu else attempt.spent.clock
            if attempt.status != RUN_AGAIN:
                break
        if attempt.status is not None:
            _must_be_well(attempt, command, f"run again after {number} kills")
    run_whole(command, folder, env=env, limit=limit)
    return attempts


def differences(
    whole: Path,
    killed: Path,
    results: Sequence[str],
    *,
    read: Mapping[str, Callable[[Path], Any]] | None = None,
    ignore: Sequence[str] = (),
) -> list[str]:
    """One line for each result that is missing, too many, or not the same in the two folders."""
    names = {where: _names(where, results, ignore) for where in (whole, killed)}
    lines = [
        f"{glob}: the uninterrupted run made no such file" for glob in results if not any(whole.glob(glob))
    ]
    lines += [f"{name}: missing" for name in sorted(names[whole] - names[killed])]
    lines += [f"{name}: too many" for name in sorted(names[killed] - names[whole])]
    for name in sorted(names[whole] & names[killed]):
        reader = next((reader for glob, reader in (read or {}).items() if Path(name).match(glob)), None)
        line = (
            _compare_read(whole / name, killed / name, reader)
            if reader
            else _compare(whole / name, killed / name)
        )
        lines += [f"{name}: {line}"] if line else []
    return lines


def _names(folder: Path, results: Sequence[str], ignore: Sequence[str]) -> set[str]:
    files = {path for glob in results for path in folder.glob(glob) if path.is_file()}
    names = {path.relative_to(folder).as_posix() for path in files}
    return {name for name in names if not any(Path(name).match(glob) for glob in ignore)}


def _compare(whole: Path, killed: Path) -> str:
    expected, found = whole.read_bytes(), killed.read_bytes()
    if expected == found:
        return ""
    place = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    if place is None:
        place = min(len(expected), len(found))
    around = slice(max(place - 8, 0), place + 24)
    return (
        f"{len(found)} bytes, expected {len(expected)}; first difference at {place}:"
        f" {found[around]!r}, expected {expected[around]!r}"
    )


def _compare_read(whole: Path, killed: Path, reader: Callable[[Path], Any]) -> str:
    expected, found = reader(whole), reader(killed)
    return "" if expected == found else f"read as {str(found)[:200]}, expected {str(expected)[:200]}"


def _attempt(
    command: Sequence[str],
    folder: Path,
    moment: Moment | None,
    *,
    env: Mapping[str, str] | None,
    left: float,
    limit: float,
) -> Attempt:
    there = set(folder.absolute().glob(moment.file)) if moment and moment.file else set()
    path = os.pathsep.join(filter(None, (str(KILLER), str(ROOT), os.environ.get("PYTHONPATH"))))
    kill = {"KILL_WHEN_RENAMED": "", "KILL_EXCEPT": ""}
    if moment and moment.file:
        kill["KILL_WHEN_RENAMED"] = str(folder.absolute() / moment.file)
        kill["KILL_EXCEPT"] = os.pathsep.join(map(str, there)) if moment.new else ""
    with tempfile.TemporaryFile() as said:
        start, before = time.monotonic(), _reaped()
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path} | kill | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                passed = time.monotonic() - start
                if moment and _has_come(moment, folder, there, process.pid, passed, left):
                    break
                if passed > limit:
                    raise AssertionError(f"still running after {limit:g} s: {_words(command)}\n{_tail(said)}")
                time.sleep(POLL if moment and not moment.cpu else 10 * POLL)
            status = process.poll()
            if moment and status == -signal.SIGKILL:
                status = None
        finally:
            _kill_all(process)
        return Attempt(Spent(time.monotonic() - start, _reaped() - before), status, _tail(said))


def _has_come(moment: Moment, folder: Path, there: set[Path], group: int, passed: float, left: float) -> bool:
    if moment.file:
        try:
            return any(path not in there for path in folder.absolute().glob(moment.file))
        except FileNotFoundError:  # a folder went, to be replaced, while it was looked through
            return False
    return (_cpu(group) if moment.cpu else passed) >= left


def _reaped() -> float:
    """Seconds of processor time of all processes that ended, and were waited for, so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _cpu(group: int) -> float:
    """Seconds of processor time of a group's processes, and of those that they waited for."""
    return sum(sum(map(int, fields[11:15])) for fields in _members(group)) / TICKS


def _kill_all(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL every process of the session's group and wait until none of them can write any more."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 10
    while _group_lives(process.pid):
        if time.monotonic() > until:
            raise AssertionError(f"processes of group {process.pid} outlive SIGKILL")
        time.sleep(POLL)


def _group_lives(group: int) -> bool:
    """Whether a process of the group is left that is not a zombie (those wait for init, and do nothing)."""
    return any(fields[0] not in "ZX" for fields in _members(group))


def _members(group: int) -> Iterator[list[str]]:
    """Of each process of the group the fields of /proc/PID/stat, from its state on."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[2:3] == [str(group)]:
            yield fields


def _must_be_well(attempt: Attempt, command: Sequence[str], what: str) -> None:
    if attempt.status != 0:
        raise AssertionError(
            f"{what}, it ended with status {attempt.status}: {_words(command)}\n{attempt.said}"
        )


def _words(command: Sequence[str]) -> str:
    return " ".join(command)[:400]


def _tail(file: Any, size: int = 4000) -> str:
    file.seek(0)
    return file.read()[-size:].decode(errors="replace")
