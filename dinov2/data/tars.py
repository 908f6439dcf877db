"""Where every picture lies inside a tar: an index made by reading headers only, kept in the cache.

Tars are of two kinds. In a *WebDataset* tar, the files of one sample share a key (the path up to the first
dot of the file name) and pictures have a .cls, .json or .txt beside them. Others are *plain* folder trees.
"""

import io
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from dinov2.data.cache import Cache, is_remote, remote_version, short_hash
from dinov2.data.decode import picture_extensions
from dinov2.data.manifest import FORMAT, VERSION, table_format
from dinov2.exits import UserError
from dinov2.files import write_table

log = logging.getLogger(__name__)

BLOCK = 512
LABEL_KEYS, LICENCE_KEYS = ("label", "cls", "class"), ("licence", "license")
LONGEST_LABEL = 64  # characters of a .txt beside a picture; what is longer is a caption
LONGEST_COMPANION = 1 << 20  # bytes
LONGEST_NAME = 1 << 20  # bytes of an extended header
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
PRIVATE = {0xDC00 + byte: 0xF700 + byte for byte in range(0x80, 0x100)}
LITERAL = {new: old for old, new in PRIVATE.items()}

INDEX_SCHEMA = table_format(
    "dinov2.tar_index",
    {
        "name": pa.large_string(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "label": pa.string(),
        "split": pa.string(),
        "licence": pa.string(),
        "consent": pa.string(),
    },
)


class CorruptTar(Exception):
    """The tar's structure cannot be followed; the message says where and why, without the tar's name."""


class Member(NamedTuple):
    name: str
    offset: int  # of the payload, in bytes
    size: int


@dataclass(frozen=True)
class TarIndex:
    """The pictures of one tar, sorted by name (`INDEX_SCHEMA`); `grouped`: it is a WebDataset tar."""

    table: pa.Table
    grouped: bool


def printable(name: str) -> str:
    """A file name that was not UTF-8, as valid text: each stray byte becomes a private-use character."""
    return name if name.isascii() else name.translate(PRIVATE)


def on_disk(name: str) -> str:
    """The inverse of `printable`."""
    return name if name.isascii() else name.translate(LITERAL)


def indexed(address: str, cache: Cache) -> tuple[str, TarIndex]:
    """The index of a tar, from the cache if the tar is still the same one (size and time, or ETag).

    Returns:
        The address to read samples from, which for a URL names the version, and the index.

    Raises:
        UserError: the tar is missing, cannot be fetched, or is corrupt; it is named.
    """
    try:
        return _indexed(address, cache)
    except FileNotFoundError:
        raise UserError(f"{address} does not exist") from None
    except CorruptTar as error:
        raise UserError(f"the tar {address} is corrupt: {error}; fetch it again or leave it out") from None
    except OSError as error:
        raise UserError(str(error) if is_remote(address) else f"{address}: {error.strerror}") from None


def index(file: int, length: int) -> TarIndex:
    """Find the pictures of an uncompressed tar. Hidden files do not count; of one name twice, the last does.

    Args:
        file: descriptor of the tar, open for reading.
        length: its size in bytes.

    Raises:
        CorruptTar: a header is damaged, the tar ends inside a member, or it is compressed.
    """
    samples: dict[str, _Sample] = {}
    pictures: dict[str, Member] = {}
    extensions = picture_extensions()
    for member in members(file, length):
        key, extension = _key(member.name)
        suffix = extension.rpartition(".")[2].lower()
        if _hidden(member.name):
            continue
        if suffix in extensions:
            pictures[member.name] = member
            samples.setdefault(key, _Sample()).pictures.append(member)
        elif extension in ("cls", "json", "txt"):
            samples.setdefault(key, _Sample()).companions[extension] = member
    grouped = [sample for sample in samples.values() if sample.pictures and sample.companions]
    if not grouped:
        return TarIndex(_table((member, {}) for member in pictures.values()), grouped=False)
    chosen = (sample for sample in samples.values() if sample.pictures)
    return TarIndex(_table((sample.picture(), sample.facts(file)) for sample in chosen), grouped=True)


def members(file: int, length: int) -> Iterator[Member]:
    """Regular files of a v7, ustar, GNU or PAX tar, in order; a hard link leads to its target's payload."""
    position, extra, found = 0, _Extra(), dict[str, Member]()
    while position + BLOCK <= length:
        head = os.pread(file, BLOCK, position)
        if not head.strip(b"\0"):
            return
        _check_header(head, position)
        kind, start = head[156:157], position + BLOCK
        size = 0 if kind in b"123456" else extra.size if extra.size is not None else _number(head[124:136])
        position = start + -(-size // BLOCK) * BLOCK
        if start + size > length:
            raise CorruptTar(f"it is cut off inside a file at byte {length:,} (whole: {len(found):,} files)")
        if kind in b"LKxg":
            extra.take(kind, os.pread(file, min(size, LONGEST_NAME), start))
            continue
        name = extra.name or _header_name(head)
        if kind in b"\x0007":
            found[name] = Member(name, start, size)
            yield found[name]
        elif kind == b"1" and (target := found.get(extra.link or _text(head[157:257]))):
            yield Member(name, target.offset, target.size)
        extra = _Extra()
    if length < BLOCK:
        raise CorruptTar("it is too short for a tar")


def _indexed(address: str, cache: Cache) -> tuple[str, TarIndex]:
    if address.startswith("pipe:"):  # has no version; at least its length must not have changed
        with cache.open(address) as file:
            version, source, kept_as = str(os.fstat(file.fileno()).st_size), address, address
    elif is_remote(address):
        version = remote_version(address)
        source = f"{address}#version={version}" if version else address
        kept_as = address
    else:
        found = os.stat(address)
        version, source = f"{found.st_size}-{found.st_mtime_ns}", address
        kept_as = os.path.realpath(address)
    stamp = short_hash(version + " ".join(sorted(picture_extensions())))
    kept = _load(cache.index_path(kept_as), stamp)
    if kept is not None:
        return source, kept
    with cache.open(source) if is_remote(address) else io.FileIO(address) as file:
        made = index(file.fileno(), os.fstat(file.fileno()).st_size)
    _keep(cache.index_path(kept_as), stamp, made)
    return source, made


def _load(path: Path, stamp: str) -> TarIndex | None:
    try:
        table = parquet.read_table(path)
    except (OSError, pa.ArrowInvalid):
        return None
    said = table.schema.metadata or {}
    if any(said.get(key) != INDEX_SCHEMA.metadata[key] for key in (FORMAT, VERSION)):
        return None
    if said.get(b"stamp") != stamp.encode():
        return None
    return TarIndex(table.replace_schema_metadata(None), said.get(b"grouped") == b"yes")


def _keep(path: Path, stamp: str, made: TarIndex) -> None:
    said = {**INDEX_SCHEMA.metadata, b"stamp": stamp, b"grouped": "yes" if made.grouped else "no"}
    try:
        write_table(path, made.table.replace_schema_metadata(said))
    except OSError as error:  # the index is a convenience: without it the next run walks the tar again
        log.warning("the tar index %s cannot be kept: %s", path, error)


@dataclass
class _Sample:
    """What shares one key in a WebDataset tar."""

    pictures: list[Member] = field(default_factory=list)
    companions: dict[str, Member] = field(default_factory=dict)

    def picture(self) -> Member:
        """The picture proper: `key.jpg` rather than `key.mask.png`, else the first."""
        return min(self.pictures, key=lambda member: _key(member.name)[1].count("."))

    def facts(self, file: int) -> dict[str, str | None]:
        """Label, split, licence, consent from the companions; a label in .json outranks .cls, then .txt."""
        text = {kind: _read_text(file, member) for kind, member in self.companions.items()}
        described = _object(text.get("json", ""))
        label = _first(described, LABEL_KEYS) or text.get("cls", "").strip()
        caption = text.get("txt", "").strip()
        if not label and "json" not in text and len(caption) <= LONGEST_LABEL:
            label = caption
        return {
            "label": label or None,
            "split": _first(described, ("split",)),
            "licence": _first(described, LICENCE_KEYS),
            "consent": _first(described, ("consent",)),
        }


@dataclass
class _Extra:
    """What GNU and PAX headers say about the next member."""

    name: str | None = None
    link: str | None = None
    size: int | None = None

    def take(self, kind: bytes, payload: bytes) -> None:
        if kind == b"L":
            self.name = _text(payload)
        elif kind == b"K":
            self.link = _text(payload)
        elif kind == b"x":
            records = dict(_pax_records(payload))
            self.name = _text(records[b"path"]) if b"path" in records else self.name
            self.link = _text(records[b"linkpath"]) if b"linkpath" in records else self.link
            self.size = int(records[b"size"]) if b"size" in records else self.size


def _pax_records(payload: bytes) -> Iterator[tuple[bytes, bytes]]:
    while payload.strip(b"\0"):
        length, space, _ = payload.partition(b" ")
        if not space or not length.isdigit() or not 0 < int(length) <= len(payload):
            raise CorruptTar("it has a damaged PAX header")
        key, _, value = payload[len(length) + 1 : int(length) - 1].partition(b"=")
        yield key, value
        payload = payload[int(length) :]


def _check_header(head: bytes, position: int) -> None:
    if position == 0 and head[:2] in COMPRESSED and head[257:262] != b"ustar":
        raise CorruptTar(
            f"it is compressed with {COMPRESSED[head[:2]]}; samples can be read only from a plain tar"
        )
    try:
        right = _number(head[148:156]) == sum(head) - sum(head[148:156]) + 8 * 32
    except CorruptTar:
        right = False
    if not right:
        where = f"its header at byte {position:,} is damaged" if position else "it is not a tar"
        raise CorruptTar(where)


def _number(digits: bytes) -> int:
    """Octal text, or GNU's base 256 for sizes of 8 GiB and more."""
    if digits[0] & 0x80:
        return int.from_bytes(digits[1:], "big")
    try:
        return int(digits.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        raise CorruptTar("it has a damaged header") from None


def _header_name(head: bytes) -> str:
    name = head[:100]
    if head[257:263] == b"ustar\0" and head[345:346] != b"\0":
        name = head[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _text(raw: bytes) -> str:
    name = raw.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return printable(name)


def _key(name: str) -> tuple[str, str]:
    """WebDataset's split of a member's name at the first dot of its last component."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name


def _read_text(file: int, member: Member) -> str:
    if member.size > LONGEST_COMPANION:
        return ""
    return os.pread(file, member.size, member.offset).decode("utf-8", "replace")


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _first(described: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    for key in keys:
        value = described.get(key)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value):
            return str(value)
    return None


def _table(rows: Iterable[tuple[Member, dict[str, str | None]]]) -> pa.Table:
    ordered = sorted(rows, key=lambda row: row[0].name)
    facts = {name: [fact.get(name) for _, fact in ordered] for name in INDEX_SCHEMA.names[3:]}
    columns = {
        "name": [member.name for member, _ in ordered],
        "offset": [member.offset for member, _ in ordered],
        "size": [member.size for member, _ in ordered],
    }
    return pa.table({**columns, **facts}, schema=INDEX_SCHEMA)
