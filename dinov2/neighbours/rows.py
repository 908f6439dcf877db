"""Vectors by row, wherever they lie, and tiles of them as tensors."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor


class Rows(Protocol):
    """Vectors by row: a tensor, an array or memory map of any float type, or `features.Embeddings`."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


class Selected:
    """Some rows of others, read as they are asked for."""

    def __init__(self, rows: Rows, chosen: NDArray[np.int64]) -> None:
        self._rows, self._chosen, self.shape = rows, chosen, (len(chosen), rows.shape[1])

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, rows: Any, /) -> Any:
        return self._rows[self._chosen[rows]]


class Normalised:
    """Rows made L2-normalised as they are read, so that nothing is copied whole."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self.shape = rows, rows.shape
        self.device = rows.device if isinstance(rows, Tensor) else torch.device("cpu")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any, /) -> Tensor:
        return torch.nn.functional.normalize(as_tensor(self._rows[rows]).float(), dim=-1)


def tile(rows: Rows, start: int, count: int, device: torch.device) -> Float[Tensor, "count dim"]:
    return as_tensor(rows[start : start + count]).to(device, torch.float32)


def take(rows: Rows, index: Tensor, device: torch.device) -> Float[Tensor, "index dim"]:
    if isinstance(rows, Tensor | Normalised):
        return as_tensor(rows[index.to(rows.device)]).to(device, torch.float32)
    return as_tensor(rows[index.cpu().numpy()]).to(device, torch.float32)


def as_tensor(rows: Any) -> Tensor:
    # Copied, because torch warns of memory maps opened for reading; a tensor is taken as it is.
    return rows.detach() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))
