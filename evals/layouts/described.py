"""A file of ground truth, as results state it: by name and content."""

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Described:
    """What was measured against, where that is no source of pictures.

    Attributes:
        count: of what it has one for each: queries, pairs.
    """

    name: str
    fingerprint: str
    count: int

    def __len__(self) -> int:
        return self.count

    @classmethod
    def file(cls, path: Path, count: int) -> "Described":
        return cls(path.name, hashlib.sha256(path.read_bytes()).hexdigest()[:32], count)

    @classmethod
    def content(cls, name: str, content: str, count: int) -> "Described":
        return cls(name, hashlib.sha256(content.encode()).hexdigest()[:32], count)
