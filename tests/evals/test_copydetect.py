"""Copy detection by the command: the published layouts, copies made on the fly, and what is refused."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from dinov2.data.copies import KINDS, copies_of
from dinov2.exits import UserError
from evals.__main__ import main
from evals.copydetect import Copied
from evals.judged import Judged
from tests.evals.small import result_of, small_backbone
from tests.pictures import class_folder, copies, picture

SMALL = ["size=32", "batch=16"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_backbone(tmp_path_factory.mktemp("backbone"))


def copydays(root: Path) -> Path:
    for number in range(6):
        original = picture(number, number)
        save(original, root / "original" / f"2{number:03}00.jpg")
        edited = copies(original)
        save(edited["written_on"], root / "strong" / f"2{number:03}01.jpg")
        save(edited["grey"], root / "strong" / f"2{number:03}02.jpg")
        save(edited["recompressed"], root / "jpeg" / "50" / f"2{number:03}00.jpg")
        save(edited["cropped"], root / "crops" / "20" / f"2{number:03}00.jpg")
    return root


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


def test_copydays_by_its_file_numbers(backbone, tmp_path):
    root = copydays(tmp_path / "copydays")
    class_folder(tmp_path / "others", classes=4, each=8, first=100)
    words = [*SMALL, f"data={root}"]
    found = result_of(backbone, "copydetect", *words, output=tmp_path / "out")
    assert found["headline"] == "map_strong"
    assert set(found["metrics"]) == {"map_strong", "map_crops", "map_jpeg"}
    assert found["metrics"]["map_jpeg"] == 100
    assert list(found["details"]["by attack"]) == ["crops/20", "jpeg/50", "strong"]
    more = [f"distractors={tmp_path / 'others'}", f"train={tmp_path / 'others'}", "whiten=8"]
    harder = result_of(backbone, "copydetect", *words, *more, output=tmp_path / "whitened")
    assert harder["metrics"] != found["metrics"]
    assert harder["data"]["distractors"]["pictures"] == 32
    save(picture(0, 0), root / "strong" / "909900.jpg")
    with pytest.raises(UserError, match=r"909900.jpg \(strong\) has no original"):
        main([backbone, "copydetect", *words, f"output={tmp_path / 'none'}"])
    save(picture(0, 0), root / "strong" / "holiday.jpg")
    with pytest.raises(UserError, match="called by number"):
        main([backbone, "copydetect", *words, f"output={tmp_path / 'none'}"])


def test_pairs_of_a_table_in_one_ranking(backbone, tmp_path):
    for number in range(8):
        save(picture(number % 3, number), tmp_path / "references" / f"R{number}.jpg")
    for number, name in enumerate(("grey", "cropped", "brighter", "flipped")):
        save(copies(picture(number % 3, number))[name], tmp_path / "queries" / f"Q{number}.jpg")
    save(picture(1, 77), tmp_path / "queries" / "Q9.jpg")
    class_folder(tmp_path / "background", classes=3, each=4, first=200)
    with open(tmp_path / "truth.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["query_id", "reference_id"], *([f"Q{n}", f"R{n}"] for n in range(4)), ["Q9", ""]]
        )
    places = [f"{name}={tmp_path / name}" for name in ("queries", "references")]
    words = [*SMALL, *places, f"ground_truth={tmp_path / 'truth.csv'}", "k=8", "token=cls", "fit=crop"]
    found = result_of(backbone, "copydetect", *words, output=tmp_path / "out")
    rows = {
        len(one): one / np.linalg.norm(one, axis=1, keepdims=True)
        for path in (tmp_path / "out").glob("features/*/cls/00000.npy")
        for one in [np.load(path).astype(np.float64)]
    }
    scores, truth = rows[5] @ rows[8].T, np.eye(5, 8, dtype=bool)
    truth[4] = False
    expected = 100 * average_precision_score(truth.ravel(), scores.ravel())
    assert found["metrics"]["micro_ap"] == pytest.approx(expected, abs=0.01)
    assert found["details"]["pairs"] == 4
    extra = [f"background={tmp_path / 'background'}", "normalise_k=3"]
    normalised = result_of(backbone, "copydetect", *words, *extra, output=tmp_path / "out")
    rows = {len(np.load(path)): np.load(path) for path in (tmp_path / "out").glob("features/*/cls/00000.npy")}
    background = rows[12].astype(np.float64) / np.linalg.norm(rows[12].astype(np.float64), axis=1)[:, None]
    queries = rows[5].astype(np.float64) / np.linalg.norm(rows[5].astype(np.float64), axis=1)[:, None]
    scores = scores - np.sort(queries @ background.T, axis=1)[:, -3:].mean(1, keepdims=True)
    expected = 100 * average_precision_score(truth.ravel(), scores.ravel())
    assert normalised["metrics"]["micro_ap"] == pytest.approx(expected, abs=0.01)


def test_copies_made_on_the_fly_of_anybodys_pictures(backbone, tmp_path):
    class_folder(tmp_path / "pictures", classes=3, each=6)
    Image.new("RGB", (9, 5), "teal").save(tmp_path / "pictures" / "tiny.png")
    words = [*SMALL, f"data={tmp_path / 'pictures'}", "copied=3"]
    found = result_of(backbone, "copydetect", *words, output=tmp_path / "out")
    assert found["details"]["copied"] == found["details"]["copied without an original"] == 3
    assert found["details"]["queries"] == 6 * len(KINDS)
    assert found["details"]["pairs"] == 3 * len(KINDS)
    assert set(found["details"]["by kind"]) == set(KINDS)
    assert found["details"]["by kind"]["JPEG 60 to 90"]["recall@1"] == 100
    low, high = found["intervals"]["micro_ap"]
    assert low <= found["metrics"]["micro_ap"] <= high
    whole = picture(0, 0)
    assert Copied("grey", 3)(whole).tobytes() == Copied("grey", 3)(whole.copy()).tobytes()
    assert Copied("flip", 3)(whole).size == whole.size
    assert copies_of(whole, 3)["text overlay"].tobytes() != copies_of(whole, 4)["text overlay"].tobytes()


def test_queries_count_as_often_as_they_are_drawn():
    random = np.random.default_rng(0)
    right = random.random((20, 5)) < 0.2
    judged = Judged(random.random((20, 5)), np.zeros((20, 5), int), right, np.ones(20, int))
    counts = random.integers(0, 4, 20)
    rows = np.repeat(np.arange(20), counts)
    again = Judged(judged.scores[rows], judged.rows[rows], judged.right[rows], judged.wanted[rows])
    assert judged.micro_ap(counts) == pytest.approx(again.micro_ap())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["queries=PICTURES"], "give data="),
        (["data=PICTURES", "queries=PICTURES"], "give data="),
        (["data=PICTURES", "whiten=4"], "whiten=4 needs train="),
        (["data=PICTURES", "test=PICTURES"], "test= means nothing here"),
        (["queries=PICTURES", "references=OTHERS", "ground_truth=TABLE"], "needs the columns query_id"),
        (["data=PICTURES", "token=max"], "join cls, cls4, mean or gem"),
        (["data=PICTURES", "fit=stretch"], "fit=stretch"),
        (["data=PICTURES", "size=36"], "does not divide"),
    ],
)
def test_what_cannot_be_measured_says_why(backbone, tmp_path, words, said):
    class_folder(tmp_path / "PICTURES", classes=2, each=3)
    class_folder(tmp_path / "OTHERS", classes=2, each=3, first=20)
    (tmp_path / "TABLE").write_text("copy,original\n")
    for name in ("PICTURES", "OTHERS", "TABLE"):
        words = [word.replace(name, str(tmp_path / name)) for word in words]
    with pytest.raises(UserError, match=said):
        main([backbone, "copydetect", "size=32", *words, f"output={tmp_path / 'out'}"])
