"""Our ViT with others' weights gives their features. Each test names the position convention."""

from pathlib import Path
from typing import Any

import dinov2.vision_ops  # noqa: F401  # for what its import does: timm imports torchvision

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from dinov2.models.backbone import Backbone
from dinov2.models.load import load_backbone
from dinov2.models.vit import VisionTransformer
from tests.dinov2.models.weights import randomise, small_vit

SIZES = [(224, 224), (196, 308)]  # none is the native grid of 37 x 37, so positions are resized


def ours(theirs: nn.Module, folder: Path, architecture: str) -> VisionTransformer:
    """Our backbone from a weights file of theirs."""
    path = folder / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, path)
    backbone = load_backbone(f"{path}?architecture={architecture}")
    assert isinstance(backbone, VisionTransformer)
    return backbone


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def pictures(size: tuple[int, int]) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "architecture", "over"),
    [
        ("vit_small_patch14_dinov2", "vit_small/14", {}),
        ("vit_small_patch14_reg4_dinov2", "vit_small/14", {}),
        ("vit_giant_patch14_reg4_dinov2", "vit_small/14&ffn=swiglu&depth=2",
         {"embed_dim": 384, "num_heads": 6, "depth": 2}),
    ],
    ids=["vits14", "vits14_reg4", "swiglu_reg4"],
)  # fmt: skip
def test_features_are_timms_by_its_exact_antialias_convention(
    name: str, architecture: str, over: dict[str, Any], tmp_path: Path
) -> None:
    theirs: Any = timm.create_model(
        name, pretrained=False, num_classes=0, dynamic_img_size=True, **over
    ).eval()
    randomise(theirs)
    vit = ours(theirs, tmp_path, architecture)
    assert vit.config.position == "exact_antialias"
    assert vit.config.image_size == 518
    assert vit.num_register_tokens == (4 if "reg4" in name else 0)
    for size in SIZES:
        images = pictures(size)
        features = vit.forward_features(images)
        expected, maps = theirs.forward_intermediates(images, indices=2, norm=True)
        tokens = ["x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens"]
        cls, registers, patches = (features[token] for token in tokens)
        assert difference(torch.cat([cls[:, None], registers, patches], dim=1), expected) < 1e-4
        for mine, map_ in zip(vit.get_intermediate_layers(images, 2, reshape=True), maps, strict=True):
            assert difference(mine, map_) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_another_convention_gives_other_features(size: tuple[int, int], tmp_path: Path) -> None:
    """So that the comparisons above would notice."""
    theirs: Any = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True, depth=2
    ).eval()
    randomise(theirs)
    expected = theirs.forward_features(pictures(size))[:, 0]
    for convention in ("exact", "release"):
        vit = ours(theirs, tmp_path, f"vit_small/14&depth=2&position={convention}")
        assert difference(vit(pictures(size)), expected) > 1e-3


TRANSFORMERS = {
    "exact": (Dinov2Config, Dinov2Model),
    "exact_antialias": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
}


