"""Attention: the Jaccard index by its definition, and the command on what a head can be made to look at."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from dinov2.exits import UserError
from dinov2.export import save_backbone
from dinov2.models.blocks import Block
from dinov2.models.config import vit_config
from dinov2.models.vit import VisionTransformer
from evals.__main__ import main
from evals.attention import attended, jaccard


def test_jaccard_is_scikit_learns_over_the_pixels_that_count():
    draw = np.random.default_rng(0)
    masks, truth, counted = draw.random((3, 9, 8)) < 0.4, draw.random((9, 8)) < 0.5, draw.random((9, 8)) < 0.8
    reference = [jaccard_score(truth[counted], mask[counted]) for mask in masks]
    assert jaccard(masks, truth, counted).tolist() == pytest.approx(reference)
    nothing = np.zeros((1, 9, 8), bool)
    assert jaccard(nothing, truth, counted) == 0 and jaccard(nothing, nothing[0], counted) == 0


def test_a_mask_is_the_fewest_patches_that_hold_the_mass():
    maps = torch.tensor([[[0.5, 0.2], [0.2, 0.1]], [[0.1, 0.1], [0.1, 0.7]]])
    masks = attended(maps, 0.6, (4, 6))
    assert masks.shape == (2, 4, 6)
    assert masks[0, :2, :3].all() and masks[0].sum() == 12  # the largest, and one of the two next
    assert masks[1, 2:, 3:].all() and masks[1].sum() == 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VOC's folders with a bright object in each picture, and a backbone whose head 1 looks for it."""
    root = tmp_path_factory.mktemp("attention")
    base = root / "VOC2012"
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for number in range(4):
        pixels, mask = np.full((32, 48, 3), 20, np.uint8), np.zeros((32, 48), np.uint8)
        pixels[8:24, 8 * number : 8 * number + 16] = 240
        mask[8:24, 8 * number : 8 * number + 16] = 15
        mask[0] = 255
        for folder, values, kind in (("JPEGImages", pixels, "jpg"), ("SegmentationClass", mask, "png")):
            (base / folder).mkdir(exist_ok=True)
            Image.fromarray(values).save(base / folder / f"{number}.{kind}", quality=98)
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("0\n1\n2\n3\n")
    torch.manual_seed(0)
    vit = VisionTransformer(vit_config("vit_tiny", dim=32, heads=2, depth=1, patch=8, image_size=32))
    with torch.no_grad():
        block = vit.blocks[0]
        assert isinstance(block, Block) and vit.pos_embed is not None
        torch.nn.init.zeros_(vit.pos_embed)
        qkv = block.attn.qkv
        plain = [torch.full((1, 3, 8, 8), (value / 255 - 0.45) / 0.225) for value in (240, 20)]
        seen = [block.norm1(vit.patch_embed([image])[0][0, 0]) for image in plain]
        direction = seen[0] - seen[1]
        qkv.weight[16:32] = 0
        qkv.bias[16:32] = 0
        qkv.bias[16] = 1.0  # every query of head 1
        qkv.weight[32 + 16] = 4 * direction  # its keys: bright patches
    mean, std = vit.normalisation
    save_backbone(vit, None, root / "backbone", mean=mean, std=std, card={})
    return root


def test_the_head_that_looks_at_the_object_is_found(place, tmp_path):
    words = [str(place / "backbone"), "attention", f"data={place}", "size=32", f"output={tmp_path}"]
    main(words)
    (path,) = tmp_path.glob("results/*.json")
    result = json.loads(path.read_text())
    assert result["details"]["pictures"] == 4 and len(result["details"]["heads"]) == 2
    # The object is four patches; the fewest that hold 60% of equal shares are three of them.
    assert result["metrics"]["jaccard_one_head"] == pytest.approx(result["details"]["heads"][1])
    assert result["metrics"]["jaccard"] >= result["metrics"]["jaccard_one_head"] > 60
    assert "best head" in path.with_suffix(".html").read_text()
    with pytest.raises(UserError, match="has an object"):
        main([*words, "background=[0,15]"])
