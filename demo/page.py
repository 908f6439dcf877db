"""Draws the demo's page from the files that its stages have left: python -m demo.page DIR"""

from pathlib import Path

from demo.made import Made
from demo.page_curation import KINDS, draw_curation, draw_flow, verdict_of
from demo.page_results import Score, draw_looks, draw_neighbours, draw_scores, draw_training, scores_of
from demo.stages import read_stages
from demo.truth import Verdict
from dinov2.console import run
from dinov2.files import write_text
from dinov2.models.backbone import Backbone
from dinov2.pages import Page
from dinov2.pages.page import Value
from evals.backbones import load

Scores = dict[tuple[str, str], Score]
PACKAGES = ("torch", "torchvision", "timm", "scikit-image", "scikit-learn", "pillow", "numpy", "faiss-cpu")


def main(words: list[str]) -> None:
    """Write DIR/report.html and DIR/summary.txt."""
    made = Made(Path(words[0]))
    verdict, scores = verdict_of(made), scores_of(made)
    draw(made, verdict, scores).write(made.folder / "report.html")
    write_text(made.folder / "summary.txt", "".join(line + "\n" for line in summary(made, verdict, scores)))


def draw(made: Made, verdict: Verdict | None, scores: Scores) -> Page:
    page = Page("From a pool of pictures to a measured backbone", subtitle=made.inputs.title)
    page.text(made.inputs.about)
    page.numbers(_tiles(made, verdict, scores))
    page.heading("From the pool to the shards")
    draw_flow(page, made)
    draw_curation(page, made, verdict)
    draw_training(page, made)
    draw_scores(page, made, scores)
    backbones = _backbones(made)
    draw_neighbours(page, made, backbones)
    draw_looks(page, made, backbones)
    _draw_cost(page, made)
    return page


def summary(made: Made, verdict: Verdict | None, scores: Scores) -> list[str]:
    """What came out, in two or three lines for the terminal."""
    kept = sum(row["kept"] for row in made.decisions)
    lines = [f"{kept:,} of {len(made.decisions):,} pictures stayed."]
    if verdict is not None:
        tallies = {kind: verdict.planted[kind] for kind in KINDS if kind in verdict.planted}
        found = ", ".join(f"{kind} {tally.percent:.0f}%" for kind, tally in tallies.items())
        wrong = f"{len(verdict.wrong)} of {verdict.originals:,}"
        lines = [f"Planted copies found: {found}; originals dropped wrongly: {wrong}."]
    knn = {method: score for (method, task), score in scores.items() if task == "knn"}
    if knn:
        lines.append(
            f"k-NN on test pictures: {knn['trained'].value:.1f}% after training, "
            f"{knn['untrained'].value:.1f}% before, {knn['pixels'].value:.1f}% for raw pixels."
        )
    return lines


def _tiles(made: Made, verdict: Verdict | None, scores: Scores) -> dict[str, Value | tuple[Value, str]]:
    kept = sum(row["kept"] for row in made.decisions)
    tiles: dict[str, Value | tuple[Value, str]] = {
        "pictures in the pool": len(made.decisions),
        "kept for training": kept,
    }
    if verdict is not None:
        copies = [tally for kind, tally in verdict.planted.items() if kind != "corrupt"]
        planted, found = sum(tally.planted for tally in copies), sum(tally.found for tally in copies)
        wrong = len(verdict.wrong)
        tiles["of planted copies found"] = f"{100 * found / max(1, planted):.1f}%", f"{found} of {planted}"
        tiles["of originals dropped wrongly"] = (
            f"{100 * wrong / max(1, verdict.originals):.2f}%",
            f"{wrong} of {verdict.originals:,}",
        )
    for method, words in (("trained", "after training"), ("untrained", "before"), ("pixels", "raw pixels")):
        if (score := scores.get((method, "knn"))) is not None:
            tiles[f"k-NN {words}"] = f"{score.value:.1f}%"
    seconds = sum(facts["seconds"] for facts in read_stages(made.folder).values())
    tiles["minutes, after installing"] = f"{seconds / 60:.1f}"
    return tiles


def _backbones(made: Made) -> dict[str, Backbone]:
    trained = str(made.run / "backbone")
    specs = {"untrained": f"untrained:{trained}?seed={made.seed}", "trained": trained}
    return {name: load(spec, "cpu") for name, spec in specs.items()}


def _draw_cost(page: Page, made: Made) -> None:
    page.heading("What it took")
    stages = read_stages(made.folder)
    rows = [[name, f"{facts['seconds']:.0f}"] for name, facts in stages.items()]
    page.table(
        ["stage", "seconds"], rows, "A stage that was stopped and continued counts from its last start."
    )
    machine = made.versions["machine"]
    packages = made.versions["packages"]
    page.table(
        ["with", ""],
        [[key, str(value)] for key, value in machine.items()]
        + [["python", made.versions["python"]]]
        + [[name, packages[name]] for name in PACKAGES if name in packages]
        + [["code", made.versions["git"]]],
    )
    page.text("The commands that were run:")
    folder = str(made.folder)
    commands = [" ".join(["python -m", *words]) for facts in stages.values() for words in facts["commands"]]
    page.code("\n".join(commands).replace(folder, "DIR"))


if __name__ == "__main__":
    run(main, "demo.page")
