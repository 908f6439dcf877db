"""Image classifiers of others by path, whose probability of one class is a picture's score.

Three forms: a folder in the form of transformers or of timm (`config.json` beside `model.safetensors`), or a
TorchScript file that takes normalised [n, 3, size, size] and gives logits. Nothing is downloaded.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curation.config import ClassifierConfig
from dinov2.exits import UserError
from dinov2.files import read_json, sha256_of

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
BATCH = 32

Logits = Callable[["torch.Tensor"], "torch.Tensor"]
Prepare = Callable[[Image.Image], "torch.Tensor"]


def check_file(key: str, path: Path, expected: str | None) -> None:
    """Raises UserError unless the file is there and has this SHA-256."""
    if not path.is_file():
        raise UserError(f"{key}: there is no {path}")
    if not expected:
        raise UserError(f"{key}: give the SHA-256 of {path} beside it, as {key.rpartition('.')[0]}.sha256=…")
    found = sha256_of(path)
    if found != expected.lower():
        raise UserError(f"{key}: {path} has SHA-256 {found}, not {expected}: it is another file, or damaged")


def check(name: str, settings: ClassifierConfig) -> None:
    """Raises UserError for a classifier that could not score, before anything is read."""
    key = f"filters.classifiers.{name}.model"
    if not settings.model:
        raise UserError(f"{key}= is missing: a folder of a transformers or timm classifier, or TorchScript")
    path = Path(settings.model)
    check_file(key, path / WEIGHTS if path.is_dir() else path, settings.sha256)
    Classifier(name, settings, "cpu")


class Classifier:
    """Scores pictures: the softmax's value of one class, rounded to four digits."""

    def __init__(self, name: str, settings: ClassifierConfig, device: str) -> None:
        import torch  # imported here: what does not filter starts without it

        path = Path(settings.model)
        self._device = torch.device(device)
        load = (
            _script
            if path.is_file()
            else _timm
            if "architecture" in read_json(path / "config.json")
            else _transformers
        )
        model, self._prepare, labels = load(path, settings)
        self._model: Any = model.eval().to(self._device)
        self._label = _place(name, settings.label, labels)

    def __call__(self, pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
        """[n] scores."""
        import torch

        scores = [np.zeros(0, np.float32)]
        for at in range(0, len(pictures), BATCH):
            batch = torch.stack([self._prepare(picture) for picture in pictures[at : at + BATCH]])
            with torch.no_grad():
                found = self._model(batch.to(self._device))
            logits = getattr(found, "logits", found).float()
            scores.append(logits.softmax(dim=1)[:, self._label].cpu().numpy())
        return np.concatenate(scores).round(4)


def _place(name: str, label: str, labels: dict[int, str] | None) -> int:
    """The number of the class called so."""
    places = {} if labels is None else {word: place for place, word in labels.items()}
    if label in places:
        return places[label]
    if label.isdigit() and (labels is None or int(label) in labels):
        return int(label)
    known = f"; it has {', '.join(list(places)[:8])}" if places else "; give its number"
    raise UserError(f"filters.classifiers.{name}.label={label}: the model has no such class{known}")


def _script(path: Path, settings: ClassifierConfig) -> tuple[Any, Prepare, None]:
    import torch

    try:
        model = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is no TorchScript file: {str(error).splitlines()[0]}") from None
    return model, _square(settings.size or 224, settings.mean, settings.std), None


def _timm(path: Path, settings: ClassifierConfig) -> tuple[Any, Prepare, dict[int, str] | None]:
    import dinov2.vision_ops  # noqa: F401  # before timm

    import timm
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    config = read_json(path / "config.json")
    try:
        model = timm.create_model(f"local-dir:{path}", pretrained=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read as a timm model: {str(error).splitlines()[0]}") from None
    transform: Any = create_transform(**resolve_data_config({}, model=model), is_training=False)
    names = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    return model, transform, dict(enumerate(names)) if names else None


def _transformers(path: Path, settings: ClassifierConfig) -> tuple[Any, Prepare, dict[int, str] | None]:
    try:
        import dinov2.vision_ops  # noqa: F401  # transformers imports torchvision

        from transformers import AutoModelForImageClassification
    except ImportError:
        raise UserError(f"{path} is a model of transformers': pip install transformers") from None
    try:
        model = AutoModelForImageClassification.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read as a classifier: {str(error).splitlines()[0]}") from None
    told = (
        read_json(path / "preprocessor_config.json") if (path / "preprocessor_config.json").exists() else {}
    )
    size = told.get("size", {})
    side = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")
    mean, std = told.get("image_mean", settings.mean), told.get("image_std", settings.std)
    prepare = _square(settings.size or side or 224, mean, std, resample=told.get("resample", 2))
    labels = {int(place): name for place, name in model.config.id2label.items()}
    return model, prepare, labels


def _square(side: int, mean: Sequence[float], std: Sequence[float], *, resample: int = 2) -> Prepare:
    """The whole picture as a square, normalised, as transformers' ViTImageProcessor has it."""
    import torch

    def prepare(picture: Image.Image) -> "torch.Tensor":
        small = picture.resize((side, side), Image.Resampling(resample))
        pixels = torch.from_numpy(np.array(small, np.float32)) / 255
        return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)

    return prepare
