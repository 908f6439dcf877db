"""Results: one file for each backbone x task x data x settings, written whole, and a table of all of them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dinov2.config import identity
from dinov2.exits import UserError
from dinov2.files import lock, read_json, write_json, write_text
from dinov2.pages import Page
from evals.bench import Bench
from evals.bootstrap import of_mean
from evals.config import EvalConfig

FORMAT_VERSION = "1.1"  # 1.1 has units and lower_is_better; in 1.0 all is percent, and more is better
RESULTS, LINES, LOCK = "results", "results.jsonl", ".results.lock"
PACKAGES = ("dinov2-pipeline", "torch", "timm", "numpy", "pillow", "scikit-learn", "faiss-cpu", "faiss-gpu")
PERCENT = "%"


class Data(Protocol):
    """What was measured on, by which results are told apart: a `Source`, or pictures with their targets."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a task found.

    Attributes:
        headline: the metric by which backbones are compared, a key of `metrics`.
        metrics: by name, in percent or in the unit that `units` says.
        units: of the metrics that are not in percent: "m", or "" for a plain number.
        lower: the metrics that are better the lower they are, as errors are.
        scores: for metrics that are means over the test pictures, what each picture has; of those in percent
            its share (1 right, 0 wrong). Their intervals are drawn from it.
        intervals: of other metrics, low and high in the metric's unit; see `evals.bootstrap`.
        details: whatever else the result file is to hold.
        draw: adds pictures and tables to the result's page.
    """

    headline: str
    metrics: Mapping[str, float]
    units: Mapping[str, str] = field(default_factory=dict)
    lower: tuple[str, ...] = ()
    scores: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    draw: Callable[[Page], None] | None = None

    def __post_init__(self) -> None:
        named = {self.headline, *self.units, *self.lower, *self.scores, *self.intervals}
        if unknown := sorted(named - set(self.metrics)):
            raise ValueError(f"{', '.join(unknown)}: not among the metrics")


def result_key(task: str, bench: Bench, config: EvalConfig, sources: Mapping[str, Data]) -> str:
    """The name of a result: a hash of backbone, task, data and settings."""
    text = json.dumps([task, bench.identity, _data(sources), _settings(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def result_path(folder: Path | str, key: str) -> Path:
    return Path(folder) / RESULTS / f"{key}.json"


def as_result(
    task: str, bench: Bench, config: EvalConfig, sources: Mapping[str, Data], outcome: Outcome
) -> dict[str, Any]:
    """The content of a result file."""
    return {
        "format_version": FORMAT_VERSION,
        "task": task,
        "backbone": {"spec": config.backbone, **bench.identity},
        "data": {
            part: facts
            | {"name": sources[part].name, "unreadable": bench.unreadable.get(facts["fingerprint"], 0)}
            for part, facts in _data(sources).items()
        },
        "settings": _settings(config),
        "headline": outcome.headline,
        "metrics": dict(outcome.metrics),
        "units": {name: outcome.units.get(name, PERCENT) for name in outcome.metrics},
        "lower_is_better": sorted(outcome.lower),
        "intervals": _intervals(outcome),
        "details": outcome.details,
        "seconds": {name: round(seconds, 3) for name, seconds in bench.seconds.items()},
        "device": str(bench.device),
        "versions": _versions(),
    }


def save(folder: Path | str, key: str, result: dict[str, Any]) -> None:
    """Write a result file, and `results.jsonl` anew from all that are there."""
    write_json(result_path(folder, key), result)
    with lock(Path(folder) / LOCK):
        lines = [json.dumps(one, sort_keys=True) + "\n" for one in read_all(folder).values()]
        write_text(Path(folder) / LINES, "".join(lines))


def read_all(folder: Path | str) -> dict[str, dict[str, Any]]:
    """Every result of a folder by its key, sorted by task, data and backbone.

    Raises:
        UserError: one is damaged, or of another major version.
    """
    found = {path.stem: read_result(path) for path in sorted((Path(folder) / RESULTS).glob("*.json"))}
    return dict(sorted(found.items(), key=lambda item: _place(item[1])))


def read_result(path: Path) -> dict[str, Any]:
    """The content of a result file, of our major version."""
    result = read_json(path)
    theirs = str(result.get("format_version")) if isinstance(result, dict) else "none"
    if theirs.partition(".")[0] != FORMAT_VERSION.partition(".")[0]:
        raise UserError(f"{path} has format version {theirs}, this program reads {FORMAT_VERSION}")
    return result


def described(result: dict[str, Any]) -> str:
    """The metrics of a result in a line, the headline first."""
    parts = []
    for name in headline_first(result):
        spread = between(result, name)
        parts.append(f"{name} {valued(result, name, finer=True)}" + (f" ({spread})" if spread else ""))
    return ", ".join(parts)


def headline_first(result: dict[str, Any]) -> list[str]:
    """The names of its metrics."""
    return sorted(result["metrics"], key=lambda name: name != result["headline"])


def valued(result: dict[str, Any], name: str, *, finer: bool = False) -> str:
    """A metric with its unit: 63.1% or 0.512 m; a digit more where asked."""
    value, unit = result["metrics"][name], unit_of(result, name)
    return _rounded(value, unit, finer) + (unit if unit == PERCENT else f" {unit}".rstrip())


def between(result: dict[str, Any], name: str) -> str:
    """A metric's interval, or nothing."""
    low, high = result["intervals"].get(name, (None, None))
    unit = unit_of(result, name)
    return "" if low is None else f"{_rounded(low, unit)} to {_rounded(high, unit)}"


def unit_of(result: dict[str, Any], name: str) -> str:
    return result.get("units", {}).get(name, PERCENT)


def _rounded(value: float, unit: str, finer: bool = False) -> str:
    """Percents to a tenth; other units, whose size can be anything, to three or four figures."""
    if unit == PERCENT:
        return f"{value:.{1 + finer}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{3 + finer}g}"


def _intervals(outcome: Outcome) -> dict[str, tuple[float, float]]:
    drawn = {name: _of_scores(outcome, name) for name in outcome.scores} | dict(outcome.intervals)
    return {name: ends for name, ends in drawn.items() if np.isfinite(ends).all()}


def _of_scores(outcome: Outcome, name: str) -> tuple[float, float]:
    low, high = of_mean(outcome.scores[name])
    return (low, high) if outcome.units.get(name, PERCENT) == PERCENT else (low / 100, high / 100)


def _place(result: dict[str, Any]) -> list[str]:
    names = [part["name"] for part in result["data"].values()]
    return [result["task"], *names, result["backbone"]["spec"]]


def _data(sources: Mapping[str, Data]) -> dict[str, dict[str, Any]]:
    return {
        part: {"fingerprint": source.fingerprint, "pictures": len(source)} for part, source in sources.items()
    }


def _settings(config: EvalConfig) -> dict[str, Any]:
    """Every setting that changes the figures; what lies at a `place` is stated by its content."""
    return identity(config)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # FAISS is an extra; a checkout need not be installed
            continue
    return found
