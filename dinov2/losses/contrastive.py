"""SSCD's losses (arXiv 2202.10261): views of one picture together, everything else apart and spread out."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from dinov2.losses.koleo import nearest_entropy
from dinov2.parallel import all_gather, rank


def contrastive(
    descriptors: Float[Tensor, "views dim"], origins: Int[Tensor, "views 2"], *, temperature: float = 0.05
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """InfoNCE over all ranks (sec. 3.2 and 4.4), and the entropy of the descriptors (sec. 4.1).

    A view that two pictures were mixed into matches the views of both. InfoNCE: the mean over views of
    -mean over matches j of log(exp(s_ij / t) / sum over k other than i of exp(s_ik / t)), s the cosine. The
    entropy is KoLeo's with the nearest neighbour among the views that do not match. In float32 at least.

    Args:
        descriptors: of this rank's views, equally many on each rank.
        origins: the two pictures of each view, by any number below 2**24 that is the same on all ranks; the
            same twice for a view of one.

    Returns:
        InfoNCE and entropy of this rank's views; their means over ranks are those of the whole batch. One
        collective forward and one backward, of descriptors.
    """
    with torch.autocast(descriptors.device.type, enabled=False):
        wide = descriptors if descriptors.dtype == torch.float64 else descriptors.float()
        own = functional.normalize(wide, dim=1)
        gathered = all_gather(torch.cat([own, origins.to(own.dtype)], dim=1))
        everyone, pictures = gathered[:, :-2], gathered[:, -2:].detach()
        related = sharing(origins.to(own.dtype), pictures)
        itself = torch.zeros_like(related)
        itself.diagonal(rank() * len(own)).fill_(True)
        return _infonce(own @ everyone.T / temperature, related & ~itself, itself), nearest_entropy(
            own, everyone, related | itself
        )


def sharing(ours: Tensor, theirs: Tensor) -> Bool[Tensor, "ours theirs"]:
    """Whether two views show a picture in common."""
    return (ours[:, None, :, None] == theirs[None, :, None, :]).flatten(2).any(dim=2)


def _infonce(
    logits: Float[Tensor, "views all"], matches: Bool[Tensor, "views all"], itself: Bool[Tensor, "views all"]
) -> Float[Tensor, ""]:
    log_shares = torch.log_softmax(logits.masked_fill(itself, -torch.inf), dim=1).masked_fill(~matches, 0.0)
    return -(log_shares.sum(dim=1) / matches.sum(dim=1).clamp(min=1)).mean()
