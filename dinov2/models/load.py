"""Backbones from a word: a folder that we wrote, a timm model, a file of weights or of TorchScript."""

import pickle
from collections.abc import Mapping
from dataclasses import fields
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dinov2.exits import UserError
from dinov2.files import read_json
from dinov2.models.backbone import IMAGENET, Backbone
from dinov2.models.config import AnyConfig, DescriptorConfig, TimmConfig, ViTConfig, vit_config
from dinov2.models.published import Weights, position_convention, to_published, unwrapped
from dinov2.models.script import ScriptBackbone, is_script
from dinov2.models.vit import VisionTransformer

FORMAT_VERSION = 1  # of a backbone folder
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WORDS = {"true": True, "false": False, "yes": True, "no": False}


def load_backbone(
    spec: str | Path, *, device: torch.device | str = "cpu", architecture: str | None = None
) -> Backbone:
    """A backbone in evaluation mode, without gradients, on `device`. (To fine-tune it: `.requires_grad_()`.)

    Args:
        spec: a folder written by `dinov2.export`; `timm:NAME`, `timm:NAME?seed=1` or `timm:NAME?pretrained`;
            or a file of weights (.safetensors, .pth) in the published DINOv2, timm's or transformers' keys,
            with the architecture: `weights.pth?architecture=vit_small/14`. Fields of `ViTConfig` may follow,
            such as `&position=exact`. Registers, image size and position convention are those of the weights
            where they are not given. Or a TorchScript file that makes a vector of a picture, as SSCD is
            published, with `?image_size=320&mean=0.5,0.5,0.5&std=0.5,0.5,0.5` where it differs from 224
            pixels and ImageNet's statistics.
        architecture: the same as the words from `architecture=` on, for where it is not in the spec.

    Raises:
        UserError: there is nothing there, or the weights do not fit the architecture.
    """
    location, _, text = str(spec).partition("?")
    options = _options(text)
    if architecture is not None:
        options |= _options(f"architecture={architecture}")
    if location.startswith("timm:"):
        backbone = _from_timm(location.removeprefix("timm:"), options)
    elif Path(location).is_dir():
        backbone = _from_folder(Path(location), options)
    elif Path(location).is_file():
        backbone = _from_file(Path(location), options)
    else:
        raise UserError(
            f"no backbone at {location!r}: give a backbone folder, timm:NAME, a TorchScript file, "
            "or a weights file with ?architecture="
        )
    return backbone.eval().requires_grad_(False).to(device)


def _options(text: str) -> dict[str, str]:
    """`a=1&b` as a dict; a word by itself is true."""
    pairs = (word.partition("=") for word in text.split("&") if word)
    return {name: value if equals else "true" for name, equals, value in pairs}


def _from_timm(name: str, options: dict[str, str]) -> Backbone:
    from dinov2.models.timm_backbone import TimmBackbone

    kinds = {"pretrained": bool, "seed": int}
    if unknown := [key for key in options if key not in kinds]:
        raise UserError(f"timm:{name} takes ?pretrained or ?seed=NUMBER, not {', '.join(unknown)}")
    settings = {key: _parsed(f"timm:{name}", key, value, kinds[key]) for key, value in options.items()}
    return TimmBackbone(name, **settings)


def _from_folder(folder: Path, options: dict[str, str]) -> Backbone:
    if options:
        raise UserError(f"{folder} states its architecture itself; leave out ?{'&'.join(options)}")
    if not (folder / "config.json").exists():
        inner = folder / "backbone"  # a run's
        hint = f"did you mean {inner}?" if inner.is_dir() else "name the backbone/ of a run"
        raise UserError(f"{folder} is no backbone, it has no config.json; {hint}")
    config = read_json(folder / "config.json")
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has format version {version}, this program reads {FORMAT_VERSION}")
    try:
        backbone = from_architecture(config["architecture"])
        backbone.normalisation = tuple(config["normalisation"]["mean"]), tuple(config["normalisation"]["std"])
        backbone.value_range = tuple(config.get("value_range", ()))
        backbone.image_size = config["image_size"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} does not describe a backbone: {error}") from None
    fill(backbone, _read(folder / "model.safetensors"), str(folder))
    return backbone


def from_architecture(architecture: Mapping[str, Any]) -> Backbone:
    """The module that `Backbone.architecture` describes, its weights not yet filled in."""
    return make_backbone(_config_of(architecture))


