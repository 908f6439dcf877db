"""torchvision and timm can be imported after `dinov2.vision_ops`, whatever torch was built for."""

import _ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ALL_IS_WELL = """
import importlib
import dinov2.vision_ops
import torchvision, timm
from torchvision.transforms import v2
importlib.reload(dinov2.vision_ops)
import torch
picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
assert v2.Resize(4)(picture).shape == (3, 4, 4)
assert timm.create_model("test_vit", num_classes=0).eval()(torch.zeros(1, 3, 160, 160)).isfinite().all()
assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms
try:
    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
except RuntimeError as error:
    assert "Couldn't load custom C++ ops" in str(error), error
"""

AFTER_A_FAILED_IMPORT = """
try:
    import torchvision
except RuntimeError:
    pass
import dinov2.vision_ops
import torchvision
"""

DECLARED_BY_SOMEBODY_ELSE = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import dinov2.vision_ops
assert not hasattr(torch.ops.torchvision, "qnms")
"""

DECLARES = """
import dinov2.vision_ops, torch, sys
print(hasattr(torch.ops.torchvision, "nms"), "torchvision" in sys.modules)
"""


def in_a_process(code: str, *, first_on_path: Path | None = None) -> str:
    path = os.pathsep.join(map(str, filter(None, (first_on_path, ROOT))))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("code", [ALL_IS_WELL, AFTER_A_FAILED_IMPORT, DECLARED_BY_SOMEBODY_ELSE])
def test_torchvision_and_timm_work_after_it(code: str) -> None:
    in_a_process(code)


@pytest.mark.parametrize(("compiled", "declares"), [("loads", False), ("broken", True), ("missing", True)])
def test_it_declares_only_what_cannot_be_loaded(tmp_path: Path, compiled: str, declares: bool) -> None:
    package = tmp_path / "torchvision"  # a stand-in, found before the installed one
    package.mkdir()
    (package / "__init__.py").write_text("")
    if compiled == "loads":
        shutil.copy(_ctypes.__file__, package / "_C.so")
    elif compiled == "broken":
        (package / "_C.so").write_bytes(b"not a library")
    assert in_a_process(DECLARES, first_on_path=tmp_path) == f"{declares} False"
