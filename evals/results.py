"""Results: one file for each backbone x task x data x settings, written whole, and a table of all of them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov2.config import identity
from dinov2.data.sources import Source
from dinov2.exits import UserError
from dinov2.files import lock, read_json, write_json, write_text
from dinov2.pages import Page
from evals.bench import Bench
from evals.config import EvalConfig

FORMAT_VERSION = "1.0"
RESULTS, LINES, LOCK = "results", "results.jsonl", ".results.lock"
PACKAGES = ("dinov2-pipeline", "torch", "timm", "numpy", "pillow", "scikit-learn", "faiss-cpu", "faiss-gpu")
ELSEWHERE = ("backbone", "data", "train", "test")  # settings that a result states by content, not by path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a task found.

    Attributes:
        headline: the metric by which backbones are compared, a key of `metrics`.
        metrics: in percent where they are shares.
        scores: for some metrics the share that each test picture contributes (1 right, 0 wrong), from which
            their intervals are drawn.
        details: whatever else the result file is to hold.
        draw: adds pictures and tables to the result's page.
    """

    headline: str
    metrics: dict[str, float]
    scores: dict[str, NDArray[np.floating]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    draw: Callable[[Page], None] | None = None


def interval(scores: NDArray[np.floating], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean score in percent: percentiles over bootstrap samples of the pictures."""
    generator = np.random.default_rng(seed)
    values, counts = np.unique(scores, return_counts=True)
    # Drawing pictures with replacement is drawing how often each value comes: few values, so little work.
    drawn = generator.multinomial(len(scores), counts / len(scores), size=draws)
    means = drawn @ values / len(scores)
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(low), 100 * float(high)


def result_key(task: str, bench: Bench, config: EvalConfig, sources: dict[str, Source]) -> str:
    """The name of a result: a hash of backbone, task, data and settings."""
    text = json.dumps([task, bench.identity, _data(sources), _settings(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def result_path(folder: Path | str, key: str) -> Path:
    return Path(folder) / RESULTS / f"{key}.json"


def as_result(
    task: str, bench: Bench, config: EvalConfig, sources: dict[str, Source], outcome: Outcome
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
        "metrics": outcome.metrics,
        "intervals": {name: interval(scores) for name, scores in outcome.scores.items()},
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
    names = sorted(result["metrics"], key=lambda name: name != result["headline"])
    parts = []
    for name in names:
        spread = between(result, name)
        parts.append(f"{name} {result['metrics'][name]:.2f}%" + (f" ({spread})" if spread else ""))
    return ", ".join(parts)


def between(result: dict[str, Any], name: str) -> str:
    """A metric's interval, or nothing."""
    low, high = result["intervals"].get(name, (None, None))
    return "" if low is None else f"{low:.1f} to {high:.1f}"


def _place(result: dict[str, Any]) -> list[str]:
    names = [part["name"] for part in result["data"].values()]
    return [result["task"], *names, result["backbone"]["spec"]]


def _data(sources: dict[str, Source]) -> dict[str, dict[str, Any]]:
    return {
        part: {"fingerprint": source.fingerprint, "pictures": len(source)} for part, source in sources.items()
    }


def _settings(config: EvalConfig) -> dict[str, Any]:
    return {key: value for key, value in identity(config).items() if key not in ELSEWHERE}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # FAISS is an extra; a checkout need not be installed
            continue
    return found
