"""`dinov2 train` on a machine with a fault: the same command, behind a hook into torch's modules.

python -m tests.poisoned …    FAULT=constant: pictures of one colour come out of the patch embedding as NaN
                              FAULT=weights:6: memory is damaged at the student's sixth forward, once
"""

import os
import time
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from dinov2.console import run
from dinov2.models.vit import PatchEmbed
from dinov2.ssl.networks import Branch
from dinov2.train.__main__ import main

KIND, _, AT = os.environ["FAULT"].partition(":")
forwards = 0


def constant(module: torch.nn.Module, given: tuple[Any, ...], result: Any) -> Any:
    if not isinstance(module, PatchEmbed):
        return None
    flat = [(crops.amax((2, 3)) == crops.amin((2, 3))).all(1) for crops in given[0]]
    return [torch.where(bad[:, None, None], torch.nan, out) for bad, out in zip(flat, result, strict=True)]


def sleep(module: torch.nn.Module, given: tuple[Any, ...], result: Any) -> None:
    global forwards
    if os.environ.get("RANK") == "1" and isinstance(module, Branch) and module.training:
        forwards += 1
        if forwards == int(AT):
            time.sleep(600)


def weights(module: torch.nn.Module, given: tuple[Any, ...], result: Any) -> None:
    global forwards
    if isinstance(module, Branch) and any(weight.requires_grad for weight in module.parameters()):
        forwards += 1
        if forwards == int(AT):
            next(module.get_submodule("backbone.blocks").parameters()).data[3] = torch.inf


register_module_forward_hook({"constant": constant, "sleep": sleep, "weights": weights}[KIND])
run(main, "train")
