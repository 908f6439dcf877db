"""Fine-tuning of the whole backbone with a linear classifier (DINOv2, arXiv 2304.07193, sec. 7.1).

The recipe of masked autoencoders (arXiv 2111.06377, app. A.2, tab. 9) without its random colour operations:
AdamW, rates that fall from block to block, a cosine after warmup, random resized crops, mixup and cutmix,
label smoothing, drop path, and an average of the weights, which is what is scored. (DINOv2 used that of
arXiv 2204.07118, whose differences are in augmentation.) Nothing is chosen on the test part.
Of several ranks the first alone trains.
"""

import io
import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from dinov2.config import at_least, runtime
from dinov2.console import progress
from dinov2.data.order import derive_seed
from dinov2.exits import NoProgress, UserError
from dinov2.features import PRECISIONS, embed_array
from dinov2.files import write_bytes
from dinov2.models.backbone import Backbone
from dinov2.models.load import fill, from_architecture
from dinov2.optim import (
    OptimConfig,
    Schedules,
    TeacherConfig,
    clip_gradients,
    make_optimizer,
    set_rates,
    update_average,
)
from dinov2.pages import Page
from dinov2.pages.charts import curve
from evals.bench import Bench
from evals.config import LabelledConfig
from evals.crops import crop_batches
from evals.data import Labelled, Parts, labelled_parts
from evals.drawing import draw_classification, draw_examples
from evals.per_class import mean_per_class
from evals.results import Outcome
from evals.task import Task

TOKENS = ("cls", "cls+mean")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LabelledConfig):
    epochs: int = 50  # passes over the training pictures
    batch_size: int = 128  # pictures a step
    lr: float = 5e-4  # peak rate of the last layer for a batch of 256; grows with the batch
    min_lr: float = 1e-6  # rate at the end of the cosine
    warmup: float = 0.1  # fraction of the run with a linearly rising rate
    weight_decay: float = 0.05  # none on biases, norms, LayerScale
    layer_decay: float = 0.65  # rate of a block over that of the next one
    clip: float = 1.0  # largest gradient norm of backbone and of head; 0 for no clipping
    drop_path: float = 0.1  # rate of stochastic depth
    mixup: float = 0.8  # parameter of the Beta that pictures are blended by (arXiv 1710.09412); 0: never
    cutmix: float = 1.0  # of the one that boxes are exchanged by (1905.04899); each step takes one of the two
    smoothing: float = 0.1  # share of a label that is spread over all classes
    ema: float = 0.9999  # what averaged weights keep of themselves at a step, less at first; 0: no average
    token: str = "cls"  # what is classified; or cls+mean, with the mean patch token
    save_every: int = runtime(200)  # steps that a killed command loses at most

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "epochs", "batch_size", "save_every")
        at_least(0, self, "clip", "mixup", "cutmix", "weight_decay")
        if self.token not in TOKENS:
            raise UserError(f"token={self.token}: choose from {', '.join(TOKENS)}")
        if self.precision == "float16":
            raise UserError("precision=float16 is too narrow to train in without scaling; take bfloat16")
        for key, most in (("warmup", 1.0), ("drop_path", 1.0), ("smoothing", 1.0), ("ema", 1.0)):
            if not 0 <= getattr(self, key) < most:
                raise UserError(f"{key}={getattr(self, key)}: give 0 or more, and less than {most:g}")
        if min(self.lr, self.layer_decay) <= 0:
            raise UserError("lr= and layer_decay= should be above 0")

    def schedules(self, steps: int, pictures: int) -> Schedules:
        optim = OptimConfig(
            lr=self.lr,
            lr_batch=256,
            lr_scaling="linear",
            min_lr=self.min_lr,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            weight_decay_end=self.weight_decay,
            clip=self.clip,
            layer_decay=self.layer_decay,
            patch_embed_lr=1.0,
            freeze_last_layer=0.0,
        )
        teacher = TeacherConfig(momentum=self.ema)
        return Schedules(optim=optim, teacher=teacher, steps=steps, batch=self.batch_size, pictures=pictures)


