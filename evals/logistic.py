"""Multinomial logistic regression by scikit-learn, and the choice of its C on a holdout.

C weighs the loss against the L2 penalty. The L-BFGS of each value starts from the solution of the one before,
so that the whole grid costs a few times what one fit costs.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dinov2.console import progress
from dinov2.exits import UserError
from dinov2.files import write_whole
from evals.data import Parts, held_out

State = dict[str, NDArray[Any]]


class Logistic:
    """One model, fitted from the solution that is there, if any.

    Rows are centred first. That changes no solution, since the intercept is not penalised; but features that
    differ little from their mean, as those of fresh weights do, would need many more iterations.

    Attributes:
        converged: whether the last fit met its tolerance within its iterations.
    """

    def __init__(self, *, iterations: int = 1000, tolerance: float = 1e-4) -> None:
        from sklearn.linear_model import LogisticRegression

        self._model: Any = LogisticRegression(max_iter=iterations, tol=tolerance, warm_start=True)
        self._mean: Float[Tensor, "dim"] | float = 0.0
        self.converged = False

    def fit(self, features: Float[Tensor, "n dim"], labels: Int[Tensor, "n"], c: float) -> "Logistic":
        from sklearn.exceptions import ConvergenceWarning

        self._model.set_params(C=c)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._mean = features.mean(0)
            self._model.fit((features - self._mean).numpy(), labels.numpy())
        self.converged = int(self._model.n_iter_.max()) < self._model.max_iter
        return self

    def predict(
        self, features: Float[Tensor, "n dim"], allowed: Bool[Tensor, "classes"] | None = None
    ) -> Int[Tensor, "n"]:
        """The likeliest class of each row among those that were learnt and are allowed."""
        scores = self._model.decision_function((features - self._mean).numpy())
        if scores.ndim == 1:  # of two classes, scikit-learn gives the second one's
            scores = np.stack([-scores, scores], axis=1)
        names, found = torch.from_numpy(self._model.classes_), torch.from_numpy(scores)
        if allowed is not None:
            found = found.masked_fill(~allowed[names], -torch.inf)
        return names[found.argmax(1)]

    def state(self) -> State:
        """All that the next fit starts from."""
        return {name: getattr(self._model, name) for name in ("coef_", "intercept_", "classes_")}

    def load_state(self, state: State) -> None:
        for name, values in state.items():
            setattr(self._model, name, values)


@dataclass(frozen=True, kw_only=True)
class Search:
    """The choice of C: the value of an even grid of logarithms that is best on a share of each class."""

    least_c: float = 1e-6
    most_c: float = 1e5
    values: int = 45
    holdout: float = 0.1
    iterations: int = 1000
    tolerance: float = 1e-4
    seed: int = 0

    @property
    def grid(self) -> list[float]:
        return [float(c) for c in np.logspace(np.log10(self.least_c), np.log10(self.most_c), self.values)]

    def run(
        self, rows: Float[Tensor, "n dim"], labels: Int[Tensor, "n"], parts: Parts, work: Path
    ) -> tuple[Logistic, list[float]]:
        """The model of all rows with the C that is best on the holdout, the smallest of equals.

        Args:
            work: a folder for what a killed command continues from.

        Returns:
            the model, and the top-1 accuracy in percent on the holdout for each value of the grid.

        Raises:
            UserError: there is nothing to choose on.
        """
        held = held_out(labels, self.holdout, self.seed, parts.classes)
        if not held.any():
            raise UserError("every class has one training picture: there is none to choose C on")
        fit, chosen_by = (rows[~held], labels[~held]), (rows[held], labels[held])
        model, saved = Logistic(iterations=self.iterations, tolerance=self.tolerance), work / "grid.npz"
        top1, best, last = _resumed(saved)
        model.load_state(last)
        with progress(total=self.values, what="logistic regression", unit="C", initial=len(top1)) as bar:
            for c in self.grid[len(top1) :]:
                right = model.fit(*fit, c).predict(chosen_by[0], parts.allowed) == chosen_by[1]
                top1.append(100 * float(right.double().mean()))
                if top1[-1] > max(top1[:-1], default=-1.0):
                    best = model.state()
                _save(saved, top1, best, model.state())
                bar.update()
        model.load_state(best)
        return model.fit(rows, labels, self.grid[int(np.argmax(top1))]), top1


def _save(path: Path, top1: list[float], best: State, last: State) -> None:
    kept: dict[str, Any] = {f"best {name}": array for name, array in best.items()}
    kept |= {f"last {name}": array for name, array in last.items()}
    with write_whole(path) as file:
        np.savez(file, top1=np.array(top1), **kept)


def _resumed(path: Path) -> tuple[list[float], State, State]:
    """What was reached for the values of C that are done, the best of their solutions, and the last."""
    if not path.exists():
        return [], {}, {}
    with np.load(path) as there:
        best, last = (
            {name.partition(" ")[2]: there[name] for name in there.files if name.startswith(word)}
            for word in ("best ", "last ")
        )
        return there["top1"].tolist(), best, last
