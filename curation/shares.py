"""One stage's pieces shared out over processes that know nothing of each other, such as a job array's.

`shard=2/8` does every eighth piece of the first stage that is not finished, from number 2, and ends.
`shard=merge` does no piece: it puts together what all shards left, and goes on as far as that reaches. Pieces
are cut by the settings alone, so the result is that of one process.
"""

import re
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field

from dinov2.exits import UserError

MERGE = "merge"
NAMED = 8  # missing pieces that a message names


class PartDone(Exception):
    """This process has done its part of a stage; the message says what comes next."""


@dataclass
class Share:
    """Which pieces are this process's."""

    number: int = 0
    count: int = 1
    merging: bool = False
    merged: list[str] = field(default_factory=list)  # what this process has put together
    later: bool = False  # stages before this one are finished

    @classmethod
    def parse(cls, text: str | None) -> "Share":
        """Raises UserError unless it is None, "merge" or "i/n" with i from 0 to n - 1."""
        if text is None or text == MERGE:
            return cls(merging=text == MERGE)
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or int(found[1]) >= int(found[2]):
            raise UserError(f"shard={text}: give i/n, i from 0 to n - 1, as in shard=0/4, or shard={MERGE}")
        return cls(int(found[1]), int(found[2]))

    @property
    def partial(self) -> bool:
        return self.count > 1

    def take(self, count: int, done: Callable[[int], bool], what: str) -> list[int]:
        """Numbers of the pieces, of `count`, that this process has to do.

        Raises:
            UserError: it is to merge, and some are missing.
            PartDone: the same, but it has merged what came before; or none is there, for what came before
                was merged by a process that was killed and begun again.
        """
        mine = [piece for piece in range(self.number, count, self.count) if not done(piece)]
        if not self.merging or not mine:
            return mine
        if self.merged or (self.later and len(mine) == count):
            before = f"{self.merged[-1]} is merged" if self.merged else "there is nothing to merge"
            raise PartDone(f"{before}; next: {what}, with shard=i/n")
        if len(mine) == count:
            raise UserError(
                f"shard={MERGE}: no shard has done its part of {what}; run shard=0/n to shard=n-1/n"
            )
        numbers = ", ".join(map(str, mine[:NAMED])) + (", …" if len(mine) > NAMED else "")
        raise UserError(
            f"shard={MERGE}: {what} lacks {len(mine)} of {count} pieces, numbers {numbers}; run those shards "
            "i/n again for whose i such a number is i + a multiple of n"
        )

    def part_of(self, total: int, mine: Sequence[Sized]) -> int:
        """For a progress bar: all there is, or what this process does of it."""
        return sum(map(len, mine)) if self.partial else total

    def leave(self, what: str) -> None:
        """What comes next takes all pieces. Raises PartDone if this process did only a part of them."""
        if self.partial:
            raise PartDone(
                f"{what}: shard {self.number}/{self.count} is done; when all are, shard={MERGE} goes on"
            )
        if self.merging:
            self.merged.append(what)
