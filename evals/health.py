"""Whether features have gone bad, which no accuracy says: without labels, on any pictures.

- `rankme`: effective rank of the features, exp of the entropy of the normalised singular values (RankMe,
  arXiv 2210.02885, eq. 1), at most the pictures and the dimension. Low: the features have collapsed in part.
- `alignment`: mean squared distance of two random views of a picture; `uniformity`: log of the mean of
  exp(-2 x squared distance) over pairs of pictures (Wang and Isola, arXiv 2005.10242; features of length 1).
  Both are better the lower; a collapsed backbone has perfect alignment, and uniformity 0.
- `outliers`: the share of patch tokens whose norm, before the final norm, is more than three times the
  median: the artefact that registers cure (arXiv 2309.16588, sec. 2, whose cut at 150 belongs to one model).
- `prototypes`: where the backbone lies in its run's folder, how many prototypes of the teacher's head the
  pictures are spread over: exp of the entropy of the mean assignment, as a share of what could be.
"""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov2.checkpoint import Checkpoints
from dinov2.config import at_least
from dinov2.console import progress
from dinov2.data.decode import Unreadable, decode
from dinov2.data.order import Order, derive_seed
from dinov2.data.sources import Source
from dinov2.exits import UserError
from dinov2.features import CentreCrop
from dinov2.models.heads import DINOHead
from dinov2.pages import Card, Page
from dinov2.pages.charts import curve, histogram
from dinov2.train.health import spread
from evals.backbones import PIXELS, PIXELS_SIDE
from evals.bench import Bench
from evals.bootstrap import of_mean, of_statistic
from evals.config import EvalConfig
from evals.crops import random_resized_crop
from evals.descriptors import Framed, unit
from evals.layouts.labelled import open_labelled
from evals.results import Outcome
from evals.task import Task

OUTLIER = 3.0  # times the median norm
UNIFORM = 2.0  # t of the uniformity
TEMPERATURE = 0.1  # of the assignment to prototypes, the student's in DINO
SHOWN, SIDE = 8, 150


@dataclass(frozen=True, kw_only=True)
class HealthConfig(EvalConfig):
    token: str = "cls"  # whose spread is measured
    pictures: int = 2000  # drawn at random from the source
    patches_of: int = 200  # of them, whose patch norms are looked at

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(2, self, "pictures")
        at_least(1, self, "patches_of")


@dataclass(frozen=True)
class Drawn:
    """The pictures that are looked at."""

    source: Source

    @property
    def sources(self) -> dict[str, Source]:
        return {"test": self.source}


@dataclass(frozen=True)
class RandomView:
    """A random crop of a picture, a function of its pixels and of which view it is. Picklable."""

    size: int
    view: int

    def __call__(self, image: Image.Image) -> Tensor:
        own = int.from_bytes(sha256(image.tobytes()).digest()[:6])
        return random_resized_crop(image, self.size, derive_seed("view", self.view, own))


@dataclass(frozen=True)
class Norms:
    """Norms of patch tokens before the final norm: a map a picture, and the source's row of each."""

    maps: list[Float[Tensor, "rows columns"]]
    rows: list[int]

    @property
    def median(self) -> float:
        return float(torch.cat([one.flatten() for one in self.maps]).median())

    @property
    def outliers(self) -> NDArray[np.float64]:
        """The share of each picture's patches."""
        bound = OUTLIER * self.median
        return np.array([float((one > bound).double().mean()) for one in self.maps])


def open_pictures(config: HealthConfig) -> Drawn:
    """Raises UserError: nothing is named, or fewer than two pictures are there."""
    spec = config.data or config.test
    if spec is None or config.train:
        raise UserError("give data=SOURCE, any pictures")
    source = open_labelled(spec, Path(config.cache) if config.cache else None)
    if len(source) < 2:
        raise UserError(f"{source.name} has one picture; give two or more")
    count = min(config.pictures, len(source))
    order = Order(len(source), derive_seed("health", config.seed))
    return Drawn(source.select(sorted(order.sample(place) for place in range(count))))


