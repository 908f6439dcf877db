"""Queries beside what was found for them: the best and the worst, on a result's page."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from PIL import Image

from dinov2.data.decode import Unreadable, decode
from dinov2.data.sources import Source
from dinov2.pages import Card, Page

SHOWN = 8  # queries of each kind
BESIDE = 4  # what was found, beside each
SIDE = 104  # pixels


@dataclass(frozen=True)
class Found:
    """A query's ranking.

    Attributes:
        query: its row among the queries.
        order: rows of what was searched, the best first; the beginning is enough.
        right: those of them that were to be found.
    """

    query: int
    order: Sequence[int]
    right: Collection[int]

    @property
    def first(self) -> int:
        """The rank from 0 of the first that is right."""
        ranks = (rank for rank, row in enumerate(self.order) if row in self.right)
        return next(ranks, len(self.order))


def draw_found(
    page: Page,
    queries: Callable[[int], Image.Image],
    database: Callable[[int], Image.Image],
    found: Sequence[Found],
    *,
    names: Sequence[str] | None = None,
    ignored: Sequence[Collection[int]] | None = None,
) -> None:
    """Queries whose nearest picture is right, and those whose first right one comes latest.

    Args:
        queries, database: a row to what is to be shown of it.
        names: of each query, as its card is to be called.
        ignored: for each query what does not count, and is not shown.
    """
    page.heading("What was found")
    if ignored is not None:
        found = [
            Found(one.query, [row for row in one.order if row not in ignored[one.query]], one.right)
            for one in found
        ]
    good = [one for one in found if one.first == 0]
    bad = sorted((one for one in found if one.first > 0), key=lambda one: -one.first)
    for kind, some in (("Right", _spread(good)), ("Worst", _spread(bad[: 4 * SHOWN]))):
        cards = [_card(queries, database, one, names) for one in some]
        if cards:
            page.gallery(cards, f"{kind}: a query, then what is nearest to it", columns=2, side=SIDE)


def _card(
    queries: Callable[[int], Image.Image],
    database: Callable[[int], Image.Image],
    one: Found,
    names: Sequence[str] | None,
) -> Card:
    nearest = list(one.order[:BESIDE])
    marks = " ".join("✓" if row in one.right else "✗" for row in nearest)
    name = f"{names[one.query]}: " if names else ""
    late = len(nearest) <= one.first < len(one.order)
    place = f", the first right one is number {one.first + 1:,}" if late else ""
    return Card(
        pictures=[queries(one.query), *map(database, nearest)],
        text=f"{name}{marks}{place}",
        tone="good" if one.first == 0 else "bad",
    )


def in_rows(source: Source, ids: Sequence[str]) -> Source:
    """The pictures with these ids, in this order."""
    rows = {id_: row for row, id_ in enumerate(source.ids)}
    return source.select([rows[id_] for id_ in ids])


def shown_of(source: Source) -> Callable[[int], Image.Image]:
    """Pictures to look at; grey where one cannot be read, for which a page is not worth failing."""

    def show(row: int) -> Image.Image:
        try:
            return decode(source.read(row), at_least=SIDE)
        except Unreadable:
            return Image.new("RGB", (SIDE, SIDE), "grey")

    return show


def _spread(some: Sequence[Found]) -> list[Found]:
    kept = min(SHOWN, len(some))
    return [some[place * len(some) // kept] for place in range(kept)]
