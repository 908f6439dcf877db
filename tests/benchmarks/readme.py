"""The README's table of speed, made from what `make bench` kept; `make bench` ends with it.

python -m tests.benchmarks.readme
"""

import json

from tests.benchmarks.figures import ROOT

STORE = ROOT / "docs" / "benchmarks" / "speed.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- made by tests.benchmarks.readme -->", "<!-- until here -->"
SHOWN = ("step", "loader", "augmentation", "order", "start")
LEFT_OUT = "peak memory of the process"


def table() -> str:
    """What was measured, under the machine and the versions that it was measured with."""
    results = {name: each for name, each in json.loads(STORE.read_text()).items() if name in SHOWN}
    lines = []
    for where in dict.fromkeys(each["where"] for each in results.values()):
        lines += [where + ":", "", "| | |", "|---|---|"]
        for each in results.values():
            if each["where"] == where:
                lines += [f"| {what} | {figure} |" for what, figure in each["rows"] if what != LEFT_OUT]
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The README with today's table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{README} has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