def run(bench: Bench, drawn: Drawn, config: HealthConfig, work: Path) -> Outcome:
    """The figures above; those of patches and prototypes where there are any."""
    _, vectors = bench.vectors(drawn.source, config.token)
    features = torch.from_numpy(vectors).float()
    rows = unit(features)
    found = spread(features)
    distances = _between_views(bench, drawn.source, config)
    kernel = (-UNIFORM * (2 - 2 * (rows.double() @ rows.double().T))).exp().numpy()
    metrics = {
        "rankme": found["features.rank"],
        "nearest": found["features.nearest"],
        "alignment": float(distances.mean()),
        "uniformity": uniformity(kernel),
    }
    low, high = of_mean(distances / 100)
    intervals = {
        "alignment": (low, high),
        "uniformity": of_statistic(lambda counts: uniformity(kernel, counts), len(kernel), draws=300),
    }
    details: dict[str, Any] = {"pictures": len(rows), "dimension": rows.shape[1]}
    scores = {}
    norms = None if config.backbone == PIXELS else _norms(bench, drawn.source, config)
    if norms is not None:
        scores["outliers"] = norms.outliers
        metrics["outliers"] = 100 * float(norms.outliers.mean())
        largest = max(float(one.max()) for one in norms.maps)
        details |= {"median norm": norms.median, "largest norm": largest}
    used = _prototypes(config, features, details) if config.token == "cls" else None
    if used is not None:
        metrics["prototypes"] = 100 * used

    def draw(page: Page) -> None:
        values = torch.linalg.svdvals(features.double())
        page.heading("Spectrum")
        page.figure(
            curve(
                {"singular values": (np.arange(1, len(values) + 1), (values / values[0]).numpy())},
                x="number",
                y="share of the largest",
                log_y=True,
            ),
            "A cliff where features have collapsed: what lies behind it carries nothing.",
        )
        if norms is not None:
            _draw_norms(page, drawn.source, norms, config)

    return Outcome(
        headline="rankme",
        metrics=metrics,
        units=dict.fromkeys(("rankme", "nearest", "alignment", "uniformity"), ""),
        lower=tuple(name for name in ("alignment", "uniformity", "outliers") if name in metrics),
        scores=scores,
        intervals=intervals,
        details=details,
        draw=draw,
    )


def uniformity(kernel: Float[np.ndarray, "n n"], counts: NDArray[np.integer] | None = None) -> float:
    """Log of the mean of the kernel over pairs of two different pictures, each counted so often."""
    weights = np.ones(len(kernel)) if counts is None else counts.astype(np.float64)
    own = weights**2
    pairs = weights.sum() ** 2 - own.sum()
    total = weights @ kernel @ weights - own @ np.diag(kernel)
    return float(np.log(total / pairs)) if pairs else float("nan")


def _between_views(bench: Bench, source: Source, config: HealthConfig) -> NDArray[np.float64]:
    """Squared distances of two random views of each picture, 0 to 4."""
    embedder = bench.embedder(config.token)
    size = PIXELS_SIDE if config.backbone == PIXELS else config.size
    views = []
    for number in (1, 2):
        found = bench.embedded(source, Framed(embedder, RandomView(size, number)))
        parts = embedder.meta["parts"]
        columns = found.columns(parts[0][0], parts[-1][0])
        views.append(unit(torch.from_numpy(np.array(found.array()[:, columns]))))
    return (2 - 2 * (views[0].double() * views[1].double()).sum(1)).clamp(min=0).numpy()


