"""Compare backbones over all that they were evaluated on, beside the papers' figures.

usage: dinov2 compare RESULTS… [output=compare.html]

RESULTS are output folders of `dinov2 eval`, result files, or results.jsonl files. What is compared is a task
on a data set with its settings. The best backbone is marked with * only where its 95% interval overlaps with
no other's. The papers' figures come with what differs: data, size, settings.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dinov2.console import run
from dinov2.exits import UserError
from evals.results import RESULTS, between, read_all, read_result, valued

PUBLISHED = Path(__file__).parent / "published.yaml"
OUTPUT = "output="
Result = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A result, and the page that it has, if any."""

    result: Result
    page: Path | None

    @property
    def backbone(self) -> str:
        return self.result["backbone"]["spec"]


@dataclass(frozen=True)
class Published:
    """A paper's figure for the protocol of a task."""

    backbone: str
    value: float
    metric: str
    source: str
    differs: list[str]


@dataclass
class Column:
    """One task on one data set with one set of settings; the last result of each backbone."""

    task: str
    data: str
    metric: str
    settings: dict[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)  # by backbone
    said: str = ""  # the settings by which it differs from other columns of the same task and data

    @property
    def title(self) -> str:
        return f"{self.task} {self.data}" + (f" ({self.said})" if self.said else "")

    @property
    def lower(self) -> bool:
        return any(self.metric in one.result.get("lower_is_better", ()) for one in self.entries.values())

    def best(self) -> str | None:
        """The backbone whose interval overlaps with no other's, on the better side of all."""
        spans = {name: _span(one.result, self.metric) for name, one in self.entries.items()}
        if len(spans) < 2 or not all(spans.values()):
            return None
        sign = -1 if self.lower else 1
        values = {name: sign * one.result["metrics"][self.metric] for name, one in self.entries.items()}
        first = max(values, key=lambda name: values[name])
        for name, span in spans.items():
            mine = spans[first]
            assert span is not None and mine is not None
            if name != first and (mine[0] <= span[1] if sign > 0 else mine[1] >= span[0]):
                return None
        return first

    def published(self) -> list[Published]:
        """The papers' figures for this task and metric."""
        some = next(iter(self.entries.values())).result
        return [
            Published(
                one["backbone"], one["value"], group["metric"], one["source"], _differences(group, one, some)
            )
            for group in _published()
            if group["task"] == self.task and re.match(rf"{group['metric']}(_k\d+)?$", self.metric)
            for one in group["figures"]
        ]


