"""Turns a matplotlib figure into something that stands in a page and follows its light or dark colours."""

import io
import re
from typing import TYPE_CHECKING, NamedTuple

from dinov2.pages.charts import INK, LINE, MUTED, SERIES, style
from dinov2.pages.thumbnails import data_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", "#000000": "--ink"}
VARIABLES |= {colour: f"--series-{number}" for number, colour in enumerate(SERIES)}

MODEST = 60_000  # characters; below that, nobody needs to know whether a PNG were smaller still

# what matplotlib writes before and beside the drawing itself
RUBBISH = re.compile(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>", re.DOTALL)


class Drawing(NamedTuple):
    """Either inline SVG markup or the data URI of a PNG, and its size on the page in pixels."""

    svg: str
    png: str
    width: int
    height: int


def drawn(figure: "Figure", prefix: str) -> Drawing:
    """A figure as SVG or as PNG, whichever is smaller.

    Args:
        figure: any matplotlib figure; left as it is. White behind it is taken away in the SVG.
        prefix: begins the ids in the SVG, so that those of several figures on a page differ.
    """
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    svg = _tidy(_svg(figure), prefix, width, height)
    if len(svg) <= MODEST:
        return Drawing(svg, "", width, height)
    file = io.BytesIO()
    with style():
        figure.savefig(file, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    png = data_uri(file.getvalue(), "image/png")
    return Drawing(svg, "", width, height) if len(svg) <= len(png) else Drawing("", png, width, height)


def _svg(figure: "Figure") -> str:
    patches = [figure.patch, *(axes.patch for axes in figure.axes)]
    before = [patch.get_facecolor() for patch in patches]
    file = io.StringIO()
    try:
        for patch, colour in zip(patches, before, strict=True):
            if colour[:3] == (1.0, 1.0, 1.0):
                patch.set_facecolor("none")
        with style():
            figure.savefig(file, format="svg", metadata={"Date": None})
    finally:
        for patch, colour in zip(patches, before, strict=True):
            patch.set_facecolor(colour)
    return file.getvalue()


def _tidy(svg: str, prefix: str, width: int, height: int) -> str:
    """Drop what only editors need and ids that nothing uses, shorten numbers, put variables for colours."""
    svg = RUBBISH.sub("", svg[svg.index("<svg") :])
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", svg))

    def tag(match: re.Match[str]) -> str:
        text = re.sub(r" id=\"([^\"]*)\"", lambda m: m[0] if m[1] in used else "", match[0])
        text = re.sub(r"(id=\"|url\(#|href=\"#)(?=[^\"]*\")", lambda m: m[1] + prefix, text)
        text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
        return re.sub(
            r"#[0-9a-f]{6}\b", lambda m: f"var({VARIABLES[m[0]]})" if m[0] in VARIABLES else m[0], text
        )

    svg = re.sub(r"<[^>]+>", tag, svg)
    svg = re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg width="{width}" height="{height}" \1>', svg, count=1
    )
    return re.sub(r"\s*\n\s*", "\n", svg).strip()
