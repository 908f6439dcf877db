"""Keypoints by the command on SPair's own layout, and the match held to a plain loop."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.exits import UserError
from evals.__main__ import main
from evals.keypoints import matched
from tests.evals.small import result_of, small_backbone
from tests.pictures import picture

SMALL = ["size=64"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_backbone(tmp_path_factory.mktemp("backbone"))


def spair(root: Path, tall: int = 15, **changed: object) -> Path:
    """Two categories; each pair is a picture and itself, whose keypoints must come back.

    They lie in the middle of patches, which are 20 pixels wide and so many high: between two patches the
    feature is one that neither has.
    """
    folder = root / "PairAnnotation" / "test"
    folder.mkdir(parents=True, exist_ok=True)
    for number, category in enumerate(("cat", "dog", "dog")):
        image = root / "JPEGImages" / category / f"{number}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        picture(number, number, (160, 120)).save(image, quality=95)
        places = [(1 + number, 2), (5, 4), (0, 0)]
        points = [[20 * column + 9.5, tall * row + tall / 2 - 0.5] for column, row in places]
        pair = {
            "category": category,
            "src_imname": image.name,
            "trg_imname": image.name,
            "src_kps": points,
            "trg_kps": points,
            "trg_bndbox": [10, 10, 110, 100],
        }
        (folder / f"{number:06}-{category}.json").write_text(json.dumps(pair | changed))
    return root


@pytest.mark.parametrize("fit", ["square", "longest"])
def test_a_picture_finds_its_own_keypoints_to_within_a_patch(backbone, tmp_path, fit):
    root = spair(tmp_path / "spair", tall=15 if fit == "square" else 20)
    words = [*SMALL, f"data={root}", f"fit={fit}", "alphas=[0.2,0.001]"]
    found = result_of(backbone, "keypoints", *words, output=tmp_path / "out")
    assert found["headline"] == "pck@0.2_bbox"
    assert set(found["metrics"].values()) == {100.0}
    assert found["details"]["points"] == 9
    assert list(found["details"]["by category"]) == ["cat", "dog"]


def test_the_match_is_that_of_a_loop_over_patches():
    generator = torch.Generator().manual_seed(0)
    source = torch.nn.functional.normalize(torch.randn(6, 4, 5, generator=generator), dim=0)
    target = torch.nn.functional.normalize(torch.randn(6, 3, 7, generator=generator), dim=0)
    # Points in the middle of patches have just that patch's feature: pixels of 10 x 10 a patch.
    rows, columns = [0, 3, 2], [4, 0, 1]
    points = np.array(
        [[10 * column + 4.5, 10 * row + 4.5] for row, column in zip(rows, columns, strict=True)]
    )
    found = matched(source, target, points, (50, 40), (140, 90))
    for number, (row, column) in enumerate(zip(rows, columns, strict=True)):
        cosines = {
            (r, c): float(source[:, row, column] @ target[:, r, c]) for r in range(3) for c in range(7)
        }
        r, c = max(cosines, key=lambda place: cosines[place])
        assert found[number] == pytest.approx([20 * c + 9.5, 30 * r + 14.5])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"trg_kps": [[1, 1]]}, "[013] points in one picture, 1 in the other"),
        ({"trg_imname": "missing.jpg"}, "missing.jpg, which is not there"),
        ({"trg_bndbox": [10, 10, 10, 40]}, "a box of no size"),
        ({"src_kps": "none"}, "is no pair of pictures"),
    ],
)
def test_pairs_that_do_not_fit_are_named(backbone, tmp_path, changed, said):
    spair(tmp_path / "spair", **changed)
    words = [backbone, "keypoints", *SMALL, f"output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=said):
        main([*words, f"data={tmp_path / 'spair'}"])
    with pytest.raises(UserError, match="there are no pairs"):
        main([*words, f"data={tmp_path / 'spair'}", "split=val"])
