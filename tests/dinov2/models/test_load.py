"""Backbones by a word: folders that were exported, timm models, weights files, and what is none of them."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from dinov2.exits import NoProgress, UserError
from dinov2.export import save_backbone
from dinov2.features import BackboneEmbedder
from dinov2.models import load_backbone
from dinov2.models.backbone import Backbone
from tests.dinov2.models.weights import CopyDetector, small_vit, trace

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def export(backbone: Backbone, folder: Path) -> dict[str, bytes]:
    save_backbone(backbone, None, folder, mean=MEAN, std=STD, card={"steps": 10})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["vit", "resnet10t"])
def test_an_exported_backbone_comes_back(name: str, tmp_path: Path) -> None:
    backbone = small_vit(position="exact") if name == "vit" else load_backbone(f"timm:{name}")
    files = export(backbone, tmp_path / "backbone")
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert files == export(backbone, tmp_path / "again")  # the same bytes
    loaded = load_backbone(str(tmp_path / "backbone"))
    assert loaded.architecture() == backbone.architecture()
    assert loaded.normalisation == (MEAN, STD)
    assert loaded.weights_hash() == backbone.weights_hash()
    assert (loaded.embed_dim, loaded.patch_size) == (backbone.embed_dim, backbone.patch_size)
    assert loaded.image_size == backbone.image_size
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(loaded(images), backbone(images))


def test_the_model_card_states_the_essentials(tmp_path: Path) -> None:
    card = export(small_vit(), tmp_path / "backbone")["README.md"].decode()
    for line in ("- steps: 10", "| position | release |", "| mean | [0.4, 0.5, 0.6] |", "| patch size | 8 |"):
        assert line in card


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    vit = small_vit()
    export(vit, tmp_path / "backbone")
    with torch.no_grad():
        vit.get_parameter("blocks.1.norm1.weight")[3] = float("inf")
    before = (tmp_path / "backbone" / "model.safetensors").read_bytes()
    with pytest.raises(NoProgress, match=r"blocks\.1\.norm1\.weight"):
        export(vit, tmp_path / "backbone")
    assert (tmp_path / "backbone" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["backbone"]


def test_the_hash_depends_on_names_shapes_and_bytes() -> None:
    assert small_vit().weights_hash() == small_vit().weights_hash()
    changed, reshaped = small_vit(), small_vit()
    with torch.no_grad():
        changed.cls_token[0, 0, 0] += 1e-3
    reshaped.mask_token.data = reshaped.mask_token.data[None]
    assert len({vit.weights_hash() for vit in (small_vit(), changed, reshaped)}) == 3


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "resnet10t", "convnext_atto", "vit_tiny_r_s16_p8_224"]
)
def test_timm_models_answer_to_the_interface(name: str) -> None:
    state = torch.get_rng_state()
    backbone = load_backbone(f"timm:{name}?seed=3")
    assert torch.equal(state, torch.get_rng_state())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        features = backbone.forward_features(images)
        side = 224 // backbone.patch_size
        assert features["x_norm_clstoken"].shape == (2, backbone.embed_dim)
        assert features["x_norm_patchtokens"].shape == (2, side * side, backbone.embed_dim)
        assert torch.equal(backbone(images), features["x_norm_clstoken"])
        pooled = timm_model(backbone)(images)  # without a classifier: what it would get
        assert torch.allclose(features["x_norm_clstoken"], pooled, atol=1e-5)
        assert len(backbone.get_intermediate_layers(images, n=backbone.n_blocks)) == backbone.n_blocks
        pairs = backbone.get_intermediate_layers(images, n=2, reshape=True, return_class_token=True)
        assert pairs[-1][0].shape == (2, backbone.embed_dim, side, side)
        assert pairs[-1][1].shape == (2, backbone.embed_dim)
        crops = backbone.forward_packed([images, images[:, :, :224, :224]])
        assert torch.allclose(crops[1]["x_norm_clstoken"], features["x_norm_clstoken"], atol=1e-5)
    assert backbone.weights_hash() == load_backbone(f"timm:{name}?seed=3").weights_hash()
    assert backbone.weights_hash() != load_backbone(f"timm:{name}").weights_hash()


def test_untrained_timm_has_no_patch_loss() -> None:
    backbone = load_backbone("timm:resnet10t")
    with pytest.raises(UserError, match="mask token"):
        backbone.forward_features(torch.zeros(1, 3, 64, 64), torch.ones(1, 4, dtype=torch.bool))


def test_what_cannot_be_loaded_says_what_to_do(tmp_path: Path) -> None:
    export(small_vit(), tmp_path / "backbone")
    weights = tmp_path / "backbone" / "model.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": print}, protocol=2))
    (tmp_path / "text.txt").write_text("")
    old, broken = tmp_path / "old", tmp_path / "broken"
    for folder, change in (
        (old, {"format_version": 9}),
        (broken, {"architecture": {"kind": "vit", "dim": 8}}),
    ):
        folder.mkdir()
        config = json.loads((tmp_path / "backbone" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "backbone").mkdir(parents=True)
    cases = {
        "timm:resnt50": "did you mean resnet50",
        "timm:resnet18?sed=1": "sed",
        "timm:resnet18?seed=x": "seed=x",
        str(tmp_path / "nothing"): "no backbone at",
        str(tmp_path / "empty"): "is no backbone, it has no config.json; name the backbone/ of a run",
        str(tmp_path / "run"): f"did you mean {tmp_path}/run/backbone",
        str(old): "format version 9",
        str(broken): "does not describe a backbone",
        f"{tmp_path / 'backbone'}?position=exact": "states its architecture itself",
        str(weights): "name the architecture",
        f"{weights}?architecture=vit_tinny/8": "unknown architecture 'vit_tinny'",
        f"{weights}?architecture=vit_tiny/eight": "patch=eight",
        f"{weights}?architecture=vit_tiny/8&depht=3": "depht",
        f"{weights}?architecture=vit_tiny/8": r"126 missing: blocks\.3\.norm1\.weight, .*, .*, …",
        f"{weights}?architecture=vit_tiny/8&depth=2": r"14 unexpected: blocks\.2",
        f"{weights}?architecture=vit_tiny/16&depth=3": r"1 of another shape: patch_embed\.proj\.weight",
        f"{tmp_path / 'cut.safetensors'}?architecture=vit_tiny/8": "cannot be read",
        f"{tmp_path / 'evil.pth'}?architecture=vit_tiny/8": "holds more than tensors",
        f"{tmp_path / 'text.txt'}?architecture=vit_tiny/8": "no weights file",
    }
    for spec, words in cases.items():
        with pytest.raises(UserError, match=words):
            load_backbone(spec)


def test_a_torchscript_file_gives_its_vectors(tmp_path: Path) -> None:
    copies = CopyDetector().eval()
    path = trace(copies, tmp_path / "copies.torchscript.pt", 96)
    backbone = load_backbone(f"{path}?image_size=96&mean=0.5,0.5,0.4&std=1,1,1")
    assert (backbone.embed_dim, backbone.image_size, backbone.normalisation[0]) == (24, 96, (0.5, 0.5, 0.4))
    images = torch.randn(3, 3, 80, 112)  # another size and number than were traced
    with torch.no_grad():
        assert torch.allclose(backbone(images), copies(images), atol=1e-6)
    frozen = tmp_path / "frozen.pt"
    torch.jit.freeze(torch.jit.load(path)).save(str(frozen))
    with torch.no_grad():
        assert torch.allclose(load_backbone(frozen)(images), copies(images), atol=1e-5)
    copies.project.bias.data += 1
    other = trace(copies, tmp_path / "other.pt", 96)
    assert len({load_backbone(one).weights_hash() for one in (path, frozen, other)}) == 3
    batch = torch.zeros(2, 3, 96, 96, dtype=torch.uint8)
    assert BackboneEmbedder(backbone, size=96)(batch).shape == (2, 24)
    with pytest.raises(UserError, match="no patch tokens"):
        BackboneEmbedder(backbone, size=96, token="cls+mean")
    with pytest.raises(UserError, match="no patch tokens"):
        backbone.get_intermediate_layers(images)
    fixed = trace(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 4)), tmp_path / "fixed", 8)
    assert load_backbone(f"{fixed}?image_size=8").embed_dim == 4
    cut = tmp_path / "cut.pt"
    cut.write_bytes(Path(path).read_bytes()[:5000])
    cases = {
        fixed: r"takes no pictures of 224 x 224; name the side: \?image_size=",
        f"{path}?architecture=vit_small/14": "not architecture",
        f"{path}?mean=0.5": "mean=0.5 is not three numbers",
        f"{cut}?architecture=vit_small/14": "cannot be read",
    }
    for spec, words in cases.items():
        with pytest.raises(UserError, match=words):
            load_backbone(spec)


def timm_model(backbone: Backbone) -> torch.nn.Module:
    return backbone.get_submodule("model")
