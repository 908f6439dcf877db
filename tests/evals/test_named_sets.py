"""Labelled pictures by other names: iNaturalist's JSON, and torchvision's sets."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from dinov2.exits import UserError
from evals.layouts import torchvision_sets
from evals.layouts.labelled import open_labelled
from tests.pictures import picture


def test_inaturalists_json_names_pictures_and_their_classes(tmp_path):
    for number in range(6):
        file = tmp_path / "train_val2018" / "Birds" / f"{number % 2}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number % 2, number).save(file)
    images = [
        {"id": 10 + n, "file_name": f"train_val2018/Birds/{n % 2}/{n}.jpg", "width": 96} for n in range(6)
    ]
    annotations = [{"id": n, "image_id": 10 + n, "category_id": 700 + n % 2} for n in range(5)]
    path = tmp_path / "train2018.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    source = open_labelled(str(path), tmp_path / "cache")
    assert source.name == "train2018"
    stems = [Path(uri).stem for uri in source.table["uri"].to_pylist()]
    found = dict(zip(stems, source.labels(), strict=True))
    assert found == {str(n): str(700 + n % 2) for n in range(5)}
    assert source.read(0)
    (tmp_path / "train_val2018" / "Birds" / "1" / "3.jpg").unlink()
    with pytest.raises(UserError, match=r"1 pictures that are not there, .*/1/3.jpg first"):
        open_labelled(str(path), tmp_path / "cache")
    path.write_text("{}")
    with pytest.raises(UserError, match="no JSON with images and annotations"):
        open_labelled(str(path), tmp_path / "cache")


def cifar(root: Path) -> None:
    """CIFAR-10's own files, with ten pictures a batch, as they lie on a disk."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        content = {"data": random.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"class {n}" for n in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


def test_torchvisions_sets_become_folders_of_classes(tmp_path, monkeypatch):
    cifar(tmp_path)
    kind = torchvision_sets._kind("CIFAR10")
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)  # ours are not the published bytes
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    source = open_labelled(f"torchvision:CIFAR10?root={tmp_path}", tmp_path / "cache")
    assert len(source) == 60
    assert source.table["split"].to_pylist().count("train") == 50
    assert {*source.labels()} == {f"{n:04d} class {n}" for n in range(10)}
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    again = open_labelled(f"torchvision:CIFAR10?root={tmp_path}", tmp_path / "cache")  # not made twice
    assert again.fingerprint == source.fingerprint


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("torchvision:CIFAR11?root=x", "did you mean 'CIFAR10"),
        ("torchvision:CIFAR10", r"torchvision:CIFAR10\?root=DIR"),
        ("torchvision:EMNIST?root=x", "EMNIST"),
    ],
)
def test_a_set_that_cannot_be_had_says_why(tmp_path, monkeypatch, spec, said):
    monkeypatch.chdir(tmp_path)

    def no_network(*arguments: object, **options: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError, match=said):
        open_labelled(spec, tmp_path / "cache")
    with pytest.raises(UserError, match=r"could not be had .*without a network, put its files into"):
        open_labelled("torchvision:MNIST?root=y", tmp_path / "cache")
