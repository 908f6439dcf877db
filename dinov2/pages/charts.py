"""Charts for pages: matplotlib figures in one style, by its object interface and without pyplot."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # matplotlib takes half a second to import, and most of a stage runs without it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = Sequence[float] | Any  # a list, an array or a tensor on the CPU

# Each colour stands for a variable of the page's style sheet, which has it once for light and once for dark.
INK, MUTED, LINE = "#20242b", "#69707d", "#dfe3e8"
SERIES = ("#2f6fb3", "#c2661a", "#2d8a5f", "#8455b8", "#c23f55", "#12858f", "#8f7a17", "#b64588")

MOST_POINTS = 1000  # of a line; more could not be told apart at the width of a page
MARKED_POINTS = 25  # up to so many, each point is marked

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.markersize": 4,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # letters stay letters: smaller, and in the page's own font
    "svg.hashsalt": "dinov2",  # the same figure gives the same bytes
    "text.color": INK,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
}


@contextmanager
def style() -> Iterator[None]:
    """What is drawn inside the block looks like the rest of the page; afterwards all is as it was."""
    import matplotlib
    from matplotlib.rcsetup import cycler

    settings: Any = STYLE | {"axes.prop_cycle": cycler(color=SERIES)}
    with matplotlib.rc_context(settings):
        yield


def chart(*, x: str = "", y: str = "", title: str = "", width: float = 9.4, height: float = 3.6) -> "Axes":
    """Empty axes in the style; their `figure` is what `Page.figure` takes. Sizes in inches (of 96 pixels)."""
    from matplotlib.figure import Figure

    with style():
        axes = Figure(figsize=(width, height), layout="constrained").subplots()
        axes.set(xlabel=x, ylabel=y, title=title)
    return axes


def curve(
    series: Mapping[str, tuple[Numbers, Numbers]],
    *,
    x: str,
    y: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    marks: Mapping[str, float] | None = None,
) -> "Figure":
    """One line for each name. Long ones are thinned to the extremes of equal stretches, so spikes stay.

    `marks`: named places on the x axis, as thresholds.
    """
    axes = chart(x=x, y=y, title=title)
    lines = {name: _thinned(_array(xs), _array(ys)) for name, (xs, ys) in series.items()}
    with style():
        for name, (xs, ys) in lines.items():
            marker, width = ("o", 1.8) if len(xs) <= MARKED_POINTS else ("", 1.2)
            axes.plot(xs, ys, label=name, marker=marker, linewidth=width)
        _mark(axes, marks or {})
    # an axis without a positive value has no logarithm
    if log_x and any((xs > 0).any() for xs, _ in lines.values()):
        axes.set_xscale("log")
    if log_y and any((ys > 0).any() for _, ys in lines.values()):
        axes.set_yscale("log")
    return _with_legend(axes, len(series))


def histogram(
    values: Mapping[str, Numbers],
    *,
    x: str,
    y: str = "pictures",
    title: str = "",
    bins: int = 50,
    marks: Mapping[str, float] | None = None,
    log_y: bool = False,
) -> "Figure":
    """One histogram for each name over the same bins. `marks`: named places on the x axis, as thresholds."""
    axes = chart(x=x, y=y, title=title)
    arrays = {name: (array := _array(given))[np.isfinite(array)] for name, given in values.items()}
    everything = np.concatenate([*arrays.values(), np.array(list((marks or {}).values()))])
    edges = np.histogram_bin_edges(everything, bins) if len(everything) else np.linspace(0, 1, bins + 1)
    with style():
        for name, array in arrays.items():
            counts = np.histogram(array, edges)[0]
            axes.stairs(counts, edges, fill=True, alpha=0.35, label=name)
            axes.stairs(counts, edges, color=axes.patches[-1].get_facecolor()[:3], linewidth=1.2)
        _mark(axes, marks or {})
    if log_y:
        axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    return _with_legend(axes, len(values))


def _mark(axes: "Axes", marks: Mapping[str, float]) -> None:
    names: dict[float, list[str]] = {}  # of one place are written in one line
    for name, place in marks.items():
        names.setdefault(place, []).append(name)
    for place, those in names.items():
        axes.axvline(place, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{', '.join(those)} ",
            (place, 1),
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="top",
            ha="right",
            fontsize=8.5,
            color=MUTED,
        )


def _with_legend(axes: "Axes", count: int) -> "Figure":
    """A single series has no legend: its name would only repeat the title."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    if count > 1:
        with style():
            figure.legend(loc="outside lower left", ncols=min(count, 4), handlelength=1.4, columnspacing=1.6)
    return figure


def _array(values: Numbers) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(-1)


def _thinned(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points themselves if few, or the lowest and highest of each of equal stretches, in order."""
    if len(xs) <= MOST_POINTS:
        return xs, ys
    stretch = math.ceil(2 * len(xs) / MOST_POINTS)
    kept = {0, len(xs) - 1}
    for first in range(0, len(ys), stretch):
        part = ys[first : first + stretch]
        if np.isfinite(part).any():
            kept |= {first + int(np.nanargmin(part)), first + int(np.nanargmax(part))}
        else:
            kept.add(first)  # keeps the gap
    order = sorted(kept)
    return xs[order], ys[order]
