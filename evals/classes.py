"""Which classes a test part has: their names mapped to those that were learnt, and what may be answered.

ImageNet-A and ImageNet-R (arXiv 1907.07174, 2006.16241) hold 200 of ImageNet's thousand classes, and are
scored on answers among these alone. ImageNet-V2 (arXiv 1902.10811) names its folders 0 to 999, the places of
the classes in the sorted list of ImageNet's own folders.
"""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.data.sources import Source
from dinov2.exits import UserError

NUMBERS = "numbers"


@dataclass(frozen=True)
class ClassMap:
    """Names of a test part's classes to those that were learnt; a result states it by its content."""

    name: str
    fingerprint: str
    names: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.names)


def class_map(spec: str, classes: Sequence[str]) -> ClassMap:
    """The map that `class_map=` names.

    Args:
        spec: `numbers`, or a file with a line `test class,learnt class` for each; # begins a comment.
        classes: those learnt, sorted.

    Raises:
        UserError: the file is missing or no such table, or names a class that was not learnt.
    """
    if spec == NUMBERS:
        names = {str(number): name for number, name in enumerate(classes)}
    else:
        names = _from_file(Path(spec))
    if unknown := sorted(set(names.values()) - set(classes)):
        raise UserError(
            f"class_map={spec} leads to {len(unknown)} classes that were not learnt: {unknown[0]}"
        )
    digest = hashlib.sha256(repr(sorted(names.items())).encode()).hexdigest()[:32]
    return ClassMap(f"class map {Path(spec).name}", digest, names)


def renamed(source: Source, names: Mapping[str, str]) -> Source:
    """The source with its classes called otherwise; those without another name keep theirs.

    Numbers may be written with leading zeros.
    """

    def called(label: str) -> str:
        return names.get(label, names.get(label.lstrip("0") or "0", label) if label.isdecimal() else label)

    return source.labelled([None if label is None else called(label) for label in source.labels()])


def _from_file(path: Path) -> dict[str, str]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class_map={path} cannot be read: {error}") from None
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    if not rows or any(len(row) != 2 or not all(row) for row in rows):
        raise UserError(f"class_map={path}: each line should be: test class,learnt class")
    return dict(rows)
