"""INRIA Copydays: `original/`, and copies in `strong/`, `crops/PERCENT/` and `jpeg/QUALITY/`.

Files are called by number. The hundreds say which original a picture comes from: 200100.jpg is an original,
strong/200101.jpg and crops/50/200100.jpg are copies of it (Douze et al., CIVR 2009).
"""

from dataclasses import dataclass
from pathlib import Path

from dinov2.data.sources import Source, open_source
from dinov2.exits import UserError

ORIGINAL, COPIES = "original", ("strong", "crops", "jpeg")


@dataclass(frozen=True)
class Copydays:
    """The pictures of all folders.

    Attributes:
        original: row of each original, by its number.
        copies: for each attack ("strong", "crops/50") rows and the numbers of their originals.
    """

    source: Source
    original: dict[int, int]
    copies: dict[str, list[tuple[int, int]]]


def here(root: Path) -> bool:
    return (root / ORIGINAL).is_dir() and any((root / name).is_dir() for name in COPIES)


def find(root: Path, cache: Path | None = None) -> Copydays:
    """Open the data set.

    Raises:
        UserError: a file has no number for a name, two originals have the same, or a copy has no original.
    """
    source = open_source(str(root), cache=cache)
    original: dict[int, int] = {}
    copies: dict[str, list[tuple[int, int]]] = {}
    for row, uri in enumerate(source.table["uri"].to_pylist()):
        folder, _, file = uri.rpartition("/")
        if folder.partition("/")[0] not in (ORIGINAL, *COPIES):
            continue
        number = Path(file).stem
        if not number.isdecimal():
            raise UserError(f"{root / uri}: files of Copydays are called by number, as in 200100.jpg")
        block = int(number) // 100
        if folder != ORIGINAL:
            copies.setdefault(folder, []).append((row, block))
        elif original.setdefault(block, row) != row:
            raise UserError(f"{root / uri}: another original has the same hundreds")
    for folder, some in copies.items():
        for row, block in some:
            if block not in original:
                raise UserError(f"{root / source.table['uri'][row].as_py()} ({folder}) has no original")
    return Copydays(source, original, dict(sorted(copies.items())))
