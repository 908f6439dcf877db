"""Copies are found by the cosine of a copy detector in the form in which SSCD is published."""

from pathlib import Path

import dinov2.vision_ops  # noqa: F401  # before torchvision

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torchvision.transforms import v2

from dinov2.exits import UserError
from dinov2.models.backbone import IMAGENET
from tests.curation.pools import curate, decisions, make_pool
from tests.dinov2.models.weights import CopyDetector, trace

COPIED, SMALL = "class_1/000.png", "copies/small.jpg"
EXACT = ("copies/exact.png", "copies/same_pixels.bmp")


def test_a_torchscript_files_cosine_decides(tmp_path: Path) -> None:
    root = make_pool(tmp_path, size=(128, 80))
    detector = CopyDetector().eval()
    path = trace(detector, tmp_path / "sscd.torchscript.pt", 64)
    words = [f"pool={root}/pool", f"backbone={path}?image_size=96", "embed.fit=squeeze", "stop_after=write"]
    words += ["duplicates.verify=false", "duplicates.threshold=0.99", f"output={tmp_path}/out"]
    with pytest.raises(UserError, match="did you mean 'squeeze'"):
        curate(*words, "embed.fit=squeze")
    out = curate(*words)
    ids = parquet.read_table(out / "stages/embed/pool/ids.parquet").to_pylist()
    stored = np.load(out / "stages/embed/pool/00000.npy").astype(np.float32)
    seen = v2.Compose(
        [
            v2.Resize((96, 96), v2.InterpolationMode.BICUBIC, antialias=True),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(IMAGENET[0]), list(IMAGENET[1])),
        ]
    )
    images = [seen(Image.open(root / "pool" / row["uri"]).convert("RGB")) for row in ids]
    with torch.no_grad():
        vectors = detector(torch.stack(images)).numpy()
    assert np.allclose(stored, vectors, atol=2e-3)
    place = {row["id"]: number for number, row in enumerate(ids)}
    found = {}
    for row in parquet.read_table(out / "edges/duplicate.parquet").to_pylist():
        found[place[row["a"]], place[row["b"]]] = row["similarity"]
    cosine = np.clip(vectors @ vectors.T, -1, 1)
    for (a, b), similarity in found.items():
        assert abs(cosine[a, b] - similarity) < 2e-3
    alike = {(a, b) for a, b in np.argwhere(np.triu(cosine, 1) >= 0.992).tolist()}
    copies = {number for number, row in enumerate(ids) if row["uri"] in EXACT}
    assert {pair for pair in alike if not copies & set(pair)} <= found.keys()  # of those one stands for all
    small, original = (next(n for n, row in enumerate(ids) if row["uri"] == uri) for uri in (SMALL, COPIED))
    assert cosine[small, original] > 0.99
    assert sum(decisions(out)[uri]["kept"] for uri in (SMALL, COPIED, *EXACT)) <= 1
