"""Pictures and the recipe of a small run."""

from pathlib import Path

import pytest

from tests.dinov2.train.runs import SMALL
from tests.pictures import class_folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` and `test` with labels, and `small.yaml`."""
    root = tmp_path_factory.mktemp("pictures")
    class_folder(root / "train", classes=3, each=8)
    class_folder(root / "test", classes=3, each=3, first=8)
    (root / "small.yaml").write_text(SMALL)
    return root
