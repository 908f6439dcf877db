"""The embeddings folder: equal to plain code, whole after any kill, never mixed, and shared by processes."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dinov2.vision_ops  # noqa: F401  # for what its import does: before torchvision

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dinov2.data.sources import open_source
from dinov2.exits import UserError
from dinov2.export import save_backbone
from dinov2.features import BackboneEmbedder, CentreCrop, Embeddings, embed, embed_array
from dinov2.models.config import vit_config
from dinov2.models.vit import VisionTransformer
from tests.faults import assert_survives, random_moments, when
from tests.pictures import broken_pictures, class_folder, odd_pictures, picture


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    config = vit_config("vit_tiny", depth=3, patch=16, image_size=64, registers=1)
    return VisionTransformer(config).eval().requires_grad_(False)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    class_folder(tmp_path / "pictures", classes=3, each=7)
    return tmp_path / "pictures"


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (64, 64), (97, 53), (1000, 130)])
def test_the_transform_is_torchvisions(size):
    image = picture(1, 2, size)
    reference = v2.Compose(
        [v2.Resize(73, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(64), v2.ToImage()]
    )
    assert torch.equal(CentreCrop(64, 73)(image), reference(image))


def test_squeezed_pictures_are_seen_to_their_edges(backbone):
    image = picture(1, 2, (300, 100))
    image.paste("red", (0, 0, 6, 100))
    embedder = BackboneEmbedder(backbone, size=64, squeeze=True)
    reference = v2.Compose([v2.Resize((64, 64), v2.InterpolationMode.BICUBIC, antialias=True), v2.ToImage()])
    assert torch.equal(embedder.prepare(image), reference(image))
    assert embedder.prepare(image)[0, :, 0].float().mean() > 200
    assert embedder.meta["transform"] == {"kind": "squeeze", "size": 64}


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000), (1, 1)])
def test_strips_do_not_need_their_length_in_rows(size):
    assert CentreCrop(64, 73)(Image.new("RGB", size, "red")).shape == (3, 64, 64)


def test_tokens_are_those_of_the_published_interface(backbone):
    batch = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in backbone.normalisation)
    images = (batch / 255 - mean) / std
    features = backbone.forward_features(images)
    layers = backbone.get_intermediate_layers(images, 2, return_class_token=True)
    expected = {
        "cls": features["x_norm_clstoken"],
        "mean": features["x_norm_patchtokens"].mean(1),
        "gem": features["x_norm_patchtokens"].clamp(min=1e-6).pow(4).mean(1).pow(0.25),
        "cls2+mean": torch.cat([layers[0][1], layers[1][1], layers[1][0].mean(1)], 1),
    }
    for token, vectors in expected.items():
        embedder = BackboneEmbedder(backbone, size=64, token=token)
        assert embedder.dimension == vectors.shape[1]
        assert torch.allclose(embedder(batch), vectors, atol=1e-6)
    normalised = BackboneEmbedder(backbone, size=64, normalised=True)(batch)
    assert torch.allclose(normalised.norm(dim=1), torch.ones(2))


def test_a_folder_holds_what_one_picture_at_a_time_gives(backbone, pictures, tmp_path):
    odd_pictures(pictures / "class_odd")
    broken = broken_pictures(pictures / "class_broken")
    source = open_source(str(pictures), cache=tmp_path / "cache")
    embedder = BackboneEmbedder(backbone, size=64, token="cls2+mean")
    found = embed(source, embedder, tmp_path / "out", rows_per_file=8, batch=3, workers=2)
    names = {Path(uri).name for _, uri, _ in found.meta["unreadable"]}
    assert names == set(broken)
    assert all(reason for _, _, reason in found.meta["unreadable"])
    left_out = {id_ for id_, _, _ in found.meta["unreadable"]}
    assert found.ids == [id_ for id_ in source.ids if id_ not in left_out]
    ids, vectors = embed_array(source, embedder, batch=1)
    assert ids == found.ids
    assert np.allclose(found.array(), vectors, atol=2e-3, rtol=2e-3)
    assert found.shape == vectors.shape
    assert np.array_equal(found[[9, 0, 30, 9]], found.array()[[9, 0, 30, 9]])
    assert np.array_equal(found[5:20], found.array()[5:20])
    last = found.array()[:, found.columns("cls-1")]
    assert np.allclose(last, embed_array(source, BackboneEmbedder(backbone, size=64))[1], atol=2e-3)


def test_a_finished_folder_is_reopened_and_another_refused(backbone, pictures, tmp_path):
    source = open_source(str(pictures), cache=tmp_path / "cache")
    embed(source, BackboneEmbedder(backbone, size=64), tmp_path / "out")
    before = (tmp_path / "out" / "00000.npy").stat().st_mtime_ns
    embed(source, BackboneEmbedder(backbone, size=64), tmp_path / "out")
    assert (tmp_path / "out" / "00000.npy").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="token"):
        embed(source, BackboneEmbedder(backbone, size=64, token="mean"), tmp_path / "out")
    with pytest.raises(UserError, match="data"):
        embed(source.select([0, 1]), BackboneEmbedder(backbone, size=64), tmp_path / "out")


def test_two_at_once_do_the_work_once(backbone, pictures, tmp_path):
    source = open_source(str(pictures), cache=tmp_path / "cache")
    calls = []

    class Counting(BackboneEmbedder):
        def __call__(self, batch):
            calls.append(len(batch))
            return super().__call__(batch)

    embedder = Counting(backbone, size=64)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: embed(source, embedder, tmp_path / "out", batch=4), range(2)))
    assert sum(calls) == len(source)
    assert both[0].ids == both[1].ids


def test_what_cannot_be_embedded_says_why(backbone, pictures, tmp_path):
    with pytest.raises(UserError, match="patches of 16"):
        BackboneEmbedder(backbone, size=70)
    with pytest.raises(UserError, match="resize=32 is less"):
        BackboneEmbedder(backbone, size=64, resize=32)
    with pytest.raises(UserError, match="join cls"):
        BackboneEmbedder(backbone, size=64, token="max")
    with pytest.raises(UserError, match="needs 4 blocks, the backbone has 3"):
        BackboneEmbedder(backbone, size=64, token="cls4")
    with pytest.raises(UserError, match="no finished embeddings"):
        Embeddings.open(tmp_path)
    source = open_source(str(pictures), cache=tmp_path / "cache")
    broken = VisionTransformer(backbone.config).eval()
    broken.load_state_dict(backbone.state_dict() | {"norm.bias": torch.full((192,), torch.nan)})
    with torch.no_grad(), pytest.raises(UserError, match="not finite"):
        embed(source, BackboneEmbedder(broken, size=64), tmp_path / "broken")
    broken_pictures(tmp_path / "nothing")
    nothing = open_source(str(tmp_path / "nothing"), cache=tmp_path / "cache")
    with pytest.raises(UserError, match="none of the 8 pictures"):
        embed(nothing, BackboneEmbedder(backbone, size=64), tmp_path / "none")


@pytest.mark.long  # a killed suite of evaluations is among the quick ones
def test_a_killed_command_ends_with_the_same_bytes(backbone, pictures, tmp_path):
    class_folder(pictures, classes=3, each=60, first=20)
    mean, std = backbone.normalisation
    save_backbone(backbone, None, tmp_path / "backbone", mean=mean, std=std, card={})
    words = [str(tmp_path / "backbone"), str(pictures), "output=out", "size=64", "rows_per_file=16"]
    assert_survives(
        [sys.executable, "-m", "dinov2.embed", *words, "workers=1", f"cache={tmp_path / 'cache'}"],
        tmp_path / "runs",
        results=["out/*.npy", "out/ids.parquet", "out/meta.json"],
        moments=[when("out/00002.npy"), *random_moments(1, seed=0, first=0.8)],
        env={"OMP_NUM_THREADS": "1"},  # the products are too small for more
    )
    meta = json.loads((tmp_path / "runs" / "killed" / "out" / "meta.json").read_text())
    assert meta["rows"] == 201
