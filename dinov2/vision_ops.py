"""Makes torchvision, and timm which imports it, importable beside a CPU-only torch. Import this before them.

torchvision's registry wheel is built for CUDA: beside a CPU torch its compiled operators cannot be loaded,
and `import torchvision` ends with "operator torchvision::nms does not exist", because it attaches shape
functions to two operators that nobody declared. Here those two schemas are declared, without any
implementation, when and only when the compiled operators cannot be loaded. `torchvision.ops.nms` then still
raises torchvision's own clear error.

This is the one module that does its work at import, so that an import statement can stand where it is needed.
"""

import os
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _declare_missing() -> torch.library.Library | None:
    """The library that holds the declarations, or None where nothing is missing."""
    if hasattr(torch.ops.torchvision, "nms") or not (compiled := _compiled_operators()):
        return None  # declared already, or there is no torchvision
    try:
        torch.ops.load_library(compiled)  # what torchvision does when imported; a second time costs nothing
        return None
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        return library


def _compiled_operators() -> str | None:
    """Where torchvision's operators should be, found without importing it."""
    spec = find_spec("torchvision")
    if spec is None or not spec.origin:
        return None
    folder = Path(spec.origin).parent
    there = [folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES if (folder / f"_C{suffix}").exists()]
    return os.fspath(there[0] if there else folder / "_C")


# The declarations vanish with this object, so it lives as long as the process; a reload keeps the first.
_LIBRARY: torch.library.Library | None = globals().get("_LIBRARY") or _declare_missing()
