"""A backbone and labelled pictures that the tests of evaluation share."""

from pathlib import Path

import pytest

from tests.evals.small import small_backbone
from tests.pictures import class_folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, and pictures in train/ and val/."""
    root = tmp_path_factory.mktemp("evals")
    class_folder(root / "data" / "train", classes=3, each=12)
    class_folder(root / "data" / "val", classes=3, each=8, first=50)
    small_backbone(root)
    return root
