"""Report pages: self-contained, whole, deterministic, safe with any text, and small."""

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dinov2.pages import Card, Page, chart, curve, histogram
from dinov2.pages.charts import INK, SERIES
from tests.pictures import broken_pictures, copies, odd_pictures, picture

VOID = {"meta", "img", "br", "link", "input", "hr"}
NASTY = "<script>alert('x')</script> & \"q\" {{ 7 * 7 }} ünï.png"


class Reader(HTMLParser):
    """Collects the elements of a page and fails where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def everything() -> Page:
    draw = np.random.default_rng(0)
    steps = np.arange(30)
    page = Page(f"Title {NASTY}", subtitle=f"Subtitle {NASTY}")
    for number in range(3):
        page.heading(f"Part {number} {NASTY}")
    page.text(f"First.\n\nSecond **bold** `code` {NASTY}")
    page.code(f"dinov2 curate pool={NASTY}")
    page.numbers({"kept": 1234, f"of {NASTY}": ("63.1%", f"note {NASTY}"), "none": None})
    page.table(["name", "count"], [[NASTY, 12345], ["b", None], ["c", 0.123456]], f"Caption {NASTY}")
    page.figure(
        curve({"a": (steps, steps**0.5), NASTY: (steps, -steps)}, x="step", y=NASTY), f"Curve {NASTY}"
    )
    page.figure(
        histogram({"a": draw.normal(size=99), "b": draw.normal(size=9)}, x="x", marks={"mark": 0.5}),
        "Histogram.",
    )
    page.gallery([Card([picture(0, 0), b"broken"], text=NASTY, tone="good")], f"Gallery {NASTY}", columns=3)
    page.flow([("read", 100, 90, f"note {NASTY}"), ("retrieve", 90, 95, ""), ("keep", 95, 95, "")], "Flow.")
    return page


def test_a_page_is_one_well_formed_file_that_asks_for_nothing(tmp_path: Path) -> None:
    everything().write(tmp_path / "new" / "report.html")
    html = (tmp_path / "new" / "report.html").read_text()
    page = Reader(html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    places = [
        value
        for _, a in page.elements
        for name, value in a.items()
        if name in ("src", "href", "xlink:href", "srcset")
    ]
    assert places and all(place.startswith(("data:image/", "#")) for place in places)
    assert re.findall(r"url\((?!#)|@import|https?://", html) == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    used = re.findall(r"url\(#([^)]+)\)", html) + [place[1:] for place in places if place.startswith("#")]
    assert len(ids) == len(set(ids)) and used and set(used) <= set(ids)
    assert "prefers-color-scheme: dark" in html


def test_text_is_shown_as_it_was_given() -> None:
    page = everything()
    html = page.render()
    text = Reader(html).text
    for place in (
        "Title",
        "Subtitle",
        "Part 2",
        "code",
        "pool=",
        "of",
        "note",
        "Caption",
        "Gallery",
        "Curve",
    ):
        assert f"{place} {NASTY}" in text or f"{place}{NASTY}" in text
    assert "<strong>bold</strong>" in html and "<code>code</code>" in html
    assert "1,234" in text and "12,345" in text and "0.1235" in text
    assert "− 10" in text and "+ 5" in text and "± 0" in text
    assert html == page.render() == everything().render()


def test_figures_follow_the_colours_of_the_page_and_stay_as_they_were() -> None:
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.plot([1, 2], color=SERIES[1])
    axes.set_title("plain")
    before = (figure.get_facecolor(), axes.get_facecolor())
    page = Page("figures")
    page.figure(figure)
    page.figure(curve({"a": ([1, 2], [3, 4])}, x="x", y="y"))
    html = page.render()
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not any(colour in drawings for colour in (INK, *SERIES, "#000000", "#ffffff"))
    assert "var(--series-1)" in drawings and "var(--series-0)" in drawings and "var(--muted)" in drawings
    variables = set(re.findall(r"var\((--[\w-]+)\)", drawings))
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    for scheme in (light, dark):
        assert variables <= set(re.findall(r"(--[\w-]+):", scheme))
    assert (figure.get_facecolor(), axes.get_facecolor()) == before
    assert "plain" in Reader(html).text


def test_a_drawing_of_many_points_becomes_a_picture() -> None:
    axes = chart(x="x", y="y")
    axes.scatter(*np.random.default_rng(0).normal(size=(2, 5000)), s=2)
    page = Page("points")
    page.figure(axes.figure)  # pyright: ignore[reportArgumentType]  # a figure, as no subfigure was made
    assert "data:image/png" in page.render() and len(page.render()) < 200_000


def test_long_curves_are_thinned_and_keep_their_spikes() -> None:
    ys = np.sin(np.arange(100_000) / 5000)
    ys[54_321], ys[77_777] = 40.0, np.nan
    drawn = curve({"loss": (np.arange(100_000), ys)}, x="step", y="loss").axes[0].lines[0].get_xydata()
    assert isinstance(drawn, np.ndarray) and len(drawn) < 1100 and np.nanmax(drawn[:, 1]) == 40.0
    assert (np.diff(drawn[:, 0]) > 0).all() and drawn[0, 0] == 0 and drawn[-1, 0] == 99_999


def test_empty_and_odd_values_can_be_drawn() -> None:
    page = Page("nothing")
    page.figure(curve({}, x="x", y="y"))
    page.figure(curve({"a": ([], [])}, x="x", y="y", log_x=True, log_y=True))
    page.figure(histogram({"a": []}, x="x", log_y=True))
    page.figure(histogram({"a": [np.nan, np.inf, 1.0]}, x="x"))
    page.table(["a"], [])
    page.gallery([])
    page.flow([])
    page.numbers({})
    Reader(page.render())
    with pytest.raises(ValueError, match="2 values in a table of 1"):
        page.table(["a"], [[1, 2]])


def test_thumbnails_of_any_picture_are_small_and_look_like_it(tmp_path: Path) -> None:
    odd = odd_pictures(tmp_path / "odd", size=(480, 320))
    large = {
        name: path.read_bytes()
        for name, path in odd.items()
        if name not in ("one_pixel.png", "very_wide.png")
    }
    broken = {name: path.read_bytes() for name, path in broken_pictures(tmp_path / "broken").items()}
    page = Page("thumbnails")
    page.gallery([Card([data]) for data in [*large.values(), *broken.values()]])
    html = page.render()
    images = Reader(html).all("img")
    assert len(images) == len(large) and html.count("not readable") == len(broken)
    whole = _luma(picture(0, 0, (480, 320)))
    for name, attributes in zip(large, images, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2])))
        assert image.size == (int(attributes["width"]), int(attributes["height"])) == (128, 85), name
        if "alpha" not in name and "transparent" not in name:
            assert np.corrcoef(whole, _luma(image))[0, 1] > 0.95, name
        assert attributes["loading"] == "lazy" and len(attributes["src"]) < 12_000


def test_a_page_of_many_pictures_is_small_and_quick() -> None:
    card = Card([picture(0, 0), copies(picture(0, 0))["resized"]], text="0.93", tone="bad")
    page = Page("many")
    page.gallery([card] * 500)
    assert len(page.render()) < 6_000_000


def test_importing_pages_costs_little() -> None:
    code = "import dinov2.pages, sys; print({'torch', 'matplotlib', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "set()\n", done.stderr


def _luma(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").resize((24, 16), Image.Resampling.BOX), dtype=np.float64).ravel()
