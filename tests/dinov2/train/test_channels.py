"""Pictures of 16 bits and of other channels through the real commands: train, resume, k-NN, embed."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinov2.features import Embeddings
from dinov2.models import load_backbone
from tests.dinov2.train.runs import finish, lines_of, train_words
from tests.pictures import picture


def _write(root: Path, channels: int) -> Path:
    """12-bit values in 16 bits, in class folders: TIFF where there is one channel, else arrays."""
    for kind in range(2):
        for number in range(8):
            colours = np.asarray(picture(kind, number, (48, 40)), dtype=np.uint16) * 16 + number
            planes = np.concatenate([colours, colours[..., ::-1]], axis=2)[..., :channels]
            folder = root / f"class_{kind}"
            folder.mkdir(parents=True, exist_ok=True)
            if channels == 1:
                tifffile.imwrite(folder / f"{number}.tif", planes[..., 0])
            else:
                np.save(folder / f"{number}.npy", planes)
    return root


@pytest.mark.parametrize("channels", [1, 4])
def test_deep_pictures_train_and_are_embedded_by_what_was_trained(
    pictures: Path, tmp_path: Path, channels: int
):
    data = _write(tmp_path / "deep", channels)
    words = train_words(
        pictures,
        f"data={data}",
        f"model.channels={channels}",
        f"augment.mean={[0.5] * channels}",
        f"augment.std={[0.25] * channels}",
        "augment.value_range=[0,4095]",
        "steps=4",
        f"knn.train={data}",
        f"knn.test={data}",
    )
    done = finish(words, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["step"] == 4 and lines[-1]["replaced"] == 0 and "knn.teacher" in lines[-1]
    backbone = load_backbone(str(tmp_path / "run" / "backbone"))
    assert backbone.value_range == (0, 4095) and len(backbone.normalisation[0]) == channels
    embedded = finish(
        [*words[:2], "dinov2.embed", "run/backbone", str(data), "output=vectors", "size=32"], tmp_path
    )
    assert embedded.returncode == 0, embedded.stderr
    vectors = Embeddings.open(tmp_path / "vectors")
    assert vectors.shape == (16, 192)
