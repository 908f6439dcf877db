"""What every test may rely on: a CUDA device where it says gpu, real pictures where it says data."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples every time: what fails here fails for everybody, and what passed once passes again.
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")

REAL_PICTURES = Path(os.environ.get("DINOV2_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
ON_CLUSTER = "tests/slurm/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The cluster first: there is one to a machine, and its tests mostly wait."""
    items.sort(key=lambda item: not item.nodeid.startswith(ON_CLUSTER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes each takes a file as a whole, and one takes all that runs on the cluster."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "cluster" if nodeid.startswith(ON_CLUSTER) else super()._split_scope(nodeid)

    return ByFile(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    if item.get_closest_marker("data") and not REAL_PICTURES.is_dir():
        pytest.skip(
            f"needs real pictures: {REAL_PICTURES} is not there; DINOV2_TEST_DATA names another folder"
        )


@pytest.fixture(scope="session")
def real_pictures() -> Path:
    """The folder with imagenette112.tar, grocery.tar, messy_pool.tar and others; for tests marked data."""
    return REAL_PICTURES
