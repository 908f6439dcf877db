"""Pages: one for each result, and one that lists all results of a folder."""

from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from dinov2.pages import Page
from evals.results import Outcome, between, read_all

REPORT = "report.html"


def write_result_page(path: Path, result: dict[str, Any], outcome: Outcome) -> None:
    """The page of one result."""
    page = Page(f"{result['task']}: {shown_name(result)}", subtitle=_data_line(result))
    page.numbers(
        {name: (f"{value:.1f}%", between(result, name)) for name, value in result["metrics"].items()}
        | {"seconds": round(sum(result["seconds"].values()), 1)}
    )
    if outcome.draw is not None:
        outcome.draw(page)
    page.heading("Settings")
    page.table(["setting", "value"], [[name, str(value)] for name, value in result["settings"].items()])
    page.write(path)


def write_report(folder: Path | str) -> Path:
    """`report.html`: every result of the folder with its interval, and links to their pages."""
    page = Page("Evaluation", subtitle=str(Path(folder).resolve().name))
    rows = []
    for key, result in read_all(folder).items():
        name = result["headline"]
        link = Markup('<a href="results/{}.html">{}</a>').format(key, shown_name(result))
        value = f"{result['metrics'][name]:.1f}%"
        rows.append([result["task"], link, _data_line(result), name, value, between(result, name)])
    caption = "Intervals: 95%, by bootstrap over the test pictures."
    page.table(["task", "backbone", "data", "metric", "value", "95% interval"], rows, caption=caption)
    path = Path(folder) / REPORT
    page.write(path)
    return path


def shown_name(result: dict[str, Any]) -> str:
    """A backbone as a reader knows it: the end of its path."""
    spec = str(escape(result["backbone"]["spec"]))
    return "/".join(spec.split("/")[-3:]) if "/" in spec else spec


def _data_line(result: dict[str, Any]) -> str:
    parts = [f"{part['name']} ({part['pictures']:,})" for part in result["data"].values()]
    return " → ".join(parts)
