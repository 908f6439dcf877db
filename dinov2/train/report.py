"""`report.html` of a run: what was trained, its curves, and what it cost."""

from pathlib import Path
from typing import Any

from dinov2.config import identity
from dinov2.files import read_json
from dinov2.logs import read_lines, read_metrics
from dinov2.pages import Card, Page, curve
from dinov2.train.config import TrainConfig
from dinov2.train.cost import spent

Lines = list[dict[str, Any]]
CHARTS: list[tuple[str, str, list[str], str]] = [  # title, label of the y axis, metrics, what to see
    (
        "k-NN through training",
        "top-1, %",
        ["knn.teacher", "knn.student"],
        "A teacher that averages the student is ahead of it.",
    ),
    ("Loss", "loss", ["loss"], ""),
    (
        "Losses by name",
        "loss",
        ["loss.dino", "loss.ibot", "loss.koleo", "loss.infonce"],
        "Without their weights.",
    ),
    (
        "What is told apart",
        "nats",
        ["told_apart.teacher", "told_apart.student"],
        "Mutual information of crop and prototype; it goes to 0 in a collapse of either kind.",
    ),
    (
        "Entropy of the scores",
        "nats",
        ["entropy.teacher", "entropy.student"],
        "Near 0: one prototype. Near the logarithm of their number: all alike, or a small batch.",
    ),
    ("Views whose match is nearest", "share", ["matches.nearest"], ""),
    ("Cosine", "similarity", ["similarity.match", "similarity.nearest_other"], ""),
    ("Spread", "share", ["features.std", "prototypes.used"], "Of the teacher; 1 is the most there can be."),
    (
        "Effective rank of the features",
        "rank",
        ["features.rank"],
        "RankMe over one batch, at most the number of its pictures.",
    ),
    ("Distance to the nearest neighbour", "distance", ["features.nearest"], "Of normalised features."),
    ("Gradient norms before clipping", "norm", ["norm.backbone", "norm.dino_head", "norm.ibot_head"], ""),
    ("Learning rate", "rate", ["lr"], ""),
    ("Speed", "pictures a second", ["pictures_per_second"], "Over all processes."),
    (
        "Use of the machine",
        "share",
        ["utilisation", "waiting"],
        "Operations that the networks need, of what the device could do; time without data to work on.",
    ),
]
SHOWN = 96  # pixels of a picture in the strips


def write_report(config: TrainConfig, folder: Path) -> None:
    """Draw the run's metrics into `report.html`."""
    lines, versions = read_metrics(folder), read_json(folder / "versions.json")
    page = Page(f"Training of {folder.name}", subtitle=_subtitle(config, versions))
    page.numbers(_headline(config, lines, versions["device"]["kind"]))
    _trouble(page, folder)
    page.heading("Through the run")
    for title, unit, keys, caption in CHARTS:
        series = {key: points for key in keys if (points := _points(lines, key))[0]}
        if series:
            page.figure(curve(series, x="step", y=unit, title=title), caption=caption)
    _strips(page, folder / "snapshots")
    page.heading("Settings")
    page.table(["setting", "value"], [[key, str(value)] for key, value in identity(config).items()])
    page.heading("Where it ran")
    machine, packages = versions["machine"], versions["packages"]
    page.table(
        ["what", "value"],
        [[key, str(value)] for key, value in machine.items()]
        + [[f"device: {key}", str(value)] for key, value in versions["device"].items()]
        + [[name, packages[name]] for name in ("torch", "torchvision", "timm") if name in packages]
        + [["code", str(versions["git"])]],
    )
    page.write(folder / "report.html")


def _subtitle(config: TrainConfig, versions: dict[str, Any]) -> str:
    pictures = versions["data"]["pictures"]
    return f"{config.model.size}, patch {config.model.patch}, on {pictures:,} pictures of {config.data}"


def _headline(config: TrainConfig, lines: Lines, kind: str) -> dict[str, str | tuple[str, str]]:
    steps = [line for line in lines if "loss" in line]
    last, cost = steps[-1], spent(config, steps, kind)
    seconds = sum(config.batch / line["pictures_per_second"] for line in steps)
    numbers: dict[str, str | tuple[str, str]] = {
        "steps": f"{last['step']:,}",
        "pictures seen": f"{last['step'] * config.batch:,}",
        "time in steps": f"{seconds / 60:.1f} min",
        "pictures a second": f"{len(steps) * config.batch / seconds:.1f}",
        "GPU-hours" if kind == "cuda" else "process-hours": f"{cost['hours']:.3g}",
        "kWh, estimated": (f"{cost['kwh']:.2g}", f"at {cost['watts']:g} W a process (`watch.watts`)"),
        "skipped steps": f"{last['skipped']}",
    }
    found = [line for line in lines if "knn.teacher" in line]
    if found:
        numbers["k-NN before → after"] = f"{found[0]['knn.teacher']:.1f} → {found[-1]['knn.teacher']:.1f} %"
    return numbers


def _trouble(page: Page, folder: Path) -> None:
    """Warnings and returns to checkpoints, where there were any."""
    path = folder / "rollbacks.json"
    cuts = read_json(path) if path.exists() else []
    rows = [(cut["at"], f"{cut['what']}; back to step {cut['to']}") for cut in cuts]
    warnings = read_lines(folder / "warnings.jsonl")
    rows += [(line["step"], f"**{line['kind']}**: {line['text']}") for line in warnings]
    if rows:
        page.heading("What went wrong")
        page.table(["step", "what"], sorted(rows))


def _strips(page: Page, folder: Path) -> None:
    """Fixed pictures through the run: what the teacher attends to, and its patches as colours."""
    taken = sorted(path for path in folder.glob("[0-9]*")) if folder.is_dir() else []
    if not taken:
        return
    steps = ", ".join(f"{int(path.name):,}" for path in taken)
    page.heading("What the teacher sees")
    for kind, title in (("attention", "Attention of the last block"), ("patches", "Patches as colours")):
        cards = []
        for picture in sorted(taken[0].glob("*-picture.png")):
            number = picture.name.partition("-")[0]
            drawn = [path / f"{number}-{kind}.png" for path in taken]
            files = [picture, *(path for path in drawn if path.exists())]
            cards.append(Card([path.read_bytes() for path in files]))
        page.gallery(cards, f"{title}: the picture, then after steps {steps}.", columns=1, side=SHOWN)


def _points(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]
