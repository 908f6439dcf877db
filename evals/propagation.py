"""Labels carried from frame to frame of a video by the likeness of patches, without any training.

DINO (arXiv 2104.14294, sec. 4.2.1) by the protocol of Jabri et al. (arXiv 2006.14613): each patch of a frame
takes the labels of the most similar patches of the first frame and of a few before it.
"""

import math
from collections import deque

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

SIMILARITIES = 1 << 24  # that are held at once


class Propagator:
    """Carries labels through one video.

    Args:
        first: tokens of the first frame.
        labels: of its patches, one row a label, shares that add up to 1.
        context: frames before the one that is asked for, beside the first.
        top: patches whose labels are taken.
        reach: rows and columns that a patch may have moved away.
        temperature: of the likeness.
    """

    def __init__(
        self,
        first: Float[Tensor, "rows columns dim"],
        labels: Float[Tensor, "labels rows columns"],
        *,
        context: int = 7,
        top: int = 5,
        reach: int = 12,
        temperature: float = 0.1,
    ) -> None:
        self.top, self.reach, self.temperature = top, reach, temperature
        self._first = normalize(first, dim=2), labels
        self._before: deque[tuple[Tensor, Tensor]] = deque(maxlen=context)

    def step(self, frame: Float[Tensor, "rows columns dim"]) -> Float[Tensor, "labels rows columns"]:
        """The labels of the next frame."""
        frame = normalize(frame, dim=2)
        rows, columns = frame.shape[:2]
        sources = [self._first, *self._before]
        # As many rows as keep tall (tall + 2 reach) columns², the similarities to one source, within bounds.
        tall = max(1, int(math.sqrt(self.reach**2 + SIMILARITIES / columns**2)) - self.reach)
        parts = [
            self._of_rows(frame, range(top, min(top + tall, rows)), sources) for top in range(0, rows, tall)
        ]
        labels = torch.cat(parts, dim=1)
        if self._before.maxlen:
            self._before.append((frame, labels))
        return labels

    def _of_rows(
        self, frame: Tensor, rows: range, sources: list[tuple[Tensor, Tensor]]
    ) -> Float[Tensor, "labels part columns"]:
        """Labels of some rows of patches: the best of each source in turn, so that memory stays small."""
        columns = frame.shape[1]
        queries = frame[rows.start : rows.stop].flatten(0, 1)
        # No patch lies outside of a reach that is as large as the picture.
        above, below = max(0, rows.start - self.reach), min(frame.shape[0], rows.stop + self.reach)
        far = self._too_far(rows, range(above, below), columns).to(frame.device)
        values = queries.new_zeros(len(queries), 0)
        taken = queries.new_zeros(sources[0][1].shape[0], len(queries), 0)
        for tokens, labels in sources:
            similarity = queries @ tokens[above:below].flatten(0, 1).T
            similarity.masked_fill_(far, -torch.inf)
            best, index = similarity.topk(min(self.top, similarity.shape[1]), dim=1)
            values = torch.cat([values, best], dim=1)
            taken = torch.cat([taken, labels[:, above:below].flatten(1)[:, index]], dim=2)
        best, index = values.topk(min(self.top, values.shape[1]), dim=1)
        weights = (best / self.temperature).softmax(1)
        chosen = taken.gather(2, index.expand(len(taken), -1, -1))
        return (chosen * weights).sum(2).unflatten(1, (len(rows), columns))

    def _too_far(self, rows: range, among: range, columns: int) -> Tensor:
        """Which patches of the rows `among` each patch of the rows cannot reach, [patches, patches]."""
        down = (torch.tensor(rows)[:, None] - torch.tensor(among)[None]).abs() > self.reach
        across = torch.arange(columns)
        across = (across[:, None] - across[None]).abs() > self.reach
        return (down[:, None, :, None] | across[None, :, None, :]).flatten(2).flatten(0, 1)
