"""Student and teacher through training: classification by nearest neighbours on labelled pictures."""

from pathlib import Path

import torch

from dinov2.data.sources import Source, open_source
from dinov2.exits import UserError
from dinov2.features import BackboneEmbedder, embed_array
from dinov2.models.backbone import Backbone
from dinov2.neighbours import knn_classify
from dinov2.parallel import is_main
from dinov2.ssl.networks import whole_backbone
from dinov2.train.config import TrainConfig
from dinov2.train.state import State


class KnnWatch:
    """The k-NN accuracy of both networks every so many steps, if labelled sources are given."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device, self.workers = config.knn, device, config.workers
        if bool(self.config.train) != bool(self.config.test):
            raise UserError("k-NN while training needs both knn.train= and knn.test=")
        cache = Path(config.cache) if config.cache else None
        names = ("train", "test") if self.config.train else ()
        self.sources = [_labelled(getattr(self.config, name), f"knn.{name}", cache) for name in names]

    def due(self, step: int, steps: int) -> bool:
        every = self.config.every
        return bool(self.sources) and (step == steps or (every > 0 and step % every == 0))

    def of(self, state: State) -> dict[str, float]:
        """Top-1 accuracy in percent as `knn.student` and `knn.teacher`; empty without sources."""
        if not self.sources:
            return {}
        networks = [whole_backbone(branch) for branch in (state.teacher, state.student)]
        if not is_main():
            return {}
        teacher = self._accuracy(networks[0])
        student = self._accuracy(networks[1]) if state.step else teacher  # equal at the start
        return {"knn.teacher": teacher, "knn.student": student}

    def _accuracy(self, backbone: Backbone) -> float:
        training = backbone.training
        embedder = BackboneEmbedder(
            backbone.eval(), size=self.config.size, resize=self.config.resize, device=self.device
        )
        (train, train_names), (test, test_names) = (self._features(embedder, s) for s in self.sources)
        backbone.train(training)
        classes = {name: index for index, name in enumerate(sorted(set(train_names)))}
        labels = torch.tensor([classes[name] for name in train_names], device=self.device)
        truth = torch.tensor([classes.get(name, -1) for name in test_names], device=self.device)
        k = min(self.config.k, len(labels))
        guesses = knn_classify(train, labels, test, classes=len(classes), k=(k,))[k]
        return 100.0 * float((guesses == truth).float().mean())

    def _features(self, embedder: BackboneEmbedder, source: Source) -> tuple[torch.Tensor, list[str]]:
        ids, vectors = embed_array(source, embedder, workers=self.workers)
        label = dict(zip(source.ids, source.labels(), strict=True))
        return vectors.to(self.device), [str(label[id_]) for id_ in ids]


def _labelled(spec: str, key: str, cache: Path | None) -> Source:
    source = open_source(spec, cache=cache)
    if any(label is None for label in source.labels()):
        raise UserError(f"{key}={spec} has pictures without a label; k-NN needs class folders or labels")
    return source
