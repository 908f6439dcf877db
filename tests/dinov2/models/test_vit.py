"""The vision transformer: packed equals separate, the published interface, initial weights, sizes."""

import logging

import dinov2.vision_ops  # noqa: F401  # for what its import does: timm imports torchvision

import pytest
import timm
import torch

from dinov2.exits import UserError
from dinov2.models.attention import SHORT, available_backends, choose_backend, packed_attention
from dinov2.models.config import SIZES, vit_config
from dinov2.models.vit import VisionTransformer
from tests.dinov2.models.weights import small_vit

CROPS = [(2, 64, 64), (3, 24, 40), (1, 32, 64)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def crops_and_masks(device: str = "cpu") -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    generator = torch.Generator().manual_seed(1)
    crops = [torch.randn(n, 3, h, w, generator=generator).to(device) for n, h, w in CROPS]
    masks = [torch.rand(2, 64, generator=generator).to(device) < 0.4, None, None]
    return crops, masks


def value_and_gradients(
    vit: VisionTransformer, batches: list[tuple[list[torch.Tensor], list[torch.Tensor | None]]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Features of all crops, and gradients of a function of them by pixels and parameters."""
    vit.zero_grad()
    pixels = [[crop.clone().requires_grad_() for crop in crops] for crops, _ in batches]
    features = [
        group
        for crops, (_, masks) in zip(pixels, batches, strict=True)
        for group in vit.forward_packed(crops, masks)
    ]
    outputs = [group[name] for group in features for name in group if name.startswith("x_")]
    torch.stack([output.float().pow(2).sin().sum() for output in outputs]).sum().backward()
    gradients = [crop.grad for crops in pixels for crop in crops] + [p.grad for p in vit.parameters()]
    return [output.detach() for output in outputs], [g for g in gradients if g is not None]


BACKEND_RUNS = [
    pytest.param(name, device, dtype, marks=pytest.mark.gpu if device == "cuda" else ())
    for name, device, dtype in [
        ("sdpa", "cpu", torch.float32),
        ("sdpa", "cpu", torch.bfloat16),
        ("sdpa", "cuda", torch.float32),
        ("sdpa", "cuda", torch.bfloat16),
        ("varlen", "cuda", torch.bfloat16),
        ("varlen", "cuda", torch.float16),
        ("xformers", "cuda", torch.float32),
        ("xformers", "cuda", torch.bfloat16),
    ]
]


def skip_if_missing(backend: str, device: str, dtype: torch.dtype) -> None:
    if backend not in available_backends(torch.device(device), dtype):
        pytest.skip(f"{backend} is not installed here, or not for {dtype}")


@pytest.mark.parametrize("position", ["release", "rope"])
@pytest.mark.parametrize(("backend", "device", "dtype"), BACKEND_RUNS)
def test_packed_crops_equal_separate_forwards(
    backend: str, device: str, dtype: torch.dtype, position: str
) -> None:
    skip_if_missing(backend, device, dtype)
    vit = small_vit(position=position).to(device)
    crops, masks = crops_and_masks(device)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        vit.attention_backend = "sdpa"
        separate = [([crop], [mask]) for crop, mask in zip(crops, masks, strict=True)]
        expected, expected_gradients = value_and_gradients(vit, separate)
        vit.attention_backend = backend
        packed, gradients = value_and_gradients(vit, [(crops, masks)])
    for ours, theirs in zip(packed + gradients, expected + expected_gradients, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("length", [20, SHORT + 1])
@pytest.mark.parametrize(("backend", "device", "dtype"), BACKEND_RUNS)
def test_attention_equals_float64(backend: str, device: str, dtype: torch.dtype, length: int) -> None:
    """In value and gradients, for crops on both sides of `SHORT`."""
    skip_if_missing(backend, device, dtype)
    groups = ((2, 37), (1, length))
    tokens = sum(count * length for count, length in groups)
    q, k, v, gradient = 1.5 * torch.randn(4, tokens, 3, 64, generator=torch.Generator().manual_seed(0))
    k = (q + k) / 2  # a token attends to itself first of all

    def run(device: str, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        inputs = [part.to(device, dtype, copy=True).requires_grad_() for part in (q, k, v)]
        output = packed_attention(inputs[0], inputs[1], inputs[2], groups, backend)
        gradients = torch.autograd.grad(output, inputs, gradient.to(device, dtype))
        return [result.double().cpu() for result in (output, *gradients)]

    for ours, exact in zip(run(device, dtype, backend), run("cpu", torch.float64, "sdpa"), strict=True):
        assert (ours - exact).norm() < TOLERANCE[dtype] * exact.norm()


def test_crops_do_not_see_each_other() -> None:
    q, k, v = torch.randn(3, 2, 30, 8, dtype=torch.float64)
    mask = torch.block_diag(*[torch.ones(length, length) for length in (7, 7, 16)]) == 1
    expected = (q @ k.mT / 8**0.5).masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v
    groups = ((2, 7), (1, 16))
    ours = packed_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), groups, "sdpa")
    assert torch.allclose(ours.transpose(0, 1), expected)


def test_local_crops_have_a_norm_of_their_own_in_training_alone() -> None:
    vit = small_vit(local_norm=True)
    assert vit.local_norm is not None and not torch.equal(vit.local_norm.weight, vit.norm.weight)
    crops = [torch.randn(2, 3, 64, 64), torch.randn(3, 3, 32, 32)]
    with torch.no_grad():
        seen = vit.forward_packed(crops)
        norms = [vit.norm, vit.norm]
        for features, norm in zip(seen, norms, strict=True):
            assert torch.allclose(features["x_norm_clstoken"], norm(features["x_prenorm"])[:, 0], atol=1e-6)
        for features, norm in zip(vit.train().forward_packed(crops), [vit.norm, vit.local_norm], strict=True):
            assert torch.allclose(features["x_norm_clstoken"], norm(features["x_prenorm"])[:, 0], atol=1e-6)


def test_the_choice_of_attention_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="dinov2.models.attention"):
        for _ in range(2):
            small_vit(depth=1)(torch.zeros(1, 3, 64, 64))
    assert [record.getMessage() for record in caplog.records] == [
        "attention over packed crops: sdpa (cpu, torch.float32)"
    ]


def test_masked_patches_do_not_reach_the_output_elsewhere() -> None:
    vit = small_vit()
    images = torch.randn(1, 3, 64, 64)
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 9] = True  # row 1, column 1
    changed = images.clone()
    changed[..., 8:16, 8:16] += 1
    with torch.no_grad():
        hidden = [vit.forward_features(x, mask)["x_prenorm"] for x in (images, changed)]
        seen = [vit.forward_features(x)["x_prenorm"] for x in (images, changed)]
    assert torch.equal(*hidden)
    assert not torch.allclose(*seen)


def test_the_published_interface() -> None:
    vit = small_vit()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        features = vit.forward_features(images)
        assert list(features) == [
            "x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm", "masks",
        ]  # fmt: skip
        shapes = [tuple(features[name].shape) for name in list(features)[:4]]
        assert shapes == [(2, 192), (2, 4, 192), (2, 24, 192), (2, 29, 192)]
        assert torch.equal(vit(images), features["x_norm_clstoken"])
        assert torch.equal(vit(images, is_training=True)["x_prenorm"], features["x_prenorm"])
        assert torch.equal(vit.forward_features([images], [None])[0]["x_prenorm"], features["x_prenorm"])

        (last,) = vit.get_intermediate_layers(images)
        assert torch.equal(last, features["x_norm_patchtokens"])
        two = vit.get_intermediate_layers(images, n=2, norm=False)
        assert torch.equal(two[1], features["x_prenorm"][:, 5:])
        by_index = vit.get_intermediate_layers(images, n=[1, 2], norm=False)
        assert all(map(torch.equal, two, by_index))
        ((maps, cls),) = vit.get_intermediate_layers(images, [2], reshape=True, return_class_token=True)
        assert maps.shape == (2, 192, 4, 6)
        assert torch.equal(maps.flatten(2).transpose(1, 2), last)
        assert torch.equal(cls, features["x_norm_clstoken"])

        tokens = vit.blocks[2](vit.get_intermediate_layers(images, [1], norm=False)[0])  # a plain batch
        assert tokens.shape == (2, 24, 192)


@pytest.mark.parametrize("position", ["release", "rope"])
def test_last_selfattention_is_what_the_last_block_uses(position: str) -> None:
    vit = small_vit(depth=1, position=position)
    images = torch.randn(2, 3, 32, 48)
    seen = {}
    attn = vit.get_submodule("blocks.0.attn")
    attn.get_submodule("proj").register_forward_hook(lambda _, inputs, __: seen.update(weighted=inputs[0]))
    attn.get_submodule("qkv").register_forward_hook(lambda _, __, output: seen.update(qkv=output))
    with torch.no_grad():
        vit(images)
        attention = vit.get_last_selfattention(images)
    values = seen["qkv"].view(2, 29, 3, 3, 64)[:, :, 2].transpose(1, 2)
    weighted = (attention @ values).transpose(1, 2).reshape(58, 192)
    assert attention.shape == (2, 3, 29, 29)
    assert torch.allclose(weighted, seen["weighted"], atol=1e-5)


def test_bf16_autocast_stays_near_float32() -> None:
    vit = small_vit()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = vit(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = vit(images)
    assert half.dtype == torch.float32  # the residual stream and its norm
    assert torch.nn.functional.cosine_similarity(exact, half).min() > 0.999


def test_initial_weights_after_the_meta_device() -> None:
    with torch.device("meta"):
        vit = VisionTransformer(vit_config("vit_tiny", registers=4))
    vit.to_empty(device="cpu")
    vit.init_weights(torch.Generator().manual_seed(3))
    again = VisionTransformer(vit_config("vit_tiny", registers=4))
    again.init_weights(torch.Generator().manual_seed(3))
    assert vit.weights_hash() == again.weights_hash()
    for name, parameter in vit.named_parameters():
        values = parameter.detach()
        if name.startswith("patch_embed"):  # torch's own of a convolution, which the published models kept
            bound = vit.patch_embed.proj.weight[0].numel() ** -0.5
            assert values.abs().max() <= bound, name
            assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
        elif name == "mask_token" or name.endswith("bias"):
            assert values.eq(0).all(), name
        elif name.endswith("gamma"):
            assert values.eq(1e-5).all(), name
        elif "norm" in name:
            assert values.eq(1).all(), name
        else:
            std = 1e-6 if name in ("cls_token", "register_tokens") else 0.02
            assert values.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(values.mean().item()) < 0.1 * std, name


TIMM = {
    "vit_tiny_patch16_224": ("vit_tiny", {"patch": 16, "layer_scale": 0.0}),
    "vit_small_patch14_dinov2": ("vit_small", {"image_size": 518}),
    "vit_base_patch14_dinov2": ("vit_base", {"image_size": 518}),
    "vit_large_patch14_reg4_dinov2": ("vit_large", {"image_size": 518, "registers": 4}),
    "vit_giant_patch14_dinov2": ("vit_giant", {"image_size": 518}),
}


@pytest.mark.parametrize("name", list(TIMM))
def test_parameter_counts_are_those_of_timm(name: str) -> None:
    size, over = TIMM[name]
    with torch.device("meta"):
        ours = VisionTransformer(vit_config(size, **over))
        theirs = timm.create_model(name, pretrained=False, num_classes=0)
    mask_token = ours.embed_dim  # timm has none
    no_position = ours.embed_dim if ours.num_register_tokens else 0  # and with registers none for CLS
    extra = mask_token + no_position
    assert count(ours) - extra == count(theirs)


def test_every_size_is_there_on_the_meta_device() -> None:
    """Millions of parameters, against what the papers say of their models (DINOv2, DINOv3, SoViT)."""
    published = {
        "vit_tiny": 5.5, "vit_small": 22, "vit_base": 86, "vit_large": 304,
        "vit_so400m": 412, "vit_huge_plus": 841, "vit_giant": 1135, "vit_7b": 6716,
    }  # fmt: skip
    for size in SIZES:
        with torch.device("meta"):
            vit = VisionTransformer(vit_config(size))
        assert count(vit) / 1e6 == pytest.approx(published[size], rel=0.02), size


@pytest.mark.parametrize("size", list(SIZES))
def test_parameters_are_as_many_as_the_closed_formula_says(size: str) -> None:
    config = vit_config(size, patch=16, registers=4, image_size=256)
    with torch.device("meta"):
        vit = VisionTransformer(config)
    dim, hidden = config.dim, config.hidden
    gated = 1 + (config.ffn == "swiglu")
    attention = 3 * dim * (dim + config.qkv_bias) + dim * (dim + 1)
    ffn = gated * hidden * (dim + 1) + dim * (hidden + 1)
    block = attention + ffn + 2 * 2 * dim + 2 * dim  # two norms, two LayerScales
    stem = dim * (16 * 16 * 3 + 1) + (1 + 4 + 1) * dim  # CLS, registers, mask token
    positions = 0 if config.position == "rope" else (1 + 16 * 16) * dim
    assert count(vit) == stem + positions + config.depth * block + 2 * dim
    assert vit.architecture()["position"] == ("rope" if size in ("vit_huge_plus", "vit_7b") else "release")


@pytest.mark.parametrize("name", ["vit_7b_patch16_dinov3", "vit_huge_plus_patch16_dinov3_qkvb"])
def test_parameter_counts_are_those_of_timms_dinov3(name: str) -> None:
    with torch.device("meta"):
        ours = VisionTransformer(vit_config(name.split("_patch")[0], patch=16, registers=4))
        theirs = timm.create_model(name, pretrained=False, num_classes=0)
    key_biases = ours.config.depth * ours.embed_dim if "qkvb" in name else 0
    assert count(ours) - ours.embed_dim - key_biases == count(theirs)  # without mask token


def test_what_cannot_be_built_says_so() -> None:
    for over in (
        {"position": "sine"},
        {"rope_rescale": 0.5},
        {"ffn": "conv"},
        {"heads": 5},
        {"drop_path": 1.0},
        {"dpeth": 2},
    ):
        with pytest.raises(UserError, match=next(iter(over))):
            vit_config("vit_tiny", **over)
    with pytest.raises(UserError, match="vit_smal"):
        vit_config("vit_smal")
    with pytest.raises(ValueError, match="patches of 8"):
        small_vit()(torch.zeros(1, 3, 60, 64))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
