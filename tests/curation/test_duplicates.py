"""Copies are found, pictures that are merely alike stay, and every drop says why."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from curation.align import align
from curation.config import SemDeDupConfig
from curation.duplicates import Groups
from curation.ingest import Ingested
from curation.kmeans import kmeans
from curation.looks import luma, pca_hash, perceptual_hash, thumbnail
from curation.near import nearest_of
from curation.second_look import look_again
from curation.semdedup import semdedup
from dinov2.data.manifest import DECISIONS_SCHEMA, read_format, read_manifest
from dinov2.data.sources import open_source
from tests.curation.pools import PLANTED, another, curate, decisions, make_pool


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = make_pool(tmp_path_factory.mktemp("pictures"))
    return root, curate(
        f"pool={root}/pool", f"holdout={root}/holdout", f"output={root}/out", "write.shard=10"
    )


def test_every_planted_copy_loses_to_one_and_no_original_to_another(curated: tuple[Path, Path]) -> None:
    rows = decisions(curated[1])
    group = [uri for uri in rows if "copies/" in uri] + ["class_1/000.png"]
    assert len(group) == len(PLANTED) + 1
    (kept,) = [uri for uri in group if rows[uri]["kept"]]
    assert kept == "copies/large.webp"  # the largest stays
    for uri in set(group) - {kept}:
        assert rows[uri]["dropped_by"] == "duplicates"
        assert rows[uri]["evidence"] == rows[kept]["id"]
        assert 0.75 <= rows[uri]["similarity"] <= 1
    originals = [row for uri, row in rows.items() if uri.startswith("class_") and uri not in group]
    assert [row["uri"] for row in originals if not row["kept"]] == ["class_2/001.png"]


def test_processes_are_sent_where_thumbnails_lie_and_not_the_thumbnails(curated: tuple[Path, Path]) -> None:
    thumbs = Ingested.at(curated[1] / "stages/ingest/pool").thumbs()
    sent = pickle.dumps(thumbs)
    assert len(sent) < 1000 < 64 * 64 * 3 * len(thumbs)
    rows = np.arange(len(thumbs))[::-2]
    assert np.array_equal(pickle.loads(sent).rows(rows), thumbs.rows(rows))


def test_a_leak_into_the_holdout_goes(curated: tuple[Path, Path]) -> None:
    root, out = curated
    row = decisions(out)["class_2/001.png"]
    holdout = open_source(f"{root}/holdout").table.to_pylist()
    assert row["dropped_by"] == "holdout"
    assert row["evidence"] == next(other["id"] for other in holdout if other["uri"] == "leak.jpg")


def test_every_picture_has_a_decision_and_the_kept_keep_their_bytes(curated: tuple[Path, Path]) -> None:
    root, out = curated
    table = read_format(out / "decisions.parquet", DECISIONS_SCHEMA)
    pool = open_source(f"{root}/pool")
    assert table["id"].to_pylist() == sorted(pool.ids)
    broken = [row for row in table.to_pylist() if "broken/" in row["uri"]]
    assert len(broken) == 8
    assert all(row["error"] and row["dropped_by"] == "ingest" for row in broken)
    manifest = read_manifest(out / "manifest.parquet")
    written, place = open_source(str(out)), {id_: row for row, id_ in enumerate(pool.ids)}
    assert sorted(written.ids) == manifest["id"].to_pylist()
    for row, id_ in enumerate(written.ids):
        assert written.read(row) == pool.read(place[id_])


def test_a_crop_is_laid_where_it_was_cut() -> None:
    image = another(0, 3)
    crop = image.crop((20, 10, 116, 94))
    thumbs = np.stack([thumbnail(picture) for picture in (image, crop, another(0, 4))])
    found = align(thumbs, np.array([[0, 1], [1, 0], [0, 2]]))
    assert found.score[0] == found.score[1] > 0.9
    assert found.score[2] < 0.5
    expected = [20 / image.width, 96 / image.width, 10 / image.height, 84 / image.height]
    assert np.allclose(found.box[0], expected, atol=0.02)


def test_crops_anywhere_are_found_and_other_pictures_are_not() -> None:
    draw, images = np.random.default_rng(0), [another(kind, 3) for kind in range(4)]
    thumbs, where = [thumbnail(image) for image in images], []
    for row in range(40):
        image = images[row % 4]
        width, height = (int(draw.uniform(0.66, 1) * side) for side in image.size)
        left, top = int(draw.integers(image.width - width + 1)), int(draw.integers(image.height - height + 1))
        thumbs.append(thumbnail(image.crop((left, top, left + width, top + height))))
        where.append([left / image.width, width / image.width, top / image.height, height / image.height])
    rows = np.arange(40)
    pairs = [np.stack([4 + rows, (rows + other) % 4], axis=1) for other in range(4)]
    found = align(np.stack(thumbs), np.concatenate(pairs))
    assert found.score[:40].min() > 0.85
    assert found.score[40:].max() < 0.5
    assert np.allclose(found.box[:40][found.forward[:40]], np.array(where)[found.forward[:40]], atol=0.03)


def test_heaps_of_small_things_are_found_between_bars() -> None:
    draw, thumbs = np.random.default_rng(0), []
    for row in range(16):
        heap = Image.fromarray(draw.integers(0, 256, (22, 22, 3), dtype=np.uint8)).resize((176, 176), 3)
        upright, bar = row % 2, 20 + row
        page = Image.new("RGB", (176 + 60 * (1 - upright), 176 + 60 * upright), "white")
        page.paste(heap, (bar * (1 - upright), bar * upright))
        thumbs += [thumbnail(heap), thumbnail(page)]
    rows = np.arange(0, 32, 2)
    found = align(np.stack(thumbs), np.concatenate([[rows, rows + 1], [rows, (rows + 3) % 32]], axis=1).T)
    assert found.score[:16].min() > 0.8
    assert found.score[16:].max() < 0.5


@pytest.mark.parametrize("few", [1, 3])
def test_the_nearest_of_either_picture_are_looked_at_again(few: int) -> None:
    draw = np.random.default_rng(few)
    pairs = np.unique(draw.integers(0, 30, (200, 2)), axis=0)
    cosine = np.round(draw.random(len(pairs)), 1).astype(np.float32)  # with ties
    view = draw.integers(0, 2, len(pairs))
    again = nearest_of(pairs, view, cosine, 0.3, few)
    for pair, mine, what, found in zip(pairs, cosine, view, again, strict=True):
        nearer = [sum(cosine[(pairs[:, side] == pair[side]) & (view == 0)] > mine) for side in (0, 1)]
        assert found == (what == 0 and mine >= np.float32(0.3) and min(nearer) < few)


@pytest.mark.parametrize("make", [perceptual_hash, pca_hash])
def test_hashes_do_not_see_gain_and_hardly_size_and_compression(make) -> None:
    grey = luma(thumbnail(another(1, 1)))
    assert make(grey) == make((grey * 0.5 + 20).astype(np.float32))
    small = luma(thumbnail(another(1, 1).resize((64, 56), Image.Resampling.LANCZOS)))
    assert (make(grey) ^ make(small)).bit_count() <= 6
    others = [make(luma(thumbnail(another(kind, 7)))) for kind in range(8)]
    assert min((make(grey) ^ other).bit_count() for other in others) > 12


def test_pictures_with_nothing_in_common_are_not_alike_however_they_are_turned() -> None:
    thumbs = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    thumbs[1] = 40  # blank: no angle is worth a closer look
    pairs = np.array([[0, 1], [1, 1]])
    assert (look_again(thumbs, pairs, np.ones(2, np.float32)) < 0.1).all()
    assert (align(thumbs, pairs).score < 0.1)[0]


def test_chains_whole_and_direct() -> None:
    # 0 - 1 - 2 - 3 in a row; 3 is the largest picture, 0 the smallest
    pairs = np.array([[0, 1], [1, 2], [2, 3]])
    groups = Groups.of(np.arange(5), pairs, np.array([0.9, 0.8, 0.95], np.float32))
    rank = np.array([1, 2, 3, 4, 9])
    lost, winner, how = groups.losers(rank, direct=False)
    assert lost.tolist() == [0, 1, 2]
    assert winner.tolist() == [3, 3, 3]
    assert np.allclose(how, [0.8, 0.8, 0.95])  # the weakest edge on the way, and the direct one
    lost, winner, how = groups.losers(rank, direct=True)
    assert lost.tolist() == [0, 2]  # 1 has no edge to 3, and stays; 0 loses to 1
    assert winner.tolist() == [1, 3]
    assert np.allclose(how, [0.9, 0.95])


def test_pictures_with_equal_pixels_count_as_one() -> None:
    # 0, 1 and 2 are equal, so are 3 and 4, and 5 and 6; a chain 0 - 3 - 5 joins the three kinds
    kind, exact = np.array([0, 0, 0, 3, 3, 5, 5]), [[0, 1], [0, 2], [3, 4], [5, 6]]
    pairs = np.array([*exact, [0, 3], [3, 5]])
    groups = Groups.of(kind, pairs, np.array([1, 1, 1, 1, 0.8, 0.9], np.float32))
    lost, winner, how = groups.losers(np.array([1, 9, 2, 5, 4, 6, 7]), direct=True)
    assert lost.tolist() == [0, 2, 3, 4, 5]  # 1 and 6 stay: there is no edge between their kinds
    assert winner.tolist() == [1, 1, 6, 6, 6]
    assert np.allclose(how, [1, 1, 0.9, 0.9, 1])
    assert groups.likeness_to_others().tolist() == pytest.approx([0.8] * 3 + [1.7] * 2 + [0.9] * 2)
    assert groups.split(3).component.tolist() == [0] * 7  # of three kinds
    assert groups.split(2).component.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_losers_are_as_like_as_the_weakest_edge_on_the_strongest_path() -> None:
    draw = np.random.default_rng(0)
    pairs = np.unique(np.sort(draw.integers(120, size=(110, 2)), axis=1), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    similarity = draw.uniform(0.5, 1, len(pairs)).astype(np.float32)
    widest = np.eye(120, dtype=np.float32)
    widest[pairs[:, 0], pairs[:, 1]] = widest[pairs[:, 1], pairs[:, 0]] = similarity
    edge = widest.copy()
    for middle in range(120):  # Floyd and Warshall, of the widest path
        widest = np.maximum(widest, np.minimum(widest[:, middle, None], widest[None, middle]))
    lost, winner, how = Groups.of(np.arange(120), pairs, similarity).losers(
        draw.integers(9, size=120), direct=False
    )
    assert len(lost) > 60
    assert np.array_equal(how, np.where(edge[lost, winner] > 0, edge[lost, winner], widest[lost, winner]))


def test_of_equally_large_pictures_the_one_with_more_bytes_stays(tmp_path: Path) -> None:
    image = another(2, 2)
    for quality in (40, 70, 95):  # whichever of them has the lowest id
        image.save(tmp_path / f"{quality}.jpg", quality=quality)
    image.save(tmp_path / "lossless.png")
    out = curate(f"pool={tmp_path}", f"output={tmp_path}/out")
    assert [uri for uri, row in decisions(out).items() if row["kept"]] == ["lossless.png"]


def test_exact_copies_count_as_largest_then_first(tmp_path: Path) -> None:
    data = (another(2, 2), another(2, 3))
    for name, image in zip(("a", "b", "c"), (data[0], data[0], data[1]), strict=True):
        image.save(tmp_path / f"{name}.png")
    out = curate(f"pool={tmp_path}", f"output={tmp_path}/out")
    rows = decisions(out)
    first, second = sorted((rows["a.png"], rows["b.png"]), key=lambda row: row["id"])
    assert first["kept"]
    assert (second["evidence"], second["similarity"]) == (first["id"], 1.0)
    assert rows["c.png"]["kept"]
    edges = parquet.read_table(out / "edges" / "duplicate.parquet").to_pylist()
    assert [(edge["a"], edge["b"]) for edge in edges] == [(first["id"], second["id"])]


@pytest.mark.parametrize("reading", ["any", "kept"])
def test_semdedup_against_its_definition(reading: str) -> None:
    draw = np.random.default_rng(0)
    originals = draw.normal(size=(60, 8))
    vectors = np.repeat(originals, 5, axis=0) + draw.normal(size=(300, 8)) * 0.25
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors, rows = vectors.astype(np.float32), np.sort(draw.permutation(300)[:280])
    settings = SemDeDupConfig(clusters=4, eps=0.02, reading=reading)
    pairs, cosine = semdedup(vectors, rows, settings, seed=7)
    found = kmeans(vectors[rows], 4, seed=7, spherical=True)
    gone: set[int] = set()
    for cluster in range(4):
        ranked = sorted(np.flatnonzero(found.cluster == cluster).tolist(), key=lambda at: -found.distance[at])
        for place, at in enumerate(ranked):
            before = [other for other in ranked[:place] if reading == "any" or other not in gone]
            if any(vectors[rows[at]] @ vectors[rows[other]] > 0.98 for other in before):
                gone.add(at)
    assert pairs[:, 0].tolist() == sorted(int(rows[at]) for at in gone)
    assert 20 < len(gone) < 260
    assert np.allclose(cosine, (vectors[pairs[:, 0]] * vectors[pairs[:, 1]]).sum(axis=1), atol=1e-3)


def test_a_giant_component_is_cut_at_its_weakest_edges() -> None:
    # two rings of four, joined by a weak edge; and a pair
    pairs = np.array([[0, 1], [1, 2], [2, 3], [0, 3], [4, 5], [5, 6], [6, 7], [4, 7], [3, 4], [8, 9]])
    similarity = np.array([0.9] * 8 + [0.8, 0.76], np.float32)
    groups = Groups.of(np.arange(10), pairs, similarity)
    sizes = np.bincount(groups.component)
    assert sorted(zip(sizes.tolist(), groups.diameters().tolist(), strict=True)) == [(2, 1), (8, 5)]
    assert np.bincount(groups.split(8).component).tolist() == sizes.tolist()
    cut = groups.split(5)
    assert sorted(np.bincount(cut.component).tolist()) == [2, 4, 4]
    assert cut.component[0] == cut.component[3] != cut.component[4]
    assert max(np.bincount(groups.split(3).component)) == 3


def test_who_stays_is_a_setting(tmp_path: Path) -> None:
    image = another(1, 5)
    sizes = {"a": 120, "b": 100, "c": 128}
    for name, side in sizes.items():
        (tmp_path / "pool").mkdir(exist_ok=True)
        image.resize((side, side), Image.Resampling.LANCZOS).save(tmp_path / "pool" / f"{name}.png")
    kept = {}
    for keep in ("largest", "first"):
        out = curate(f"pool={tmp_path}/pool", f"output={tmp_path}/{keep}", f"duplicates.keep={keep}")
        kept[keep] = [uri for uri, row in decisions(out).items() if row["kept"]]
    assert kept == {"largest": ["c.png"], "first": ["a.png"]}
    out = curate(f"pool={tmp_path}/pool", f"output={tmp_path}/sem", "duplicates.method=semdedup")
    assert (out / "report.html").exists()


def test_a_whole_run_with_an_index_decides_as_with_the_exact_search(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="search.engine=ivf needs FAISS")
    root = make_pool(tmp_path)
    words = [
        f"pool={root}/pool",
        f"holdout={root}/holdout",
        "stop_after=write",
    ]  # a holdout too small to index
    ivf, exact = (
        curate(*words, f"output={root}/{engine}", f"search.engine={engine}") for engine in ("ivf", "exact")
    )
    assert decisions(ivf) == decisions(exact)
    engines = {
        stage: json.loads((ivf / "stages" / stage / "search" / "engines.json").read_text())
        for stage in ("duplicates", "holdout")
    }
    assert [how["engine"] for how in engines["duplicates"]] == ["ivf"]
    assert sorted(how["engine"] for how in engines["holdout"]) == ["exact", "ivf"]
    assert all(how["recall"] >= 0.95 for found in engines.values() for how in found)
