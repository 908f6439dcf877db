"""The report shows samples, leads to everything else, and needs nothing but its files."""

import re
from pathlib import Path

import pytest
from pyarrow import parquet

from curation.report import beside
from tests.curation.pools import curate, make_pool

LINK = re.compile(r'(?:src|href)="([^"]*)"')


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_pool(tmp_path_factory.mktemp("pictures"), each=12)
    words = ["calibrate.pictures=2", "clusters.levels=[30,3]", "retrieval.k=1", "report.cards=40"]
    sets = [f"seeds={root}/pool/class_0", f"holdout={root}/holdout"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beside, "A_PAGE", 15)
        return curate(f"pool={root}/pool", *sets, f"output={root}/out", *words)


def test_every_link_leads_to_a_file_beside_and_every_picture_is_inside(out: Path) -> None:
    pages = [out / "report.html", *(out / "report").iterdir()]
    assert len(pages) > 4
    reached = set()
    for page in pages:
        links = LINK.findall(page.read_text())
        assert links
        for link in links:
            if not link.startswith(("data:image/", "#")):
                reached.add((page.parent / link).resolve())
    assert reached == set(pages)


def test_the_page_shows_counts_thresholds_calibration_and_mosaics(out: Path) -> None:
    text = re.sub(r"<style>.*?</style>|data:[^\"]*", "", (out / "report.html").read_text(), flags=re.DOTALL)
    words = re.sub(r"<[^>]+>", " ", text)
    for heading in (
        "Copies and what they lost to", "Holdout leaks", "The threshold for duplicates: ",
        "The largest groups", "What thresholds find of synthetic copies", "Clusters", "What seeds asked for",
        "Before and after",
    ):  # fmt: skip
        assert heading in words
    assert len(re.findall('class="flow"', text)) == 1
    table = parquet.read_table(out / "stages/calibrate/curve.parquet")
    place = table["threshold"].to_pylist().index(0.5)
    assert re.search(rf"recall\s.*?{100 * table['recall'][place].as_py():.0f}%", words, flags=re.DOTALL)


def test_pages_beside_show_no_more_than_was_asked_for(out: Path) -> None:
    shown = [len(re.findall("<li class=", page.read_text())) for page in (out / "report").glob("*below*")]
    assert max(shown) == 15
    assert sum(shown) % 40 == 0
