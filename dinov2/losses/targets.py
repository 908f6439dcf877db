"""Teacher targets: scores over prototypes made into distributions that neither collapse nor stay flat.

Both ways end in softmax(scores / temperature - columns) with one number for each prototype, so a target is
kept as that, and the distributions are made some rows at a time, where a loss needs them: no float32 copy of
[samples x prototypes] lives, but for a few exponentials that a CPU keeps from round to round.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dinov2.parallel import all_max, all_sum

CHUNK = -1  # scores in float32 at a time, by the device
CPU_CHUNK, CHUNK_ELSEWHERE = 2**20, 2**24  # 4 MiB stay in a cache; a GPU needs work for all of its units
LOG2_E = math.log2(math.e)
KEPT = 2**26  # exponentials that a CPU keeps at most, a quarter of a GiB; more are made anew in each round
RANGE = 60.0  # of scores / temperature: exponentials of this range keep all their digits in float32


@dataclass(frozen=True)
class Targets:
    """Distributions over prototypes, one for each sample."""

    scores: Float[Tensor, "samples prototypes"]  # in the type that the teacher computed them in
    temperature: float
    columns: Float[Tensor, " prototypes"]

    def of(self, rows: slice) -> Float[Tensor, "some prototypes"]:
        """The distributions of some samples, each summing to one; float32 at least."""
        logits = wide(self.scores[rows], copy=True).mul_(1 / self.temperature)
        return torch.softmax(logits.sub_(self.columns), dim=1)

    def __len__(self) -> int:
        return len(self.scores)


def sinkhorn(
    sets: Sequence[Float[Tensor, "samples prototypes"]],
    temperature: float,
    *,
    rounds: int = 3,
    chunk: int = CHUNK,
) -> list[Targets]:
    """Targets that use all prototypes equally (SwAV sec. 3.1; DINOv2 sec. 4), over the samples of all ranks.

    Alternately makes each prototype sum to 1/K over samples and each sample to 1/B. Since the last step makes
    a sample's target sum to one, the constants 1/K and 1/B cancel, so B, which differs between ranks for
    masked patches, need not be known. In the log domain, in float32: `exp(scores / temperature)` overflows,
    and after subtracting the global maximum a prototype that nobody prefers underflows to 0/0.

    Args:
        sets: teacher scores of this rank, each set (image and patch tokens) normalised by itself, any float
            type; possibly no rows. Together, so that they share collectives: two a round where there are many
            ranks, of as many numbers as all sets have prototypes.
        temperature: the teacher's.
        chunk: scores in float32 at a time; 0 for all at once, -1 for what suits the device.
    """
    columns = [wide(scores.new_zeros(scores.shape[1])) for scores in sets]
    gains = [_gains(scores.detach(), temperature, chunk) for scores in sets]
    for turn in range(rounds):
        local = [each(own if turn else None) for each, own in zip(gains, columns, strict=True)]
        columns = list(_logsumexp_over_ranks(torch.cat(local)).split([len(own) for own in local]))
    return [Targets(scores.detach(), temperature, own) for scores, own in zip(sets, columns, strict=True)]


def centered(
    scores: Float[Tensor, "samples prototypes"], center: Float[Tensor, " prototypes"], temperature: float
) -> Targets:
    """Targets softmax((t - c) / tau) (DINO sec. 3.1): the centre is against one prototype taking all."""
    return Targets(scores.detach(), temperature, center / temperature)


def next_centers(
    centers: dict[str, Float[Tensor, " prototypes"]],
    totals: dict[str, Float[Tensor, " prototypes+1"]],
    momentum: float = 0.9,
) -> dict[str, Float[Tensor, " prototypes"]]:
    """The centres after a step: c <- m c + (1 - m) mean of the scores over all ranks (DINO eq. 4).

    Args:
        totals: what `score_totals` gave on this rank, summed over its micro-batches. One collective for all.

    Returns:
        The centres that there are totals for.
    """
    if not totals:
        return {}
    parts = all_sum(torch.cat(list(totals.values()))).split([len(own) for own in totals.values()])
    found = {}
    for name, total in zip(totals, parts, strict=True):
        center, count = centers[name], total[-1]
        mean = total[:-1] / count.clamp(min=1)
        # 0 where nothing was masked in the whole batch
        found[name] = torch.where(count > 0, momentum * center + (1 - momentum) * mean, center)
    return found


def score_totals(scores: Float[Tensor, "samples prototypes"]) -> Float[Tensor, " prototypes+1"]:
    """The sum of the scores for each prototype, and behind it the number of samples; float32."""
    total = scores.detach().sum(dim=0, dtype=wide(scores[:0]).dtype)
    return torch.cat([total, total.new_tensor([float(len(scores))])])


def wide(x: Float[Tensor, "*shape"], *, copy: bool = False) -> Float[Tensor, "*shape"]:
    """In float32, or more where it was more."""
    return x.to(x.dtype if x.dtype.itemsize >= 4 else torch.float32, copy=copy)


def slices(rows: int, columns: int, chunk: int, device: torch.device | None = None) -> Iterator[slice]:
    """Cut rows so that no part has more than `chunk` numbers, but at least one row; 0: all at once."""
    if chunk < 0:
        chunk = CPU_CHUNK if device is None or device.type == "cpu" else CHUNK_ELSEWHERE
    step = max(1, chunk // columns) if chunk else max(1, rows)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


Gains = Callable[[Float[Tensor, " prototypes"] | None], Float[Tensor, " prototypes"]]


def _gains(scores: Float[Tensor, "samples prototypes"], temperature: float, chunk: int) -> Gains:
    """A function of the columns: the logarithm of what each prototype gets from this rank's samples, whose
    sums are made equal first where there are columns.
    """
    parts = [scores[rows] for rows in slices(len(scores), scores.shape[1], chunk, scores.device)]
    if not parts:  # a rank without samples
        nothing = wide(scores.new_empty(scores.shape[1])).fill_(-torch.inf)
        return lambda columns: nothing
    if scores.is_cuda or (highest := _moderate(scores, temperature)) is None:
        return partial(_in_logs, parts, temperature)
    exponentials = partial(_exponentials, temperature=temperature, highest=highest)
    if scores.numel() > KEPT:
        return lambda columns: _by_products(map(exponentials, parts), highest, columns)
    return partial(_by_products, [exponentials(part) for part in parts], highest)


def _in_logs(
    parts: Sequence[Float[Tensor, "some prototypes"]],
    temperature: float,
    columns: Float[Tensor, " prototypes"] | None,
) -> Float[Tensor, " prototypes"]:
    found = []
    for part in parts:
        log_q = wide(part, copy=True).mul_(1 / temperature)
        if columns is not None:
            log_q -= torch.logsumexp(log_q - columns, dim=1, keepdim=True)
        found.append(torch.logsumexp(log_q, dim=0))
    return found[0] if len(found) == 1 else torch.logsumexp(torch.stack(found), dim=0)


def _exponentials(
    scores: Float[Tensor, "some prototypes"], temperature: float, highest: float
) -> Float[Tensor, "some prototypes"]:
    """exp(scores / temperature - highest), as powers of two: a CPU's exp2 takes a third of exp's time."""
    return wide(scores, copy=True).mul_(LOG2_E / temperature).sub_(highest * LOG2_E).exp2_()


def _by_products(
    parts: Iterable[Float[Tensor, "some prototypes"]],
    highest: float,
    columns: Float[Tensor, " prototypes"] | None,
) -> Float[Tensor, " prototypes"]:
    """The same from exponentials less `highest`, of a moderate range: sums as products with a vector.

    Factors of columns then span no more than that range either: they are ratios of weighted sums of these
    exponentials.
    """
    if columns is None:
        return torch.stack([q.sum(dim=0) for q in parts]).sum(dim=0).log_().add_(highest)
    lowest = columns.amin()
    factors, gained = (lowest - columns).exp_(), torch.zeros_like(columns)
    with torch.autocast(columns.device.type, enabled=False):  # which would multiply in half precision
        for q in parts:
            gained.addmv_(q.T, (q @ factors).reciprocal_())
    return gained.log_().add_(lowest)


def _moderate(scores: Tensor, temperature: float) -> float | None:
    """The highest of scores / temperature, if exponentials of them all keep their digits."""
    least, most = (float(bound) / temperature for bound in torch.aminmax(scores))
    return most if most - least <= RANGE else None


def _logsumexp_over_ranks(local: Float[Tensor, " prototypes"]) -> Float[Tensor, " prototypes"]:
    highest = all_max(local)
    if highest is local:
        return local
    return highest + torch.log(all_sum(torch.exp(local - highest)))
