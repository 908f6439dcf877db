"""`report.html` of a run: what was trained, its curves, and what it cost."""

from pathlib import Path
from typing import Any

from dinov2.config import identity
from dinov2.files import read_json
from dinov2.logs import read_metrics
from dinov2.pages import Page, curve
from dinov2.train.config import TrainConfig

Lines = list[dict[str, Any]]
CHARTS: list[tuple[str, str, list[str]]] = [  # title, label of the y axis, metrics drawn together
    ("k-NN through training", "top-1, %", ["knn.teacher", "knn.student"]),
    ("Loss", "loss", ["loss"]),
    ("Losses by name", "loss", ["loss.dino", "loss.ibot", "loss.koleo", "loss.infonce"]),
    ("Entropy of the scores", "nats", ["entropy.teacher", "entropy.student"]),
    ("Views whose match is nearest", "share", ["matches.nearest"]),
    ("Cosine", "similarity", ["similarity.match", "similarity.nearest_other"]),
    ("Spread", "share", ["features.std", "prototypes.used"]),
    ("Gradient norms before clipping", "norm", ["norm.backbone", "norm.dino_head", "norm.ibot_head"]),
    ("Learning rate", "rate", ["lr"]),
    ("Speed", "pictures a second", ["pictures_per_second"]),
]


def write_report(config: TrainConfig, folder: Path) -> None:
    """Draw the run's metrics into `report.html`."""
    lines, versions = read_metrics(folder), read_json(folder / "versions.json")
    page = Page(f"Training of {folder.name}", subtitle=_subtitle(config, versions))
    page.numbers(_headline(config, lines))
    for title, unit, keys in CHARTS:
        series = {key: points for key in keys if (points := _points(lines, key))[0]}
        if series:
            page.figure(curve(series, x="step", y=unit, title=title), caption="")
    page.heading("Settings")
    page.table(["setting", "value"], [[key, str(value)] for key, value in identity(config).items()])
    page.heading("Where it ran")
    machine, packages = versions["machine"], versions["packages"]
    page.table(
        ["what", "value"],
        [[key, str(value)] for key, value in machine.items()]
        + [[name, packages[name]] for name in ("torch", "torchvision", "timm") if name in packages]
        + [["code", str(versions["git"])]],
    )
    page.write(folder / "report.html")


def _subtitle(config: TrainConfig, versions: dict[str, Any]) -> str:
    pictures = versions["data"]["pictures"]
    return f"{config.model.size}, patch {config.model.patch}, on {pictures:,} pictures of {config.data}"


def _headline(config: TrainConfig, lines: Lines) -> dict[str, str]:
    steps = [line for line in lines if "loss" in line]
    last = steps[-1]
    seconds = sum(config.batch / line["pictures_per_second"] for line in steps)
    numbers = {
        "steps": f"{last['step']:,}",
        "pictures seen": f"{last['step'] * config.batch:,}",
        "time in steps": f"{seconds / 60:.1f} min",
        "pictures a second": f"{len(steps) * config.batch / seconds:.1f}",
        "skipped steps": f"{last['skipped']}",
    }
    found = [line for line in lines if "knn.teacher" in line]
    if found:
        numbers["k-NN before → after"] = f"{found[0]['knn.teacher']:.1f} → {found[-1]['knn.teacher']:.1f} %"
    return numbers


def _points(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]
