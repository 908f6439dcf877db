"""A step of DINOv2 in its plainest form: the yardstick of every optimisation. Frozen on 2026-11-21.

Float32; global and local crops in passes of their own; stochastic depth by masks that multiply (everything is
computed); the whole float32 matrix of scores, by automatic gradients; Sinkhorn by exponentials. The
weights, and the modules that hold them, are those of the package.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dinov2.models.attention import Attention
from dinov2.models.backbone import Backbone
from dinov2.models.blocks import Block
from dinov2.models.heads import DINOHead
from dinov2.models.vit import VisionTransformer
from dinov2.ssl.networks import Branch
from dinov2.ssl.objective import Views


@dataclass
class Plain:
    """What the step needs beside its views."""

    student: Branch
    teacher: Branch
    optimizer: torch.optim.Optimizer
    teacher_temperature: float
    momentum: float
    drop_path: float
    koleo: float = 0.1
    clip: float = 3.0

    def step(self, views: Views) -> float:
        """One step; its loss."""
        self.optimizer.zero_grad()
        loss = self.loss(views)
        loss.backward()
        for part in self.student.parts():
            torch.nn.utils.clip_grad_norm_(part.parameters(), self.clip)
        self.optimizer.step()
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.mul_(self.momentum).add_(new, alpha=1 - self.momentum)
        return float(loss.detach())

    def loss(self, views: Views) -> Tensor:
        masks, local = views.masks, views.local_crops
        assert masks is not None and local is not None
        with torch.no_grad():
            cls, patches = tokens(self.teacher.backbone, views.global_crops, None, 0.0)
            targets = sinkhorn(scores(self.teacher.dino_head, cls), self.teacher_temperature)
            wanted = scores(self.teacher.ibot_head or self.teacher.dino_head, patches[masks])
            patch_targets = sinkhorn(wanted, self.teacher_temperature)
        cls, patches = tokens(self.student.backbone, views.global_crops, masks, self.drop_path)
        small, _ = tokens(self.student.backbone, local, None, self.drop_path)
        said = torch.log_softmax(scores(self.student.dino_head, torch.cat([cls, small])) / 0.1, dim=1)
        batch = len(cls) // 2
        views_of = said.unflatten(0, (-1, batch))
        first, second = targets.chunk(2)
        terms = [-(second * views_of[0]).sum(1).mean(), -(first * views_of[1]).sum(1).mean()]
        for crop in views_of[2:]:
            terms += [-(first * crop).sum(1).mean(), -(second * crop).sum(1).mean()]
        guess = scores(self.student.ibot_head or self.student.dino_head, patches[masks])
        each = -(patch_targets * torch.log_softmax(guess / 0.1, dim=1)).sum(1)
        weight = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
        ibot = (each * weight).sum() / len(masks)
        return torch.stack(terms).mean() + ibot + self.koleo * sum(koleo(view) for view in cls.chunk(2))


def tokens(
    network: Backbone, images: Tensor, masks: Tensor | None, rate: float
) -> tuple[Float[Tensor, "crops dim"], Float[Tensor, "crops patches dim"]]:
    """CLS and patch tokens of crops of one size, after the last norm."""
    assert isinstance(network, VisionTransformer)
    packed, groups = network._pack([images], [masks])
    x = packed.unflatten(0, groups[0])
    for block in network.blocks:
        assert isinstance(block, Block)
        x = x + kept(len(x), rate) * block.ls1(attention(block.attn, block.norm1(x)))
        x = x + kept(len(x), rate) * block.ls2(block.mlp(block.norm2(x)))
    x = network.norm(x)
    return x[:, 0], x[:, 1 + network.num_register_tokens :]


def attention(layer: Attention, x: Tensor) -> Tensor:
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    return layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def kept(count: int, rate: float) -> Tensor:
    """Stochastic depth as a factor of each crop, 0 or 1 / (1 - rate)."""
    return (torch.rand(count, 1, 1) >= rate) / (1 - rate)


def scores(head: DINOHead, x: Tensor) -> Tensor:
    return F.normalize(head.mlp(x), dim=1) @ F.normalize(head.prototypes.weight, dim=1).T


def sinkhorn(said: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    q = ((said - said.max()) / temperature).exp()
    for _ in range(rounds):
        q = q / q.sum(dim=0, keepdim=True)
        q = q / q.sum(dim=1, keepdim=True)
    return q


def koleo(x: Tensor) -> Tensor:
    x = F.normalize(x, dim=1)
    near = (x @ x.T - 3 * torch.eye(len(x))).argmax(dim=1)
    return -torch.log((x - x[near]).norm(dim=1) + 1e-8).mean()