@torch.no_grad()
def _norms(bench: Bench, source: Source, config: HealthConfig) -> Norms:
    backbone, crop = bench.backbone, CentreCrop(config.size, config.size)
    mean, std = (
        torch.tensor(values, device=bench.device).view(-1, 1, 1) for values in backbone.normalisation
    )
    maps, rows = [], []
    count = min(config.patches_of, len(source))
    picked = [place * len(source) // count for place in range(count)]
    with progress(total=len(picked), what="patch norms", unit="picture") as bar:
        for row in picked:
            try:
                pixels = crop(decode(source.read(row)))
            except Unreadable:
                continue
            images = (pixels.to(bench.device).float() / 255 - mean) / std
            features = backbone.forward_features(images[None])
            patches = features["x_norm_patchtokens"].shape[1]
            norms = features["x_prenorm"][0, -patches:].float().norm(dim=1).cpu()
            side = round(patches**0.5)
            maps.append(norms.view(side, -1) if side * side == patches else norms[None])
            rows.append(row)
            bar.update()
    return Norms(maps, rows)


def _prototypes(
    config: HealthConfig, features: Float[Tensor, "n dim"], details: dict[str, Any]
) -> float | None:
    """How evenly the teacher's prototypes are used, 0 to 1, if the backbone lies in its run's folder."""
    run_folder = Path(config.backbone).parent
    if not (run_folder / "config.yaml").is_file() or not (run_folder / "checkpoints").is_dir():
        return None
    head = teacher_head(run_folder, features.shape[1])
    if head is None:
        return None
    with torch.no_grad():
        assigned = (head(features).double() / TEMPERATURE).softmax(1)
    mean = assigned.mean(0)
    perplexity = float(torch.special.entr(mean).sum().exp())
    details |= {
        "prototypes": assigned.shape[1],
        "prototypes that some picture chooses": len(assigned.argmax(1).unique()),
        "perplexity of prototypes": perplexity,
    }
    return perplexity / assigned.shape[1]


def teacher_head(run_folder: Path, dim: int) -> DINOHead | None:
    """The image head of the teacher at the last checkpoint of a run; None if there is none."""
    checkpoints = Checkpoints(run_folder / "checkpoints")
    settings = yaml.safe_load((run_folder / "config.yaml").read_text()).get("heads")
    if not checkpoints.steps() or not settings:
        return None
    step, prefix = checkpoints.steps()[-1], "teacher.dino_head."
    if not any(name.startswith(prefix) for name in checkpoints.shapes(step)):
        return None
    head = DINOHead(dim, **settings["dino"]).eval()
    checkpoints.load(step, {"teacher": {f"dino_head.{name}": x for name, x in head.state_dict().items()}})
    return head


def _draw_norms(page: Page, source: Source, norms: Norms, config: HealthConfig) -> None:
    page.heading("Norms of patch tokens")
    median = norms.median
    page.figure(
        histogram(
            {"patches": torch.cat([one.flatten() for one in norms.maps]).numpy() / median},
            x="norm before the final norm, in medians",
            y="patches",
            marks={"outliers": OUTLIER},
            log_y=True,
        ),
        "A second hill far to the right is the artefact that registers cure.",
    )
    most = np.argsort([-float(one.max()) for one in norms.maps], kind="stable")[:SHOWN]
    cards = []
    crop = CentreCrop(config.size, config.size)
    for number in most:
        shown = norms.maps[number] / (OUTLIER * median) * 255
        heat = Image.fromarray(shown.clamp(0, 255).round().to(torch.uint8).numpy())
        picture = crop.picture(decode(source.read(norms.rows[number])))
        pictures = [picture.resize((SIDE, SIDE)), heat.resize((SIDE, SIDE), Image.Resampling.NEAREST)]
        cards.append(
            Card(pictures=pictures, text=f"up to {float(norms.maps[number].max()) / median:.1f} medians")
        )
    page.gallery(cards, "Where the largest norms are; white is an outlier", columns=4, side=SIDE)


TASK = Task(HealthConfig, open_pictures, run, "collapse, spread, outlier tokens")