@torch.no_grad()
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("convention", list(TRANSFORMERS))
def test_features_are_those_of_transformers_by_its_convention(
    convention: str, ffn: str, tmp_path: Path
) -> None:
    """`exact` for Dinov2Model, `exact_antialias` for Dinov2WithRegistersModel."""
    make_config, make_model = TRANSFORMERS[convention]
    theirs = make_model(
        make_config(
            hidden_size=384, num_attention_heads=6, num_hidden_layers=3,
            image_size=518, patch_size=14, use_swiglu_ffn=ffn == "swiglu",
        )
    ).eval()  # fmt: skip
    randomise(theirs)
    architecture = f"vit_small/14&depth=3&ffn={ffn}"
    in_memory = ours(theirs, tmp_path, architecture)
    theirs.save_pretrained(tmp_path)  # under the keys of the published files
    vit = load_backbone(tmp_path / "model.safetensors", architecture=architecture)
    assert isinstance(vit, VisionTransformer)
    assert vit.config.position == in_memory.config.position == convention
    assert vit.weights_hash() == in_memory.weights_hash()
    for size in SIZES:
        images = pictures(size)
        features = vit.forward_features(images)
        expected = theirs(images).last_hidden_state
        assert difference(features["x_norm_clstoken"], expected[:, 0]) < 1e-4
        assert difference(features["x_norm_patchtokens"], expected[:, 1 + vit.num_register_tokens :]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_rotary_features_are_those_of_transformers_dinov3(gated: bool, tmp_path: Path) -> None:
    """Position convention `rope`, on grids of several shapes."""
    theirs = DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=384, num_attention_heads=6, num_hidden_layers=3, num_register_tokens=4,
            patch_size=16, use_gated_mlp=gated, intermediate_size=1024 if gated else 1536,
            hidden_act="silu" if gated else "gelu",
        )
    ).eval()  # fmt: skip
    randomise(theirs)
    vit = ours(theirs, tmp_path, f"vit_small/16&depth=3&ffn={'swiglu' if gated else 'mlp'}")
    assert vit.config.position == "rope"
    for size in [(224, 224), (160, 320), (16, 48)]:
        features = vit.forward_features(pictures(size))
        expected = theirs(pictures(size)).last_hidden_state
        assert difference(features["x_norm_clstoken"], expected[:, 0]) < 1e-4
        assert difference(features["x_norm_patchtokens"], expected[:, 5:]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "ffn"), [("vit_small_patch16_dinov3_qkvb", "mlp"), ("vit_huge_plus_patch16_dinov3", "swiglu")]
)
def test_rotary_features_are_those_of_timms_dinov3(name: str, ffn: str, tmp_path: Path) -> None:
    """Position convention `rope`, with and without biases of queries and values."""
    over: dict[str, Any] = {"embed_dim": 384, "num_heads": 6, "depth": 3}
    theirs: Any = timm.create_model(name, num_classes=0, dynamic_img_size=True, **over).eval()
    randomise(theirs)
    ratio = 4.0 if ffn == "mlp" else 6.0
    vit = ours(theirs, tmp_path, f"vit_small/16&depth=3&ffn={ffn}&ffn_ratio={ratio}")
    for size in [(224, 224), (160, 320)]:
        features, expected = vit.forward_features(pictures(size)), theirs.forward_features(pictures(size))
        assert difference(features["x_norm_patchtokens"], expected[:, 5:]) < 1e-4
        assert difference(features["x_norm_clstoken"], expected[:, 0]) < 1e-4


def test_published_keys_also_inside_a_training_checkpoint(tmp_path: Path) -> None:
    vit = small_vit()
    weights = vit.state_dict()
    torch.save(weights, tmp_path / "plain.pth")
    chunked = {f"backbone.{n.replace('blocks.', 'blocks.1.')}": weight for n, weight in weights.items()}
    heads = {"dino_head.mlp.0.weight": torch.zeros(2, 2)}
    student = {name: weight + 1 for name, weight in chunked.items()}
    torch.save({"teacher": chunked | heads, "student": student}, tmp_path / "run.pth")
    loaded = [
        load_backbone(tmp_path / name, architecture="vit_tiny/8&depth=3") for name in ("plain.pth", "run.pth")
    ]
    assert {backbone.weights_hash() for backbone in loaded} == {vit.weights_hash()}
    assert {position(backbone) for backbone in loaded} == {"exact_antialias"}  # of the register models
    del weights["register_tokens"]
    torch.save(weights, tmp_path / "plain.pth")
    without = load_backbone(tmp_path / "plain.pth", architecture="vit_tiny/8&depth=3")
    assert position(without) == "release"


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    weights = {name: tensor.half() for name, tensor in small_vit().state_dict().items()}
    save_file(weights, tmp_path / "half.safetensors")
    backbone = load_backbone(tmp_path / "half.safetensors", architecture="vit_tiny/8&depth=3")
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert load_file(tmp_path / "half.safetensors")["cls_token"].dtype == torch.float16


def position(backbone: Backbone) -> str:
    return backbone.architecture()["position"]
