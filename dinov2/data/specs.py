"""The words that name sources: commas, braces, globs, `name=SPEC`, and folders inside tars."""

import os
import re
from dataclasses import dataclass
from glob import has_magic
from itertools import product

from dinov2.data.cache import is_remote
from dinov2.exits import UserError

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}  # names of top folders, and of values in split columns, and what they mean
UNTELLING = {*SPLITS, "images"}  # folder names that do not identify a source by themselves
NAMED = re.compile(r"([\w.+-]+)=(.+)", re.DOTALL)
INNER = re.compile(r"(.*?\.tar)/(.+)", re.DOTALL)
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAGIC = re.compile(r"[*?\[{]")
LARGEST_RANGE = 10_000_000


@dataclass(frozen=True)
class Spec:
    """One source as the user wrote it: its name, where it is, and the folder inside its tars ("" for all)."""

    name: str
    place: str
    inner: str = ""


def parse(words: str) -> list[Spec]:
    """Take a `pool=` or `data=` value apart.

    Raises:
        UserError: nothing is named, or two sources have the same name.
    """
    specs = [_parse_one(part) for part in split_at_commas(words)]
    if not specs:
        raise UserError("no source is named; give a folder, a tar, a list, or several joined by commas")
    names = [spec.name for spec in specs]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UserError(f"two sources are called {double!r}; name them, as in one={specs[0].place},two=…")
    return specs


def split_at_commas(words: str) -> list[str]:
    """Split at commas outside braces. A path that exists as it stands is left whole."""
    if os.path.exists(words):
        return [words]
    parts, depth = [""], 0
    for letter in words:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` and `{a,b}.tar`, as the shell would, in order; several braces multiply."""
    pieces = BRACES.split(pattern)  # literal, inside, literal, inside, …
    choices = [_alternatives(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return ["".join(parts) for parts in product(*choices)]


def fixed_folder(pattern: str) -> str:
    """The leading folders of a pattern that hold no glob or brace: what uris are relative to."""
    magic = MAGIC.search(pattern)
    return pattern[: pattern.rfind("/", 0, magic.start() if magic else len(pattern)) + 1]


def default_name(place: str) -> str:
    """The last path component that says something: no .tar or .parquet, with its parents if it is a split."""
    if place.startswith("pipe:"):
        place = place.split()[-1]
    elif not is_remote(place):
        place = os.path.abspath(os.path.expanduser(place))
    magic = MAGIC.search(place)
    if magic:
        place = place[: magic.start()].rstrip("-_.")
    parts = [re.sub(r"\.(tar|parquet|csv|tsv|txt)$", "", part) for part in place.split("/") if part]
    if parts and parts[-1] == "manifest":
        parts.pop()
    last = len(parts) - 1
    while last > 0 and parts[last] in UNTELLING:
        last -= 1
    return "-".join(parts[max(last, 0) :]) or "pictures"


def is_pattern(place: str) -> bool:
    return has_magic(place) or BRACES.search(place) is not None


def _parse_one(words: str) -> Spec:
    named = None if os.path.exists(words) else NAMED.fullmatch(words)
    name, place = (named[1], named[2]) if named else ("", words)
    inside = None if place.startswith("pipe:") or os.path.exists(place) else INNER.fullmatch(place)
    if inside:
        return Spec(name or default_name(place), inside[1], inside[2].strip("/"))
    return Spec(name or default_name(place), place)


def _alternatives(inside: str) -> list[str]:
    numbers = RANGE.fullmatch(inside)
    if not numbers:
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if not 0 <= last - first < LARGEST_RANGE:
        raise UserError(f"{{{inside}}} is no range of shards; write it as {{000..127}}")
    width = len(numbers[1]) if numbers[1].startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]
