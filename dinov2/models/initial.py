"""Initial weights, and networks that come into being on the meta device, part by part."""

import torch
from torch import nn


@torch.no_grad()
def init_own(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Set a module's own parameters, not those of its children.

    Truncated normals of 0.02 and biases of zero; the patch embedding uniform within 1 / sqrt(inputs), as the
    published models began: with patches of 8 its weights are twice as large, and the positions, 0.02, drown a
    patch less. A module of ours with a method `init_own` knows better.
    """
    if isinstance(module, nn.Conv2d):
        bound = module.weight[0].numel() ** -0.5
        for own in (module.weight, module.bias):
            if own is not None:
                nn.init.uniform_(own, -bound, bound, generator=generator)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm | nn.BatchNorm1d | nn.SyncBatchNorm):
        module.reset_parameters()
    elif callable(own := getattr(module, "init_own", None)):
        own(generator)


def materialise(module: nn.Module, device: torch.device, generator: torch.Generator) -> None:
    """Bring `module` to `device`; what is on the meta device gets its initial weights on the way.

    The draws are made on the CPU whatever the device, so one seed gives the same numbers everywhere.
    """
    for part in module.modules():
        if any(own.is_meta for own in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
            part.to_empty(device="cpu", recurse=False)
            init_own(part, generator)
    module.to(device)
