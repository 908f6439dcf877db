"""The pages beside the report: everything of a listing, as thumbnails, some hundred to a page."""

from collections.abc import Iterator
from pathlib import Path

from markupsafe import Markup

from curation.looks import THUMB
from curation.report.listings import Item, Listing
from curation.report.pictures import TILES, Pictures
from dinov2.pages import Card, Page

FOLDER = "report"
A_PAGE = 300  # items


def pages_of(listing: Listing) -> list[str]:
    """File names of a listing's pages."""
    count = -(-len(listing.items) // A_PAGE)
    return [f"{listing.name}-{number + 1:03d}.html" for number in range(count)]


def link(listing: Listing) -> Markup:
    """From the report to the first of its pages."""
    (first, *_) = pages_of(listing)
    words = (
        f"All {listing.total:,}" if listing.total == len(listing.items) else f"{len(listing.items):,} of them"
    )
    return Markup('<a href="{}/{}">{}</a>').format(FOLDER, first, words)


def write(listing: Listing, pictures: Pictures, folder: Path) -> None:
    """Write a listing's pages into a folder."""
    names = pages_of(listing)
    for number, name in enumerate(names):
        items = listing.items[number * A_PAGE : (number + 1) * A_PAGE]
        first = number * A_PAGE + 1
        page = Page(listing.title, subtitle=f"{first:,} to {first + len(items) - 1:,} of {listing.total:,}")
        page.text(_ways(names, number))
        cards = [
            Card(
                [pictures.mosaic(item.names)] if listing.mosaic else list(_thumbs(item, pictures)),
                item.text,
                item.tone,
            )
            for item in items
        ]
        page.gallery(cards, listing.caption, side=TILES * THUMB if listing.mosaic else THUMB)
        page.text(_ways(names, number))
        page.write(folder / name)


def _thumbs(item: Item, pictures: Pictures) -> Iterator:
    return (pictures.thumb(name) for name in item.names)


def _ways(names: list[str], number: int) -> Markup:
    """Back to the report, and to the pages before and after."""
    ways = [Markup('<a href="../report.html">report</a>')]
    for words, place in (
        ("first", 0),
        ("before", number - 1),
        ("after", number + 1),
        ("last", len(names) - 1),
    ):
        if 0 <= place < len(names) and place != number:
            ways.append(Markup('<a href="{}">{}</a>').format(names[place], words))
    return Markup("<p>") + Markup(" · ").join(ways) + Markup("</p>")
