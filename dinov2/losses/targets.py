"""Teacher targets: scores over prototypes made into distributions that neither collapse nor stay flat."""

import torch
from jaxtyping import Float
from torch import Tensor

from dinov2.parallel import all_max, all_sum


def sinkhorn(
    scores: Float[Tensor, "samples prototypes"], temperature: float, rounds: int = 3
) -> Float[Tensor, "samples prototypes"]:
    """Targets that use all prototypes equally (SwAV sec. 3.1; DINOv2 sec. 4), over the samples of all ranks.

    Alternately makes each prototype sum to 1/K over samples and each sample to 1/B. Since the last step makes
    a sample's target sum to one, the constants 1/K and 1/B cancel, so B, which differs between ranks for
    masked patches, need not be known. In the log domain, in float32: `exp(scores / temperature)` overflows,
    and after subtracting the global maximum a prototype that nobody prefers underflows to 0/0.

    Args:
        scores: teacher scores of this rank, any float type; possibly no rows.
        temperature: the teacher's.

    Returns:
        float32, each row sums to one. Two collectives of K numbers a round where there are many ranks.
    """
    log_q = scores.detach().float() / temperature
    for _ in range(rounds):
        log_q = log_q - _logsumexp_over_samples(log_q)
        log_q = log_q - torch.logsumexp(log_q, dim=1, keepdim=True)
    return log_q.exp()


def centered(
    scores: Float[Tensor, "samples prototypes"], center: Float[Tensor, " prototypes"], temperature: float
) -> Float[Tensor, "samples prototypes"]:
    """Targets softmax((t - c) / tau) (DINO sec. 3.1): the centre is against one prototype taking all."""
    return torch.softmax((scores.detach().float() - center) / temperature, dim=1)


def next_center(
    center: Float[Tensor, " prototypes"], scores: Float[Tensor, "samples prototypes"], momentum: float = 0.9
) -> Float[Tensor, " prototypes"]:
    """The centre after this batch: c <- m c + (1 - m) mean of the scores over all ranks (DINO eq. 4)."""
    scores = scores.detach().float()
    total = all_sum(torch.cat([scores.sum(dim=0), scores.new_tensor([float(scores.shape[0])])]))
    if total[-1] == 0:  # nothing was masked in the whole batch
        return center
    return momentum * center + (1 - momentum) * total[:-1] / total[-1]


def _logsumexp_over_samples(log_q: Float[Tensor, "samples prototypes"]) -> Float[Tensor, " prototypes"]:
    local = torch.logsumexp(log_q, dim=0)  # -inf on a rank without samples
    highest = all_max(local)
    if highest is local:
        return local
    return highest + torch.log(all_sum(torch.exp(local - highest)))
