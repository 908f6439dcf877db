"""The page's account of training and what it is worth: curves, numbers, neighbours, attention."""

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image

from demo.made import Made, spread
from dinov2.data.decode import Unreadable, decode
from dinov2.data.sources import Source, open_source
from dinov2.features import BackboneEmbedder, embed_array
from dinov2.files import read_json
from dinov2.logs import read_metrics
from dinov2.models.backbone import Backbone
from dinov2.neighbours import nearest
from dinov2.pages import Card, Page, curve
from dinov2.pictures import attention_maps, patch_colours

METHODS = {
    "trained": "after training",
    "untrained": "before training (fresh weights)",
    "pixels": "raw pixels",
}
CURVES = [
    ("Loss", "loss", {"loss": "all", "loss.dino": "DINO", "loss.ibot": "iBOT", "loss.koleo": "KoLeo"}),
    ("k-NN through training", "top-1, %", {"knn.teacher": "teacher", "knn.student": "student"}),
    ("Entropy of the scores", "nats", {"entropy.teacher": "teacher", "entropy.student": "student"}),
]
NEIGHBOURS = 6
ASKED = 10  # test pictures whose neighbours are shown
SEEN = 6  # test pictures whose attention is shown
MOST_SEARCHED = 3_000  # curated pictures among which they are looked for
SHOWN_SIDE = 160  # pixels at which attention and patches are drawn


@dataclass(frozen=True)
class Score:
    """One number of the evaluation, in percent, with its 95% interval where there is one."""

    name: str  # of the metric
    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.1f}%"
        return f"{self.value:.1f}% ({self.interval[0]:.1f} to {self.interval[1]:.1f})"


def scores_of(made: Made) -> dict[tuple[str, str], Score]:
    """The headline of every evaluation by (method, task)."""
    path = made.folder / "evals" / "results.jsonl"
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        result = json.loads(line)
        name, metrics = result["headline"], result["metrics"]
        interval = result["intervals"].get(name)
        found[method_of(result["backbone"]["spec"]), result["task"]] = Score(
            name, metrics[name], tuple(interval) if interval else None
        )
    return found


def method_of(spec: str) -> str:
    if spec.startswith("untrained:"):
        return "untrained"
    return "pixels" if spec == "pixels" else "trained"


def draw_training(page: Page, made: Made) -> None:
    lines = read_metrics(made.run)
    config = read_json(made.run / "backbone" / "config.json")
    steps = lines[-1]["step"]
    page.heading("Training")
    page.text(
        f"A vision transformer ({config['architecture']['depth']} blocks of width {config['embed_dim']}, "
        f"patches of {config['patch_size']} pixels, pictures of {config['image_size']}) was trained on the "
        f"curated shards for {steps:,} steps, without their labels. All its settings and curves: "
        "`run/report.html`."
    )
    for title, unit, names in CURVES:
        series = {name: points for key, name in names.items() if (points := _points(lines, key))[0]}
        if series:
            page.figure(curve(series, x="step", y=unit, title=title))


def draw_scores(page: Page, made: Made, scores: dict[tuple[str, str], Score]) -> None:
    page.heading("What it is worth")
    if not scores:
        page.text(
            "These pictures have no labels (one folder for each class would give them some), so there is no "
            "accuracy to state. The neighbours below show what the backbone finds alike."
        )
        return
    tasks = {"knn": "k-NN", "linear": "linear probe"}
    rows = [
        [words, *(str(score) if (score := scores.get((method, task))) else None for task in tasks)]
        for method, words in METHODS.items()
    ]
    named = {task: score.name for (_, task), score in scores.items()}
    stated = ", ".join(f"{tasks[task]} {name}" for task, name in named.items())
    page.table(
        ["features", *tasks.values()],
        rows,
        f"Top-1 accuracy on the test pictures ({stated}), with 95% intervals over the pictures. The labelled "
        "pictures that neighbours are looked up in, and that the probe learns from and is chosen on, are the "
        "curated ones.",
    )


def draw_neighbours(page: Page, made: Made, backbones: dict[str, Backbone]) -> None:
    """Nearest training pictures of some test pictures, before and after."""
    page.heading("Nearest neighbours")
    curated, test = open_source(str(made.curated)), made.sources["test"]
    train = curated.select(spread(list(range(len(curated))), MOST_SEARCHED))
    asked = test.select(spread(list(range(len(test))), ASKED))
    found = {name: _neighbours(backbone, train, asked) for name, backbone in backbones.items()}
    cards = [
        _neighbour_card(asked, row, train, found[name][id_], words)
        for row, id_ in enumerate(asked.ids)
        for name, words in (("untrained", "before"), ("trained", "after"))
        if id_ in found[name]
    ]
    page.gallery(
        cards,
        f"Left a test picture, then the nearest to it among {len(train):,} curated pictures, before and "
        "after training. The test pictures are spread evenly over the set; nobody has picked them.",
        columns=2,
        side=72,
    )


def draw_looks(page: Page, made: Made, backbones: dict[str, Backbone]) -> None:
    """Attention and patch colours of some test pictures."""
    page.heading("What it looks at")
    test = made.sources["test"]
    shown = _readable(test, spread(list(range(len(test))), SEEN + 2)[1:-1])
    pictures = list(shown.values())
    backbone = backbones["trained"]
    size = 2 * backbone.image_size  # a finer grid than in training: positions are interpolated
    colours = {name: patch_colours(each, pictures, size=size) for name, each in backbones.items()}
    cards = [
        Card(
            [picture, *attention_maps(backbone, picture, size=size), before, after], test.labels()[row] or ""
        )
        for row, picture, before, after in zip(shown, pictures, *colours.values(), strict=True)
    ]
    page.gallery(
        cards,
        "Each row: a test picture; how the last block's CLS token attends to it after training, one map a "
        "head; and the first three principal components of its patch tokens as red, green and blue, before "
        "training and after it.",
        columns=1,
        side=96,
    )


def _neighbours(backbone: Backbone, train: Source, asked: Source) -> dict[str, list[str]]:
    """Ids of the nearest training pictures by the id of the picture asked for."""
    size = backbone.image_size
    embedder = BackboneEmbedder(backbone, size=size, resize=size, normalised=True)
    (base_ids, base), (ids, queries) = (embed_array(source, embedder) for source in (train, asked))
    _, index = nearest(queries, base, min(NEIGHBOURS, len(base_ids)))
    return {id_: [base_ids[column] for column in row] for id_, row in zip(ids, index.tolist(), strict=True)}


def _neighbour_card(asked: Source, row: int, train: Source, found: list[str], words: str) -> Card:
    rows = {id_: place for place, id_ in enumerate(train.ids)}
    label, labels = asked.labels()[row], train.labels()
    same = sum(labels[rows[id_]] == label for id_ in found)
    pictures = [asked.read(row), *(train.read(rows[id_]) for id_ in found)]
    return Card(pictures, f"{words}: {same} of {len(found)} are {label}" if label else words)


def _readable(source: Source, rows: list[int]) -> dict[int, Image.Image]:
    """Those of the rows that can be read, large enough to be looked at."""
    found = {}
    for row in rows:
        with suppress(Unreadable):
            found[row] = _large(decode(source.read(row)))
    return found


def _large(picture: Image.Image) -> Image.Image:
    scale = SHOWN_SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _points(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in found], [value for _, value in found]
