"""A folder tree of pictures, and a cache folder of the test's own."""

from pathlib import Path

import pytest

from tests.pictures import class_folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Folders train and val with classes below, hidden files, and things that are no pictures."""
    root = tmp_path / "set"
    class_folder(root / "train", classes=3, each=3, size=(20, 16))
    class_folder(root / "val", classes=3, each=1, first=9, size=(20, 16))
    for name in (".hidden.jpg", "notes.txt", ".git/0.jpg", "train/._000.jpg", "archive.pdf"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"?")
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
