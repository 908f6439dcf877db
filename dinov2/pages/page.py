"""A report page, built from top to bottom and written as one file that needs no server and no network."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from dinov2.files import write_text
from dinov2.pages.drawing import drawn
from dinov2.pages.thumbnails import Picture, thumbnail

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = str | int | float | None
Step = tuple[str, int, int, str]  # name, count in, count out, note

NUMBER = re.compile(r"[-+−±]?[\d.,]+\s?\S{0,4}")
LONG = 28  # characters in a cell
ENOUGH_HEADINGS = 3  # from so many on, the page begins with a list of them


@dataclass(frozen=True)
class Card:
    """One item of a gallery: pictures side by side, and what is to be said of them."""

    pictures: Sequence[Picture]
    text: str = ""
    tone: Literal["good", "bad", "plain"] = "plain"


@dataclass
class Page:
    """Blocks are added in the order in which they are read.

    Text is escaped; `code` and **bold** are understood in it, and an empty line begins a paragraph.
    HTML goes in as `markupsafe.Markup`.
    """

    title: str
    subtitle: str = ""
    _blocks: list[Markup] = field(default_factory=list, init=False)
    _headings: list[str] = field(default_factory=list, init=False)
    _figures: int = field(default=0, init=False)

    def heading(self, text: str) -> None:
        self._headings.append(text)
        self._add("heading", text, f"section-{len(self._headings)}")

    def text(self, text: str) -> None:
        self._add("text", _paragraphs(text))

    def code(self, text: str) -> None:
        """Commands or other text whose lines and spaces stay as they are."""
        self._add("code", text.strip("\n"))

    def numbers(self, numbers: Mapping[str, Value | tuple[Value, str]]) -> None:
        """Tiles, each a number over its name, with a note beneath where the value is a pair."""
        tiles = [
            (name, *(value if isinstance(value, tuple) else (value, ""))) for name, value in numbers.items()
        ]
        self._add("numbers", [(name, shown(value), _inline(note)) for name, value, note in tiles])

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[Value]], caption: str | None = None
    ) -> None:
        """Columns that hold only numbers are aligned to the right. A wide table scrolls.

        Raises:
            ValueError: a row has more or fewer values than there are columns.
        """
        rows = [list(row) for row in rows]
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"a row of {len(row)} values in a table of {len(columns)} columns: {row}")
        kinds = [_column_kind([row[place] for row in rows]) for place in range(len(columns))]
        cells = [[_inline(shown(value)) for value in row] for row in rows]
        self._add("table", list(zip(columns, kinds, strict=True)), cells, _inline(caption or ""))

    def figure(self, figure: "Figure", caption: str = "") -> None:
        """A matplotlib figure: inline SVG in the page's colours, or a PNG on white where that is smaller."""
        self._figures += 1
        self._add("figure", drawn(figure, f"f{self._figures}-"), _inline(caption), caption)

    def gallery(
        self, items: Iterable[Card], caption: str = "", columns: int | None = None, side: int = 128
    ) -> None:
        """Cards in a grid: as many in a row as fit, or `columns`. Thumbnails are at most `side` pixels."""
        cards = [
            ([thumbnail(picture, side) for picture in card.pictures], _inline(card.text), card.tone)
            for card in items
        ]
        self._add("gallery", cards, _inline(caption), columns)

    def flow(self, steps: Iterable[Step], caption: str = "") -> None:
        """What goes into each step and what comes out, as a chart that is read downwards."""
        self._add("flow", list(steps), _inline(caption))

    def render(self) -> str:
        headings = self._headings if len(self._headings) >= ENOUGH_HEADINGS else []
        page = _template("page.html.jinja")
        return page.render(
            title=self.title, subtitle=_inline(self.subtitle), headings=headings, blocks=self._blocks
        )

    def write(self, path: Path | str) -> None:
        """Write the page whole; the same blocks give the same bytes."""
        write_text(path, self.render())

    def _add(self, kind: str, *values: Any) -> None:
        self._blocks.append(getattr(_template("blocks.html.jinja").module, kind)(*values))


def shown(value: Value) -> str:
    """A value as a reader wants it: 12,345 and 0.1235; a missing one is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return value


def _column_kind(values: Sequence[Value]) -> Literal["number", "long", "short"]:
    """Numbers are figures or strings such as "63.1%" and "1,234 s"; long text needs some width to wrap in."""
    there = [value for value in values if value is not None and value not in ("", "–")]
    if there and all(isinstance(value, int | float) or NUMBER.fullmatch(value) for value in there):
        return "number"
    shown = [value.striptags() if isinstance(value, Markup) else str(value) for value in there]
    return "long" if any(len(text) > LONG for text in shown) else "short"


def _inline(text: str) -> Markup:
    if isinstance(text, Markup):
        return text
    safe = str(escape(text))
    safe = re.sub(r"`([^`\n]+)`", r"<code>\1</code>", safe)
    return Markup(re.sub(r"\*\*([^*\n]+)\*\*", r"<strong>\1</strong>", safe))


def _paragraphs(text: str) -> Markup:
    if isinstance(text, Markup):
        return text
    parts = re.split(r"\n\s*\n", text.strip())
    return Markup("\n").join(Markup("<p>{}</p>").format(_inline(part)) for part in parts)


@cache
def _template(name: str) -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = shown
    return environment.get_template(name)
