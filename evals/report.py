"""Pages: one for each result, and one that lists all results of a folder."""

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from dinov2.pages import Page
from evals.results import Outcome, between, headline_first, read_all, valued

REPORT = "report.html"


def write_result_page(path: Path, result: dict[str, Any], outcome: Outcome) -> None:
    """The page of one result."""
    page = Page(f"{result['task']}: {shown_name(result)}", subtitle=_data_line(result))
    page.numbers(
        {name: (valued(result, name), between(result, name)) for name in headline_first(result)}
        | {"seconds": round(result["seconds"]["total"], 1)}
    )
    if outcome.draw is not None:
        outcome.draw(page)
    page.heading("Settings")
    page.table(["setting", "value"], _as_words(result["settings"]))
    page.write(path)


def write_report(folder: Path | str) -> Path:
    """`report.html`: every result of the folder with its interval, and links to their pages."""
    page = Page("Evaluation", subtitle=str(Path(folder).resolve().name))
    rows = []
    results = read_all(folder)
    for key, result in results.items():
        name = result["headline"]
        link = Markup('<a href="results/{}.html">{}</a>').format(key, shown_name(result))
        differing = _differing(
            result, [other for other in results.values() if other["task"] == result["task"]]
        )
        metric = f"{name} (lower is better)" if name in result.get("lower_is_better", ()) else name
        value = valued(result, name)
        rows.append(
            [result["task"], link, _data_line(result), differing, metric, value, between(result, name)]
        )
    caption = "Intervals: 95%, by bootstrap over the test pictures."
    page.table(
        ["task", "backbone", "data", "settings", "metric", "value", "95% interval"], rows, caption=caption
    )
    path = Path(folder) / REPORT
    page.write(path)
    return path


def shown_name(result: dict[str, Any]) -> str:
    """A backbone as a reader knows it: the end of its path, and whether its weights are fresh."""
    kind, colon, place = str(escape(result["backbone"]["spec"])).rpartition(":")
    return kind + colon + "/".join(place.split("/")[-3:])


def _data_line(result: dict[str, Any]) -> str:
    parts = sorted(result["data"].items(), key=lambda item: item[0] != "train")  # in a file they lie sorted
    return " → ".join(f"{facts['name']} ({facts['pictures']:,})" for _, facts in parts)


def _differing(result: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """The settings in which results of a task differ."""
    mine = result["settings"]
    names = [name for name in mine if any(other["settings"].get(name) != mine[name] for other in others)]
    return ", ".join(f"{name}={mine[name]}" for name in names)


def _as_words(settings: dict[str, Any]) -> list[list[str]]:
    return [[name, json.dumps(value)] for name, value in settings.items()]
