"""Processes that pieces are shared out over."""

import multiprocessing
import os
from pathlib import Path

import pytest

from curation.pieces import Workers
from dinov2.exits import UserError


def note(path: str) -> int:
    """Leave the number of the process that does this."""
    Path(path).write_text(str(os.getpid()))
    return len(path)


def test_processes_that_were_started_ahead_do_the_work_and_end_with_the_block(tmp_path: Path) -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    pieces = [str(tmp_path / str(number)) for number in range(8)]
    with Workers(2) as workers:
        workers.start(note)
        started = {child.pid for child in multiprocessing.active_children()} - before
        workers.do(note, pieces, what="note", total=sum(map(len, pieces)))
    done_by = {int(Path(piece).read_text()) for piece in pieces}
    assert len(started) == 2
    assert done_by <= started
    assert {child.pid for child in multiprocessing.active_children()} <= before
    with Workers(1) as workers:
        workers.start(note)
        assert {child.pid for child in multiprocessing.active_children()} <= before


def test_what_is_made_ahead_comes_in_turn_and_is_made_elsewhere() -> None:
    with Workers(2) as workers:
        made = list(workers.ahead(squared, range(5), what="squares"))
        with pytest.raises(UserError, match="squares: a worker process was killed"):
            list(workers.ahead(os._exit, [1], what="squares"))
    assert [number for number, _ in made] == [0, 1, 4, 9, 16]
    assert os.getpid() not in {process for _, process in made}
    with Workers(1) as workers:
        assert list(workers.ahead(squared, [3], what="squares")) == [(9, os.getpid())]


def squared(number: int) -> tuple[int, int]:
    return number * number, os.getpid()