class Classifier(nn.Module):
    """A backbone and a linear layer on its tokens. Takes pictures of 0 to 255."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, classes: int, token: str, seed: int) -> None:
        super().__init__()
        self.backbone, self.token = backbone, token
        with torch.no_grad():
            side = backbone.image_size
            width = self._tokens(torch.zeros(1, 3, side, side), None).shape[1]
        self.head = nn.Linear(width, classes)
        generator = torch.Generator().manual_seed(derive_seed("head", seed))
        nn.init.trunc_normal_(self.head.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.head.bias)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in backbone.normalisation)
        self.register_buffer("mean", 255 * mean, persistent=False)
        self.register_buffer("std", 255 * std, persistent=False)

    def forward(
        self, pictures: Float[Tensor, "n 3 height width"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n classes"]:
        """Scores; `generator` is what stochastic depth draws from, in training mode."""
        return self.head(self._tokens((pictures - self.mean) / self.std, generator))

    def _tokens(self, images: Tensor, generator: torch.Generator | None) -> Float[Tensor, "n width"]:
        features = self.backbone.forward_packed([images], None, generator)[0]
        cls = features["x_norm_clstoken"]
        if self.token == "cls":
            return cls
        return torch.cat([cls, features["x_norm_patchtokens"].mean(1)], dim=1)


class Tuning:
    """A classifier in training, and the average of its weights."""

    def __init__(self, model: Classifier, config: FinetuneConfig, steps: int, pictures: int) -> None:
        self.model, self.config = model.train(), config
        self.average = deepcopy(model).eval().requires_grad_(False) if config.ema else None
        self.schedules = config.schedules(steps, pictures)
        self.optimizer = make_optimizer(model, self.schedules.optim)
        self.step, self.losses = 0, []

    @property
    def scored(self) -> Classifier:
        return self.average or self.model

    def train_step(self, pictures: UInt8[Tensor, "n 3 side side"], labels: Int[Tensor, "n"]) -> None:
        """One step on a batch; what is drawn depends on the seed and the step alone."""
        config, device = self.config, pictures.device
        rates = self.schedules.at(self.step)
        set_rates(self.optimizer, rates)
        classes = self.model.head.out_features
        mixed, targets = mix(pictures.float(), labels, classes, config, self.step)
        generator = torch.Generator().manual_seed(derive_seed("depth", config.seed, self.step))
        dtype = PRECISIONS[config.precision]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            scores = self.model(mixed, generator)
        loss = F.cross_entropy(scores.float(), targets, label_smoothing=config.smoothing)
        loss.backward()
        if config.clip:
            clip_gradients([self.model.backbone, self.model.head], config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(float(loss.detach()))
        if not math.isfinite(self.losses[-1]):
            raise NoProgress(f"the loss is {self.losses[-1]} at step {self.step}: give a smaller lr=")
        self._update_average()

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:
            return
        # The first weights are those of an untrained head: an average that short is better forgotten.
        kept = min(self.config.ema, (1 + self.step) / (10 + self.step))
        update_average(self.average, self.model, kept)
        for ours, theirs in zip(self.average.buffers(), self.model.buffers(), strict=True):
            ours.copy_(theirs)

    def state(self) -> dict[str, Any]:
        """All that training goes on from."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"]