def _config_of(architecture: Mapping[str, Any]) -> AnyConfig:
    fields = dict(architecture)
    match fields.pop("kind"):
        case "timm":
            return TimmConfig(**fields)
        case "descriptor":
            inner = _config_of(fields.pop("inner"))
            if isinstance(inner, DescriptorConfig):
                raise ValueError("a descriptor of a descriptor")
            return DescriptorConfig(inner=inner, dimension=fields["dimension"], pooling=fields["pooling"])
        case _:
            return ViTConfig(**fields)


def make_backbone(config: AnyConfig, seed: int = 0) -> Backbone:
    """A fresh backbone: ours on the meta device, a model of timm's with its initial weights on the CPU."""
    if isinstance(config, DescriptorConfig):
        from dinov2.models.descriptor import DescriptorBackbone

        inner = make_backbone(config.inner, seed)
        with torch.device("meta"):
            return DescriptorBackbone(inner, config.dimension, config.pooling)
    if isinstance(config, ViTConfig):
        with torch.device("meta"):
            return VisionTransformer(config)
    from dinov2.models.timm_backbone import TimmBackbone

    backbone = TimmBackbone(config.name, seed=seed, channels=config.channels, drop_path=config.drop_path)
    backbone.image_size = config.image_size or backbone.image_size
    return backbone


def _from_file(path: Path, options: dict[str, str]) -> Backbone:
    if is_script(path):
        return _from_script(path, options)
    if "architecture" not in options:
        raise UserError(f"{path}: name the architecture, for example {path}?architecture=vit_small/14")
    source = unwrapped(_read(path))
    weights = to_published(source)
    size, _, patch = options.pop("architecture").partition("/")
    if patch:
        options["patch"] = patch
    kinds = {field.name: field.type for field in fields(ViTConfig)}
    given = {key: _parsed(str(path), key, value, kinds.get(key, str)) for key, value in options.items()}
    settings = _implied(source, weights, given.get("patch", ViTConfig.patch)) | given
    with torch.device("meta"):
        backbone = VisionTransformer(vit_config(size, **settings))
    fill(backbone, weights, str(path))
    return backbone


def _from_script(path: Path, options: dict[str, str]) -> Backbone:
    kinds = {"image_size": int, "mean": _floats, "std": _floats}
    if unknown := [key for key in options if key not in kinds]:
        raise UserError(
            f"{path} is TorchScript: it takes ?image_size=, mean= and std=, not {', '.join(unknown)}"
        )
    given = {key: _parsed(str(path), key, value, kinds[key]) for key, value in options.items()}
    normalisation = given.get("mean", IMAGENET[0]), given.get("std", IMAGENET[1])
    return ScriptBackbone(path, given.get("image_size", 224), normalisation)


def _floats(text: str) -> tuple[float, ...]:
    """Three numbers, for the channels of RGB."""
    values = tuple(float(word) for word in text.split(","))
    if len(values) != 3:
        raise ValueError(text)
    return values


def _implied(source: Weights, weights: Weights, patch: int) -> dict[str, Any]:
    """What the weights say of their architecture by themselves."""
    settings: dict[str, Any] = {"position": position_convention(source)}
    if settings["position"] == "rope":  # only DINOv3's weights, others have another epsilon
        settings |= {"norm_eps": 1e-5, "qkv_bias": "blocks.0.attn.qkv.bias" in weights}
    if "register_tokens" in weights:
        settings["registers"] = weights["register_tokens"].shape[1]
    if "pos_embed" in weights:
        settings["image_size"] = isqrt(weights["pos_embed"].shape[1] - 1) * patch
    return settings


def _parsed(where: str, key: str, value: str, kind: Any) -> Any:
    try:
        return WORDS[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        wanted = "three numbers" if kind is _floats else f"of type {kind.__name__}"
        raise UserError(f"{where}: {key}={value} is not {wanted}") from None


def _read(path: Path) -> dict[str, Any]:
    """A file of tensors. Pickles are opened only as far as they hold nothing but tensors."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no weights file: known are {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors and is not opened; save its weights alone") from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from None
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"{path} holds no dictionary of weights")
    return dict(checkpoint)


def fill(module: nn.Module, weights: Weights, where: str) -> None:
    """Put weights into a module, float32, all of them or none.

    Raises:
        UserError: a key is missing or unexpected or has another shape; the first three are named.
    """
    expected = module.state_dict()
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {list(weights[name].shape)} for {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    said = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for what, names in problems.items()
        if names
    ]
    if said:
        raise UserError(f"{where} does not fit the architecture: weights {'; '.join(said)}")
    as_float = {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}
    module.load_state_dict(as_float, assign=True)
