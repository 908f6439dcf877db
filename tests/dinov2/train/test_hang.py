"""A rank that hangs, is stopped, or dies is named by the others, which end within the limit."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.dinov2.train.runs import on_processes, train_words, wait_for_lines

LIMIT = 15  # seconds; a step of a machine that is busy with other tests must not look like a hang
WORDS = ["steps=10000", f"watch.hang_limit={LIMIT}", "knn.every=0"]


@contextmanager
def _started(
    words: list[str], folder: Path, count: int, fault: str
) -> "Iterator[list[subprocess.Popen[str]]]":
    runs = on_processes(words, folder, count, env={"FAULT": fault})
    try:
        yield runs
    finally:
        for run in runs:
            run.kill()
            run.communicate()


def _last_line(run: "subprocess.Popen[str]") -> str:
    _, said = run.communicate(timeout=4 * LIMIT)
    return said.splitlines()[-1]


@pytest.mark.long
def test_a_rank_that_sleeps_is_named_by_all_and_without_a_checkpoint_the_status_is_70(
    pictures: Path, tmp_path: Path
):
    words = train_words(pictures, *WORDS, "checkpoint.every=10000", "batch=9", module="tests.poisoned")
    with _started(words, tmp_path, 3, "sleep:3") as runs:
        for run in runs:
            said = _last_line(run)
            assert "rank 1 " in said and "rank 0" not in said and "rank 2" not in said, said
            assert run.returncode == 70
            assert "no checkpoint was saved" in said


@pytest.mark.parametrize(
    "blow",
    [
        pytest.param(signal.SIGSTOP, id="stopped", marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, id="killed"),
    ],
)
def test_a_rank_that_is_stopped_or_dies_is_named_and_after_a_checkpoint_the_status_is_75(
    pictures: Path, tmp_path: Path, blow: signal.Signals
):
    with _started(train_words(pictures, *WORDS), tmp_path, 2, "") as runs:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", 5, runs)
        runs[1].send_signal(blow)
        said = _last_line(runs[0])
        assert "rank 1 " in said and "continues from the last checkpoint" in said, said
        assert runs[0].returncode == 75