def run(bench: Bench, parts: Parts, config: FinetuneConfig, work: Path) -> Outcome:
    """Top-1 accuracy of the averaged weights after the last step (of the last weights, where ema=0)."""
    if len(bench.backbone.normalisation[0]) != 3:
        raise UserError("fine-tuning is for pictures of three channels")
    backbone = trainable(bench.backbone, config.drop_path)
    model = Classifier(backbone, len(parts.classes), config.token, config.seed).to(bench.device)
    steps = config.epochs * math.ceil(len(parts.train.source) / config.batch_size)
    tuning = Tuning(model, config, steps, len(parts.train.source))
    with bench.timed("training"):
        _train(tuning, bench, parts.train, steps, work / "state.pt")
    ids, scores = embed_array(
        parts.test.source, _Scores(tuning.scored, bench, config), batch=config.batch, workers=config.workers
    )
    bench.unreadable[parts.test.source.fingerprint] = len(parts.test.source) - len(ids)
    truth = parts.test.labels(ids)
    answer = scores.masked_fill(~parts.allowed, -torch.inf).argmax(1)
    right = (answer == truth).double().numpy()

    def draw(page: Page) -> None:
        page.heading("Training")
        page.figure(curve({"loss": (list(range(1, steps + 1)), tuning.losses)}, x="step", y="loss"))
        draw_classification(page, parts, ids, truth, answer)
        draw_examples(page, parts, ids, truth, answer)

    mean_class, spread = mean_per_class(right, truth)
    return Outcome(
        headline="top1",
        metrics={"top1": 100 * float(right.mean()), "mean_class": mean_class},
        scores={"top1": right},
        intervals={"mean_class": spread},
        details={"steps": steps, "last_loss": tuning.losses[-1], **parts.details},
        draw=draw,
    )


def trainable(backbone: Backbone, drop_path: float) -> Backbone:
    """A copy that learns, with this rate of stochastic depth."""
    copy = from_architecture(_with_depth(backbone.architecture(), drop_path))
    fill(copy, {name: tensor.detach().cpu().clone() for name, tensor in backbone.state_dict().items()}, "it")
    copy.normalisation, copy.image_size = backbone.normalisation, backbone.image_size
    return copy.train().requires_grad_(True)


def mix(
    pictures: Float[Tensor, "n 3 side side"],
    labels: Int[Tensor, "n"],
    classes: int,
    config: FinetuneConfig,
    step: int,
) -> tuple[Float[Tensor, "n 3 side side"], Float[Tensor, "n classes"]]:
    """Pictures blended with their neighbours in the batch, or with boxes of theirs; and soft labels."""
    import dinov2.vision_ops  # noqa: F401  # for what its import does: torchvision can be imported

    from torchvision.transforms import v2

    choices = [
        kind(alpha=alpha, num_classes=classes)
        for kind, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
        if alpha > 0
    ]
    if not choices or len(labels) < 2:
        return pictures, F.one_hot(labels, classes).float()
    seed = derive_seed("mix", config.seed, step)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global state
        torch.manual_seed(seed)
        return choices[seed % len(choices)](pictures, labels)


def _train(tuning: Tuning, bench: Bench, train: Labelled, steps: int, saved: Path) -> None:
    """Train to the end, from where a killed command left it."""
    config = tuning.config
    if saved.exists():
        tuning.load_state(torch.load(saved, map_location=bench.device, weights_only=True))
    batches: Iterator[tuple[Tensor, Tensor]] = crop_batches(
        train.source,
        train.labels(train.source.ids).tolist(),
        size=config.size,
        batch=config.batch_size,
        seed=derive_seed("finetune", config.seed),
        start=tuning.step,
        stop=steps,
        workers=config.workers,
    )
    with progress(total=steps, what="fine-tuning", unit="step", initial=tuning.step) as bar:
        for pictures, labels in batches:
            tuning.train_step(pictures.to(bench.device, non_blocking=True), labels.to(bench.device))
            bar.update()
            if tuning.step % config.save_every == 0 or tuning.step == steps:
                file = io.BytesIO()
                torch.save(tuning.state(), file)
                write_bytes(saved, file.getvalue())


class _Scores:
    """A classifier as what embeds pictures: its scores are the vectors."""

    def __init__(self, model: Classifier, bench: Bench, config: FinetuneConfig) -> None:
        self.model, self.device, self.config = model.eval(), bench.device, config
        self.prepare = bench.embedder("cls").prepare
        self.dimension = model.head.out_features
        self.meta: dict[str, Any] = {}

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Float[Tensor, "n classes"]:
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.model(batch.to(self.device).float()).float()


def _with_depth(architecture: dict[str, Any], rate: float) -> dict[str, Any]:
    if architecture["kind"] == "descriptor":
        return architecture | {"inner": _with_depth(architecture["inner"], rate)}
    return architecture | {"drop_path": rate}


TASK = Task(FinetuneConfig, labelled_parts, run, "the whole backbone, fine-tuned")
