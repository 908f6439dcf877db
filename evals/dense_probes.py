"""What learns an answer for each patch from its token: a trained linear layer, ridge regression, neighbours.

All three take tokens [n, dim] to outputs [n, outputs]. The last two need one pass over the training pictures
and no training: ridge regression is solved in closed form from sums over all patches (Hoerl and Kennard,
1970); k-NN is DINO's vote (arXiv 2104.14294, sec. 4) with patches in place of pictures.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor, nn
from torch.nn.functional import normalize

from dinov2.console import progress
from dinov2.data.order import derive_seed
from dinov2.exits import UserError
from dinov2.files import write_bytes
from dinov2.neighbours import nearest
from evals.bench import Bench
from evals.dense_batches import Batch
from evals.dense_config import DenseConfig

BETAS = (0.9, 0.999)
WARM_UP = 1500  # steps, or a tenth of all where that is less
INITIAL_STD = 0.01
ROWS = 1 << 14  # patches whose neighbours are looked up at once


class Probe(Protocol):
    """Tokens to outputs."""

    def __call__(self, tokens: Float[Tensor, "n dim"], /) -> Float[Tensor, "n outputs"]: ...


class LinearProbe(nn.Module):
    """Batch norm and a linear layer, alike for every patch (a 1x1 convolution)."""

    def __init__(self, dim: int, outputs: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, outputs)
        generator = torch.Generator().manual_seed(derive_seed("dense head", seed))
        nn.init.normal_(self.linear.weight, std=INITIAL_STD, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Float[Tensor, "n dim"]) -> Float[Tensor, "n outputs"]:
        return self.linear(self.norm(tokens))


def train_linear(
    bench: Bench,
    dim: int,
    outputs: int,
    batches: Callable[[int], Iterator[Batch]],
    loss: Callable[[Float[Tensor, "batch patches outputs"], Tensor], Float[Tensor, ""]],
    config: DenseConfig,
    saved: Path,
) -> Probe:
    """A linear layer trained by AdamW, from where a killed command left it in `saved`.

    Args:
        batches: from a step on.
        loss: of outputs of a batch's patches, and the truth under its windows.
    """
    head = LinearProbe(dim, outputs, config.seed).to(bench.device).train()
    optimiser = torch.optim.AdamW(
        head.parameters(), config.learning_rate, betas=BETAS, weight_decay=config.weight_decay
    )
    step = _resume(head, optimiser, saved) if saved.exists() else 0
    start, before = time.perf_counter(), bench.seconds.get("features", 0.0)
    with progress(total=config.iterations, what="linear layer", unit="step", initial=step) as bar:
        for tokens, truth in batches(step):
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * _share(step, config.iterations)
            scores = head(tokens.to(bench.device).flatten(0, 1)).unflatten(0, tokens.shape[:2])
            value = loss(scores, truth.to(bench.device))
            if not value.isfinite():
                raise UserError(f"the loss is {float(value)} at step {step}: lower learning_rate=")
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            step += 1
            bar.update()
            if step % config.save_every == 0 or step == config.iterations:
                write_bytes(saved, as_safetensors(_state(head, optimiser, step)))
    bench.seconds["training"] = time.perf_counter() - start - (bench.seconds.get("features", 0.0) - before)
    return head.eval()


class RidgeSums:
    """Sums over patches from which ridge regression is solved, in float64; their memory is dim²."""

    def __init__(self, dim: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.x = torch.zeros(dim, dtype=torch.float64, device=device)
        self.y = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.xx = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.xy = torch.zeros(dim, outputs, dtype=torch.float64, device=device)

    def add(
        self, tokens: Float[Tensor, "n dim"], targets: Float[Tensor, "n outputs"], weights: Float[Tensor, "n"]
    ) -> None:
        """Patches whose errors count by these weights."""
        x, y, w = tokens.double(), targets.double(), weights.double()[:, None]
        self.weight += w.sum()
        self.x += (w * x).sum(0)
        self.y += (w * y).sum(0)
        self.xx += x.T @ (w * x)
        self.xy += x.T @ (w * y)

    def solve(self, penalty: float) -> Probe:
        """The linear layer with the least squared error plus `penalty` mean variances x squared weights.

        The bias is not penalised.
        """
        if not self.weight:
            raise UserError("no patch of the training pictures has a truth to learn from")
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        covariance = self.xx / self.weight - mean_x.outer(mean_x)
        shared = self.xy / self.weight - mean_x.outer(mean_y)
        ridge = penalty * covariance.diagonal().mean().clamp(min=1e-12)
        identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
        weight = torch.linalg.solve(covariance + ridge * identity, shared)
        bias = (mean_y - mean_x @ weight).float()
        return lambda tokens: tokens @ weight.float() + bias


class Bank:
    """Training patches with their targets, at most `size`, as many of each picture; k-NN over them."""

    def __init__(self, size: int, pictures: int, seed: int) -> None:
        self.each = max(1, -(-size // pictures))
        self.seed, self.pictures = seed, 0
        self.tokens: list[Tensor] = []
        self.targets: list[Tensor] = []

    def add(
        self, tokens: Float[Tensor, "n dim"], targets: Float[Tensor, "n outputs"], weights: Float[Tensor, "n"]
    ) -> None:
        """Patches of one picture; those of weight 0 are never drawn."""
        known = weights.nonzero()[:, 0].cpu()
        generator = torch.Generator().manual_seed(derive_seed("bank", self.seed, self.pictures))
        drawn = known[torch.randperm(len(known), generator=generator)[: self.each]].to(tokens.device)
        self.tokens.append(normalize(tokens[drawn].float(), dim=1))
        self.targets.append(targets[drawn].float())
        self.pictures += 1

    def probe(self, k: int, temperature: float) -> Probe:
        """The mean target of the k nearest patches by cosine, each weighing exp(cosine / temperature)."""
        base, targets = torch.cat(self.tokens), torch.cat(self.targets)
        if not len(base):
            raise UserError("no patch of the training pictures has a truth to learn from")

        def answer(tokens: Float[Tensor, "n dim"]) -> Float[Tensor, "n outputs"]:
            parts = []
            for queries in normalize(tokens.float(), dim=1).split(ROWS):
                similarity, index = nearest(queries, base, min(k, len(base)), device=base.device)
                weights = (similarity / temperature).softmax(1)
                parts.append((weights[:, :, None] * targets[index]).sum(1))
            return torch.cat(parts)

        return answer


def _share(step: int, steps: int) -> float:
    """Of the learning rate: up in a line over the warm-up, and down in a line to 0."""
    warm_up = min(WARM_UP, max(1, steps // 10))
    return min(1.0, (step + 1) / warm_up) * (1 - step / steps)


def _state(head: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> dict[str, Tensor]:
    tensors = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    for place, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{place}.{name}": tensor for name, tensor in moments.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()} | {
        "step": torch.tensor(step)
    }


def _resume(head: nn.Module, optimiser: torch.optim.Optimizer, saved: Path) -> int:
    tensors = load_file(saved)
    head.load_state_dict(
        {name.removeprefix("head."): one for name, one in tensors.items() if name.startswith("head.")}
    )
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, place, key = name.split(".")
            moments.setdefault(int(place), {})[key] = tensor
    optimiser.load_state_dict(optimiser.state_dict() | {"state": moments})
    return int(tensors["step"])
