"""The table of an ablation, as Markdown and as a page: what each variant reached, how far seeds differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dinov2.pages import Page, curve

COLUMNS = [
    "variant",
    "settings",
    "k-NN of the teacher",
    "of the student",
    "difference",
    "pictures",
    "minutes",
]
READING = (
    "k-NN is top-1 in percent, the mean over seeds with the lowest and highest behind it; the difference is "
    "to the first row. With one seed nothing says how large a difference chance makes."
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one variant with one seed."""

    variant: str
    seed: int
    teacher: float  # k-NN top-1 at the end, percent
    student: float
    steps: int
    pictures: int  # seen, one counted as often as it was
    minutes: float  # in steps, without k-NN
    curve: list[tuple[int, float, float]]  # step, teacher, student


def rows(results: Sequence[Result], variants: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """A row for each variant that has a result, in the order of `variants`."""
    found = []
    first = None
    for name, phases in variants.items():
        own = [result for result in results if result.variant == name]
        if not own:
            continue
        mean = sum(result.teacher for result in own) / len(own)
        first = mean if first is None else first
        found.append(
            [
                name,
                ", then ".join(phases),
                _spread([result.teacher for result in own]),
                _spread([result.student for result in own]),
                f"{mean - first:+.1f}",
                f"{own[0].pictures:,}",
                f"{sum(result.minutes for result in own) / len(own):.1f}",
            ]
        )
    return found


def markdown(
    results: Sequence[Result], failed: Mapping[str, str], variants: Mapping[str, Sequence[str]]
) -> str:
    """`table.md`."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows(results, variants)]
    table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    failures = "".join(f"- failed: {what}: {why}\n" for what, why in failed.items())
    return f"{table}\n{READING}\n" + (f"\n{failures}" if failures else "")


def page(
    title: str,
    results: Sequence[Result],
    failed: Mapping[str, str],
    variants: Mapping[str, Sequence[str]],
    command: Sequence[str],
) -> Page:
    """`report.html`: the table, and teacher and student through training for each variant."""
    made = Page(f"Ablation {title}", subtitle=READING)
    made.table(COLUMNS, rows(results, variants))
    for what, why in failed.items():
        made.text(f"**Failed**: {what}: {why}")
    seed = min((result.seed for result in results), default=0)
    for who, place in (("teacher", 1), ("student", 2)):
        series = {
            result.variant: ([point[0] for point in result.curve], [point[place] for point in result.curve])
            for result in results
            if result.seed == seed
        }
        if series:
            made.figure(curve(series, x="step", y="top-1, %", title=f"k-NN of the {who}, seed {seed}"))
    made.heading("Command")
    made.code(" \\\n  ".join(command))
    return made


def _spread(values: Sequence[float]) -> str:
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"
