"""The page of `dinov2 compare`: a table of backbones by tasks, a chart for each task, the papers' figures."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup, escape
from matplotlib.figure import Figure

from dinov2.pages import Page
from dinov2.pages.charts import MUTED, SERIES, chart
from evals.compare import Column, short_name
from evals.results import between, unit_of, valued

CHART_WIDTH, BAR = 7.2, 0.42  # inches


def write_comparison(path: Path, columns: Sequence[Column], backbones: Sequence[str]) -> None:
    """Write the page; links to results' own pages are relative to it."""
    page = Page(
        "Backbones compared", subtitle=f"{len(backbones)} backbones, {len(columns)} tasks and data sets"
    )
    page.heading("All results")
    page.table(
        ["task and data", "metric", *map(_header, backbones)],
        [_row(column, backbones, path) for column in columns],
        caption="In bold: better than every other by more than the 95% intervals, bootstrapped over the test "
        "pictures. Each figure leads to its own page.",
    )
    several = [column for column in columns if len(column.entries) > 1]
    if several:
        page.heading("Charts")
    for column in several:
        page.figure(_bars(column, backbones), f"{column.title}. Lines: 95% intervals.")
    rows = [
        [column.title, one.backbone, f"{one.value:.1f}%", ", ".join(one.differs) or "nothing", one.source]
        for column in columns
        for one in column.published()
    ]
    if rows:
        page.heading("The papers' figures")
        page.text(
            "For the same protocols. What differs is what they were measured with and yours were not: where "
            "anything is named, they are no more than an orientation."
        )
        page.table(["compare with", "backbone", "figure", "what differs", "source"], rows)
    page.write(path)


def _header(backbone: str) -> Markup:
    """Its name, which may be broken: several long ones would not fit beside each other."""
    parts = re.split(r"(?<=[:/_?&])", short_name(backbone))
    return Markup('<span class="breakable">{}</span>').format(Markup("<wbr>").join(parts))


def _row(column: Column, backbones: Sequence[str], path: Path) -> list[Markup | str | None]:
    best = column.best()
    metric = f"{column.metric} (lower is better)" if column.lower else column.metric
    cells: list[Markup | str | None] = [column.title, metric]
    for name in backbones:
        entry = column.entries.get(name)
        if entry is None:
            cells.append(None)
            continue
        value = escape(valued(entry.result, column.metric))
        if entry.page is not None:
            link = os.path.relpath(entry.page, path.parent)
            value = Markup('<a href="{}">{}</a>').format(link, value)
        if name == best:
            value = Markup("<strong>{}</strong>").format(value)
        spread = between(entry.result, column.metric)
        cells.append(Markup("{}<br><small>{}</small>").format(value, spread) if spread else value)
    return cells


def _bars(column: Column, backbones: Sequence[str]) -> Figure:
    """A bar for each backbone, with its interval; a paper's figure, on the same data, is a mark beside."""
    names = [name for name in backbones if name in column.entries]
    results = [column.entries[name].result for name in names]
    unit = unit_of(results[0], column.metric)
    axes = chart(
        x=f"{column.metric}{f' in {unit}' if unit else ''}{', lower is better' if column.lower else ''}",
        width=CHART_WIDTH,
        height=0.9 + BAR * len(names),
    )
    values = [result["metrics"][column.metric] for result in results]
    places = range(len(names))
    axes.barh(
        places, values, height=0.62, color=[SERIES[backbones.index(name) % len(SERIES)] for name in names]
    )
    for place, result in zip(places, results, strict=True):
        if ends := result["intervals"].get(column.metric):
            axes.plot(ends, [place, place], color=MUTED, linewidth=2.2, solid_capstyle="round")
    axes.set_yticks(places, [short_name(name) for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure
