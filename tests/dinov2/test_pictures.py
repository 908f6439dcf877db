"""Attention maps and patch colours show what the tensors say."""

import numpy as np
import pytest
import torch

from dinov2.exits import UserError
from dinov2.models import load_backbone
from dinov2.models.config import vit_config
from dinov2.models.timm_backbone import TimmBackbone
from dinov2.models.vit import VisionTransformer
from dinov2.pictures import attention, attention_maps, most_attended, patch_colours
from tests.pictures import picture


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    config = vit_config("vit_tiny", depth=2, patch=16, image_size=64, registers=2)
    return VisionTransformer(config).eval().requires_grad_(False)


def test_attention_is_that_of_the_cls_token_to_each_patch_in_place(backbone):
    image = picture(0, 0, (96, 64))
    maps = attention(backbone, image)
    assert maps.shape == (3, 4, 6)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in backbone.normalisation)
    whole = backbone.get_last_selfattention((pixels - mean) / std)
    assert torch.allclose(whole.sum(-1), torch.ones(1, 3, 27))
    assert torch.allclose(maps.flatten(1), whole[0, :, 0, 3:], atol=1e-6)


def test_attention_maps_are_as_large_as_the_picture_and_one_a_head(backbone):
    image = picture(0, 0, (130, 70))
    maps = attention_maps(backbone, image, mass=0.6)
    assert [one.size for one in maps] == [(130, 70)] * 3
    weights = attention(backbone, image)
    kept = most_attended(weights, 0.6)
    share = (weights * kept).flatten(1).sum(1) / weights.flatten(1).sum(1)
    smallest = torch.where(kept > 0, weights, torch.inf).flatten(1).amin(1) / weights.flatten(1).sum(1)
    assert (share >= 0.6).all()
    assert (share - smallest < 0.6).all()
    black = np.array(maps[0]).max(axis=2) < 30
    assert black.mean() == pytest.approx(1 - float(kept[0].mean()), abs=0.1)


def test_equal_pictures_get_equal_colours_and_different_ones_others(backbone):
    one, other = picture(0, 0, (96, 64)), picture(1, 5, (64, 96))
    colours = [np.array(image) for image in patch_colours(backbone, [one, one, other])]
    assert colours[0].shape == (64, 96, 3)
    assert colours[2].shape == (96, 64, 3)
    assert np.array_equal(colours[0], colours[1])
    assert len(np.unique(colours[2].reshape(-1, 3), axis=0)) > 10
    shown = patch_colours(backbone, [one, other], foreground=True)
    front = np.stack([np.array(image).reshape(-1, 3) for image in shown])
    assert 0 < (front.max(axis=2) == 0).mean() < 1


def test_attention_of_a_timm_backbone_is_what_its_queries_and_keys_say():
    backbone = load_backbone("timm:vit_tiny_patch16_224?seed=1")
    assert isinstance(backbone, TimmBackbone)
    inner, inputs = backbone.model.blocks[-1].attn, []
    inner.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    maps = attention(backbone, picture(0, 0, (48, 32)), size=32)
    q, k, _ = inner.qkv(inputs[0][0]).unflatten(1, (3, 3, 64)).permute(1, 2, 0, 3)
    reference = (q[:, :1] @ k.transpose(1, 2) / 8).softmax(2)[:, 0, 1:].view(3, 2, 3)
    torch.testing.assert_close(maps, reference)
    assert inner.fused_attn
    with pytest.raises(UserError, match="no self-attention of a CLS token"):
        attention(load_backbone("timm:resnet10t"), picture(0, 0))
