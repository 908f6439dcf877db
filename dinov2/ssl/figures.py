"""What a step says of the two networks' health: entropies, what they tell apart, spread of the features."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.losses.cross_entropy import STUDENT_TEMPERATURE

Pair = tuple[Float[Tensor, "rows prototypes"], Float[Tensor, "rows prototypes"]]


@torch.no_grad()
def figures(pairs: Iterable[Pair], features: Float[Tensor, "globals dim"]) -> dict[str, Float[Tensor, ""]]:
    """Figures of this rank's global crops, in nats where they are entropies.

    `told_apart.*` is the mutual information between crop and prototype, H(mean over crops) - mean H: how much
    a crop's distribution says about which crop it is. It is 0 in either kind of collapse, where the entropy
    alone cannot tell a collapse from the flat targets of a small batch (Sinkhorn gives B crops K/B prototypes
    each, so that their entropy lies near log K however well the crops are told apart).

    Args:
        pairs: the teacher's targets of some crops, and the student's scores of the same; all crops in turn.
        features: the teacher's CLS tokens.
    """
    rows, entropies, sums, used = 0, torch.zeros(2), torch.zeros(0), torch.zeros(0)
    for targets, scores in pairs:
        both = torch.stack([targets, torch.softmax(scores / STUDENT_TEMPERATURE, dim=1)])
        if not rows:
            entropies, sums, used = (
                both.new_zeros(2),
                both.new_zeros(2, both.shape[2]),
                both.new_zeros(both.shape[2]),
            )
        rows += len(targets)
        entropies = entropies + _entropy(both).sum(dim=1)
        sums = sums + both.sum(dim=1)
        used[targets.argmax(dim=1)] = 1.0
    means = entropies / rows
    apart = _entropy(sums / rows) - means
    unit = normalize(features.float(), dim=1)
    return {
        "entropy.teacher": means[0],
        "entropy.student": means[1],
        "told_apart.teacher": apart[0],
        "told_apart.student": apart[1],
        "prototypes.used": used.sum() / min(rows, len(used)),
        "features.std": unit.std(dim=0).mean() * unit.shape[1] ** 0.5,
    }


def _entropy(rows: Float[Tensor, "*rows prototypes"]) -> Float[Tensor, "*rows"]:
    return torch.special.entr(rows).sum(dim=-1)
