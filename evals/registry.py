"""The tasks by name. A new one is a file and a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evals import copydetect, knn, linear, retrieval
from evals.config import EvalConfig
from evals.data import labelled_parts


@dataclass(frozen=True)
class Task:
    """An evaluation protocol.

    Attributes:
        config: its settings, a subclass of `EvalConfig`.
        data: opens what the settings name; the result has `sources`, by which results are told apart.
        run: takes the `Bench`, the data, the settings, and a folder that a killed command continues from;
            gives an `Outcome`.
        summary: what it is, in one line.
    """

    config: type[EvalConfig]
    data: Callable[[Any], Any]
    run: Callable[..., Any]
    summary: str


TASKS: dict[str, Task] = {
    "copydetect": Task(
        copydetect.CopydetectConfig, copydetect.open_sets, copydetect.run, "finding edited copies"
    ),
    "knn": Task(knn.KNNConfig, labelled_parts, knn.run, "classification by nearest neighbours"),
    "linear": Task(linear.LinearConfig, labelled_parts, linear.run, "linear classification, a grid of heads"),
    "retrieval": Task(
        retrieval.RetrievalConfig,
        retrieval.open_sets,
        retrieval.run,
        "finding what shows the same",
    ),
}
