"""Retrieval by the command: a data set in the published form, classes of any folder, and what is refused."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from dinov2.config import read
from dinov2.data.decode import decode
from dinov2.data.sources import open_source
from dinov2.exits import UserError
from dinov2.models import load_backbone
from evals.__main__ import main
from evals.bench import Bench
from evals.descriptors import Describer, Whitening, Whole
from evals.retrieval import RetrievalConfig
from tests.evals.small import result_of, small_backbone
from tests.pictures import class_folder, picture

SMALL = ["size=32", "batch=16"]
TRUTH = {
    "imlist": [f"scene_{number}" for number in range(8)],
    "qimlist": ["query_0", "query_1"],
    "gnd": [
        {"bbx": [10.0, 5.0, 70.5, 60.0], "easy": [0], "hard": [1, 2], "junk": [3]},
        {"bbx": [0.0, 0.0, 96.0, 80.0], "easy": [], "hard": [5], "junk": []},
    ],
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_backbone(tmp_path_factory.mktemp("backbone"))


def landmarks(root: Path) -> Path:
    """Query 0 is of a scene that pictures 0 to 3 show too, query 1 the same picture as number 5."""
    (root / "jpg").mkdir(parents=True)
    for number in range(8):
        kind = 0 if number < 4 else number
        picture(kind, number).save(root / "jpg" / f"scene_{number}.jpg", quality=95)
    picture(0, 0).save(root / "jpg" / "query_0.jpg", quality=95)
    picture(5, 5).save(root / "jpg" / "query_1.jpg", quality=95)
    return root


def test_the_revisited_protocol_on_its_own_files(backbone, tmp_path):
    root = landmarks(tmp_path / "set")
    (root / "gnd_small.json").write_text(json.dumps(TRUTH))
    found = result_of(backbone, "retrieval", *SMALL, f"data={root}", output=tmp_path / "json", k="[1,2]")
    assert found["headline"] == "map_medium"
    assert found["details"]["queries"] == {"map_easy": 1, "map_medium": 2, "map_hard": 2}
    assert found["metrics"]["mp@1_hard"] >= 50  # query 1 is a copy of what it looks for
    assert set(found["metrics"]) == {
        f"{figure}_{setting}" for figure in ("map", "mp@1", "mp@2") for setting in ("easy", "medium", "hard")
    }
    (root / "gnd_small.json").unlink()
    (root / "gnd_small.pkl").write_bytes(pickle.dumps(TRUTH, protocol=2))
    again = result_of(backbone, "retrieval", *SMALL, f"data={root}", output=tmp_path / "pickle", k="[1,2]")
    assert again["metrics"] == found["metrics"]
    assert 'class="good"' in (tmp_path / "pickle" / "results").glob("*.html").__next__().read_text()


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        (TRUTH | {"imlist": ["scene_0", "elsewhere"]}, "names a picture elsewhere"),
        (TRUTH | {"gnd": TRUTH["gnd"][:1]}, "2 queries, and 1 in gnd"),
        (TRUTH | {"gnd": [{"bbx": [0, 0, 9, 9], "easy": [8], "hard": [], "junk": []}] * 2}, "beyond the 8"),
        (TRUTH | {"gnd": [{"bbx": [9, 0, 9, 9]}] * 2}, "a box of no size"),
        ({"imlist": ["scene_0"], "gnd": []}, "lacks a sound imlist, qimlist or gnd"),
        ([1, 2], "lacks a sound imlist, qimlist or gnd"),
    ],
)
def test_a_ground_truth_that_does_not_fit_is_named(backbone, tmp_path, truth, said):
    root = landmarks(tmp_path / "set")
    (root / "gnd_small.json").write_text(json.dumps(truth))
    with pytest.raises(UserError, match=said):
        main([backbone, "retrieval", *SMALL, f"data={root}", f"output={tmp_path / 'out'}"])


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    "content",
    [Evil(), {"imlist": [Evil()]}, {"imlist": np.arange(3)}, TRUTH | {"gnd": {1}}],
    ids=["alone", "inside", "an array", "a set"],
)
def test_no_code_in_a_pickle_runs(backbone, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    root = landmarks(tmp_path / "set")
    (root / "gnd_small.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"gnd_small.pkl (cannot be read: it wants|lacks)"):
        main([backbone, "retrieval", *SMALL, f"data={root}", f"output={tmp_path / 'out'}"])
    assert not (tmp_path / "ran").exists()
    (root / "gnd_small.pkl").write_bytes(b"no pickle")
    with pytest.raises(UserError, match="cannot be read: "):
        main([backbone, "retrieval", *SMALL, f"data={root}", f"output={tmp_path / 'out'}"])


def test_classes_of_any_folder_each_picture_without_itself(backbone, tmp_path):
    for number in range(18):  # of four kinds in three classes, which therefore cannot all be found
        folder = tmp_path / "pictures" / f"class_{number // 6}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(number % 4, number).save(folder / f"{number:02}.png")
    found = result_of(backbone, "retrieval", *SMALL, f"test={tmp_path / 'pictures'}", output=tmp_path / "out")
    folder = next((tmp_path / "out" / "features").glob("*/cls"))
    rows = np.load(folder / "00000.npy").astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = np.repeat([0, 1, 2], 6)
    precisions = []
    for row in range(18):
        others = np.arange(18) != row
        relevant = labels[others] == labels[row]
        precisions.append(average_precision_score(relevant, (rows @ rows[row])[others]))
    assert found["metrics"]["map"] == pytest.approx(100 * np.mean(precisions), abs=0.05)
    assert found["details"] == {"classes": 3, "queries": 18, "alone": 0}
    low, high = found["intervals"]["map"]
    assert low < found["metrics"]["map"] < high
    parts = [f"train={tmp_path / 'pictures'}", f"test={tmp_path / 'pictures'}"]
    itself = result_of(backbone, "retrieval", *SMALL, *parts, output=tmp_path / "itself")
    assert itself["metrics"]["recall@1"] == 100


@pytest.mark.parametrize("fit", ["square", "longest"])
def test_pictures_are_seen_whole_where_that_is_asked(backbone, tmp_path, fit):
    class_folder(tmp_path / "pictures", classes=2, each=3, size=(120, 60))
    words = [*SMALL, f"fit={fit}", f"test={tmp_path / 'pictures'}"]
    found = result_of(backbone, "retrieval", *words, "token=cls+gem", output=tmp_path / "out")
    assert found["settings"]["fit"] == fit
    assert result_of("pixels", "retrieval", *words, output=tmp_path / "pixels")["metrics"]["map"] > 0
    assert Whole(224, False, 14).sides(640, 480) == (224, 168)
    assert Whole(224, False, 14).sides(1000, 10) == (224, 14)
    assert Whole(224, True, 14).sides(640, 480) == (224, 224)


def test_several_scales_are_averaged(backbone, tmp_path):
    root = landmarks(tmp_path / "set")
    (root / "gnd_small.json").write_text(json.dumps(TRUTH))
    words = ["retrieval", *SMALL, f"data={root}", "fit=longest", f"output={tmp_path / 'out'}"]
    config = read(RetrievalConfig, [*words[1:], "scales=[1,0.7071,0.5]", f"backbone={backbone}"])
    describer, model = Describer(Bench(config), config), load_backbone(backbone)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in model.normalisation)

    def reference(image: Image.Image) -> torch.Tensor:
        vectors = []
        for longest in (32, 24, 16):  # in whole patches of 8
            sides = [8 * round(longest * side / max(image.size) / 8) for side in image.size]
            pixels = torch.from_numpy(np.array(image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)))
            with torch.no_grad():
                vector = model(((pixels.permute(2, 0, 1) / 255 - mean) / std)[None])[0]
            vectors.append(vector / vector.norm())
        return sum(vectors, torch.zeros(48)) / torch.stack(vectors).sum(0).norm()

    source = open_source(str(root / "jpg"))
    _, found = describer.source(source)
    images = [decode(source.read(row)) for row in range(len(source))]
    assert torch.allclose(found, torch.stack([reference(image) for image in images]), atol=1e-3)
    assert torch.allclose(describer.picture(images[0]), found[0], atol=1e-6)
    alone = Describer(Bench(config), replace(config, scales=[1.0])).source(source)[1]
    assert not torch.allclose(found, alone, atol=1e-2)
    main([backbone, *words, "scales=[1,0.7071,0.5]"])
    for wrong, said in (("scales=[]", "give one or more above 0"), ("scales=[0.5,-1]", "above 0")):
        with pytest.raises(UserError, match=said):
            main([backbone, *words, wrong])
    with pytest.raises(UserError, match="seen at one size"):
        main(["pixels", *words, "scales=[0.5]"])


def test_whitened_vectors_spread_alike_in_all_directions():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 3
    whitening = Whitening.learnt(rows, 5)
    projected = (rows - whitening.mean) @ whitening.projection
    assert torch.allclose(torch.cov(projected.T), torch.eye(5), atol=1e-3)
    values = torch.linalg.eigvalsh(torch.cov(rows.double().T)).flip(0)[:5]
    assert torch.allclose(whitening.projection.norm(dim=0).double(), values.rsqrt(), rtol=1e-3)
    assert torch.allclose(whitening(rows).norm(dim=1), torch.ones(500))
    with pytest.raises(UserError, match="500 vectors of 12 give 12 directions"):
        Whitening.learnt(rows, 13)
    with pytest.raises(UserError, match="spread in 2 directions"):
        Whitening.learnt(rows[:, :2] @ torch.randn(2, 6, generator=generator), 4)
