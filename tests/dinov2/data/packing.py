"""Tars for tests, made by the standard library."""

import io
import tarfile
from pathlib import Path

from dinov2.data.sources import Source

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def pack(tar: Path, root: Path, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(tar, "w", format=form) as file:
        file.add(root, "./")
    return tar


def packed(tar: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(tar, "w", format=form, errors="surrogateescape") as file:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return tar


def contents(source: Source) -> dict[str, bytes]:
    return {uri: source.read(row) for row, uri in enumerate(source.table["uri"].to_pylist())}
