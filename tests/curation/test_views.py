"""Mirrored, turned, tilted and recoloured copies are found, and those that lie in another picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pyarrow import parquet

from curation import views
from curation.descriptor import LENGTH, Whitening, describe, order_of
from curation.ingest import Stack
from curation.looks import luma, pca_hash, perceptual_hash, thumbnail
from tests.curation.pools import another, curate, decisions

THUMBS = np.stack([thumbnail(another(kind, 3)) for kind in range(4)])


@pytest.mark.parametrize("view", range(16))
def test_hashes_and_descriptors_of_views_are_those_of_pictures_made_so(view: int) -> None:
    seen = views.seen(THUMBS, view)
    *found, spread = views.hashes(THUMBS, [view])
    for make, values in zip((perceptual_hash, pca_hash), found, strict=True):
        assert [int(value) for value in values[0]] == [make(luma(thumb)) for thumb in seen]
    assert np.all(spread[0] <= luma(seen).std(axis=(1, 2)) * 1.05)
    if view < 8:
        order = order_of(view // 2, bool(view % 2))
        for thumb, other in zip(THUMBS, seen, strict=True):
            assert np.allclose(describe(np.ascontiguousarray(other)), describe(thumb)[order], atol=1e-5)
        assert np.array_equal(views.seen(seen, views.UNDONE[view]), THUMBS)


@pytest.mark.parametrize("window", range(len(views.WINDOWS)))
def test_windows_are_described_as_pictures_cropped_so(window: int, tmp_path: Path) -> None:
    left, top = views.WINDOWS[window]
    whole = Whitening(np.zeros(LENGTH, np.float32), np.eye(LENGTH, dtype=np.float32))
    np.save(tmp_path / "thumbs.npy", THUMBS)
    found = views.Cropped(Stack([tmp_path / "thumbs.npy"]), whole, window)
    for row, vector in enumerate(found[np.arange(4)].astype(np.float32)):
        image = another(row, 3)
        box = [at * side for at in (left, top, left + 0.8, top + 0.8) for side in image.size]
        crop = image.crop((round(box[0]), round(box[3]), round(box[4]), round(box[7])))
        others = [thumbnail(image), *(thumbnail(another(kind, 3)) for kind in range(4) if kind != row)]
        cosine = [float(vector @ describe(thumb)) / 2 for thumb in (thumbnail(crop), *others)]
        assert cosine[0] > max(0.97, *cosine[1:])


def test_a_corner_is_found_where_its_whole_has_nearer_neighbours(tmp_path: Path) -> None:
    for number in range(12):
        for kind in range(4):
            path = tmp_path / "pool" / f"{kind}{number}.png"
            path.parent.mkdir(exist_ok=True)
            another(kind, number).save(path)
    (tmp_path / "holdout").mkdir()
    another(2, 0).crop((0, 0, 86, 74)).save(tmp_path / "pool" / "corner.jpg", quality=85)
    another(2, 0).save(tmp_path / "holdout" / "whole.png")
    (tmp_path / "pool" / "20.png").unlink()
    words = [f"pool={tmp_path}/pool", f"holdout={tmp_path}/holdout", "stop_after=holdout"]
    words += ["leaks.k=1", "leaks.always=0", "leaks.hash_distance=0", "leaks.turned_cosine=0.1"]
    found = []
    for crops in ("false", "true"):
        out = curate(*words, f"leaks.crops={crops}", f"output={tmp_path}/{crops}")
        found.append(parquet.read_table(out / "leaks.parquet")["pool_uri"].to_pylist())
    assert found == [[], ["corner.jpg"]]


def _edited(image: Image.Image) -> dict[str, Image.Image]:
    hue = np.array(image.convert("HSV"))
    hue[..., 0] += 90
    page = Image.new("RGB", (2 * image.width, 2 * image.height), (200, 30, 90))
    page.paste(image, (image.width, 0))
    page.paste(another(3, 9), (0, image.height))
    return {
        "mirrored": ImageOps.mirror(image),
        "mirrored and cropped": ImageOps.mirror(image).crop((10, 8, 122, 108)),
        "turned": image.transpose(Image.Transpose.ROTATE_90),
        "upside down": image.transpose(Image.Transpose.ROTATE_180),
        "tilted": image.rotate(9, Image.Resampling.BICUBIC),
        "tilted back": image.rotate(-5, Image.Resampling.BICUBIC),
        "other hue": Image.fromarray(hue, "HSV").convert("RGB"),
        "in a collage": page,
    }


@pytest.mark.parametrize("where", ["pool", "holdout"])
def test_edited_copies_are_found_and_nothing_else(where: str, tmp_path: Path) -> None:
    for kind in range(4):
        for number in range(8):
            path = tmp_path / "pool" / f"{kind}{number}.png"
            path.parent.mkdir(exist_ok=True)
            another(kind, number).save(path)
    edited = _edited(another(2, 0))
    copies = {f"{name}.jpg" for name in edited}
    (tmp_path / where).mkdir(exist_ok=True)
    for name, image in edited.items():
        image.save(tmp_path / where / f"{name}.jpg", quality=85)
    # of so few and so plain pictures even nearest neighbours have little in common
    words = [f"pool={tmp_path}/pool", "duplicates.tilted=0.1", "leaks.tilted=0.1", "stop_after=write"]
    words += [f"holdout={tmp_path}/holdout"] if where == "holdout" else []
    rows = decisions(curate(*words, f"output={tmp_path}/out"))
    lost = {uri for uri, row in rows.items() if row["dropped_by"]}
    if where == "holdout":
        assert lost == {"20.png"}
        leaks = parquet.read_table(tmp_path / "out" / "leaks.parquet")
        assert set(leaks["holdout_uri"].to_pylist()) == copies
        return
    assert lost <= {"20.png", *copies}
    assert len({"20.png", *copies} - lost) == 1
    off = ("duplicates.views=false", "duplicates.turned=none", "duplicates.tilted=1")
    without = decisions(curate(words[0], *off, f"output={tmp_path}/less", "stop_after=write"))
    assert sum(row["dropped_by"] is not None for row in without.values()) < len(copies) / 2