def main(words: list[str]) -> None:
    """Run the command: paths, and where the page goes."""
    if not words or words[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        sys.exit(0)
    outputs = [word.removeprefix(OUTPUT) for word in words if word.startswith(OUTPUT)]
    paths = [word for word in words if not word.startswith(OUTPUT)]
    if unknown := [word for word in paths if "=" in word and not Path(word).exists()]:
        raise UserError(f"{unknown[0]!r} is not understood: give paths of results, and output=FILE")
    if len(outputs) > 1 or not paths:
        raise UserError("give one or more results, and at most one output=FILE: dinov2 compare RESULTS…")
    entries = gathered(paths)
    columns = columns_of(entries)
    print(as_text(columns, backbones_of(entries)))
    from evals.compare_page import write_comparison  # matplotlib takes its time

    page = Path(outputs[0] if outputs else "compare.html")
    write_comparison(page, columns, backbones_of(entries))
    print(f"\n* best beyond the 95% intervals. The page: {page}")


def gathered(paths: Sequence[str]) -> list[Entry]:
    """All results at these paths, each once.

    Raises:
        UserError: a path does not exist, holds no results, or a file is none.
    """
    found: dict[str, Entry] = {}
    for path in map(Path, paths):
        for key, entry in _results_at(path).items():
            found.setdefault(key, entry)
    return list(found.values())


def columns_of(entries: Sequence[Entry]) -> list[Column]:
    """Sorted by task and data; those of equal task and data say by which settings they differ."""
    columns: dict[str, Column] = {}
    for entry in entries:
        result = entry.result
        key = json.dumps(
            [result["task"], _prints(result), result["headline"], result["settings"]], sort_keys=True
        )
        made = Column(result["task"], data_name(result), result["headline"], result["settings"])
        columns.setdefault(key, made).entries[entry.backbone] = entry
    found = sorted(columns.values(), key=lambda one: (one.task, one.data))
    for column in found:
        alike = [one.settings for one in found if (one.task, one.data) == (column.task, column.data)]
        differing = [
            name for name, value in column.settings.items() if any(s.get(name) != value for s in alike)
        ]
        column.said = ", ".join(f"{name}={_short(column.settings[name])}" for name in differing)
    return found


def backbones_of(entries: Sequence[Entry]) -> list[str]:
    return sorted({entry.backbone for entry in entries}, key=lambda name: (name == "pixels", name))


def as_text(columns: Sequence[Column], backbones: Sequence[str]) -> str:
    """A table a column to a line group: few terminals are as wide as there are tasks."""
    width = max([len(short_name(name)) for name in backbones] + [24])
    lines = []
    for column in columns:
        best = column.best()
        arrow = ", lower is better" if column.lower else ""
        lines += ["", f"{column.title}: {column.metric}{arrow}"]
        for name in backbones:
            if name in column.entries:
                result = column.entries[name].result
                spread = between(result, column.metric)
                mark = "*" if name == best else " "
                shown = f"{valued(result, column.metric, finer=True):>12}"
                lines.append(
                    f"  {short_name(name):<{width}} {shown} {mark} {f'({spread})' if spread else ''}".rstrip()
                )
        for one in column.published():
            differs = f"; differs: {', '.join(one.differs)}" if one.differs else "; the same protocol"
            lines.append(f"  {one.backbone:<{width}} {one.value:>11.1f}%   [{one.source}{differs}]")
    return "\n".join(lines).strip("\n")


def short_name(spec: str) -> str:
    """A backbone as a reader knows it: the end of its path, and whether its weights are fresh."""
    kind, colon, place = spec.rpartition(":")
    return kind + colon + "/".join(place.split("/")[-3:])


def data_name(result: Result) -> str:
    """The data that is tested, and where it is not the same, what is learnt from."""
    names = {part: facts["name"] for part, facts in result["data"].items()}
    tested = names.get("test") or next(iter(names.values()), "")
    return f"{names['train']} → {tested}" if names.get("train", tested) != tested else tested


def _results_at(path: Path) -> dict[str, Entry]:
    if path.is_dir():
        if not any((path / RESULTS).glob("*.json")):
            raise UserError(f"{path} holds no results; name an output folder of dinov2 eval")
        return {key: Entry(one, _page(path / RESULTS / f"{key}.html")) for key, one in read_all(path).items()}
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".jsonl":
        return _lines_of(path)
    result = read_result(path)
    _check(result, path)
    return {path.stem: Entry(result, _page(path.with_suffix(".html")))}


def _lines_of(path: Path) -> dict[str, Entry]:
    """A results.jsonl that was taken somewhere else: results without pages."""
    found = {}
    for number, line in enumerate(path.read_text().splitlines()):
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"{path}: line {number + 1} is no result of dinov2 eval") from None
        _check(result, path)
        key = json.dumps(
            [result["backbone"], result["task"], result["data"], result["settings"]], sort_keys=True
        )
        found[key] = Entry(result, None)
    return found


def _check(result: Any, path: Path) -> None:
    if not isinstance(result, dict) or not {"task", "backbone", "metrics", "headline", "data"} <= set(result):
        raise UserError(f"{path} is no result of dinov2 eval")


def _page(path: Path) -> Path | None:
    return path if path.exists() else None


def _span(result: Result, metric: str) -> tuple[float, float] | None:
    ends = result["intervals"].get(metric)
    return (float(ends[0]), float(ends[1])) if ends else None


def _prints(result: Result) -> list[str]:
    return sorted(f"{part} {facts['fingerprint']}" for part, facts in result["data"].items())


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else text[:21] + "…"


def _published() -> list[dict[str, Any]]:
    return yaml.safe_load(PUBLISHED.read_text())


def _differences(group: dict[str, Any], figure: dict[str, Any], result: Result) -> list[str]:
    """What a paper's figure was measured with, where ours was not."""
    found = []
    tested = result["data"].get("test") or next(iter(result["data"].values()))
    names = " ".join(facts["name"] for facts in result["data"].values()).lower()
    if group["data"] not in names or tested["pictures"] != group["pictures"]:
        found.append(f"data {group['data']} ({group['pictures']:,} tested)")
    wanted = group["settings"] | figure.get("settings", {})
    k = re.search(r"_k(\d+)$", result["headline"])
    ours = result["settings"] | ({"k": int(k[1])} if k else {})
    found += [f"{name} {value}" for name, value in wanted.items() if ours.get(name) != value]
    return found


if __name__ == "__main__":
    run(main, "compare")
