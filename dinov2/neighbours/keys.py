"""A similarity and a column as one integer, by whose order neighbours lie: the best first, ties by column.

One sort of integers takes the place of a stable sort of values and a gather of columns, which are < 2^32 - 1.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

NONE = -1  # the column of a place that nothing was found for
FEW_THREADS = 8  # up to which numpy's sort on one is faster than torch's on all


def pack(value: Float[Tensor, "*any"], column: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """Keys of float32 values without NaN, and columns from -1 up. Smaller keys are better."""
    bits = (value + 0.0).view(torch.int32)  # of both zeros that are equal only one is left
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    return (~ascending).long() << 32 | (column + 1)


def value_of(key: Int[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    ascending = ~(key >> 32).int()
    return (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).view(torch.float32)


def column_of(key: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    return (key & 0xFFFFFFFF) - 1


def sort(key: Int[Tensor, "rows any"]) -> Int[Tensor, "rows any"]:
    """Each row with the best first; `key` may be changed."""
    if key.device.type == "cpu" and torch.get_num_threads() <= FEW_THREADS:
        key.numpy().sort(axis=1)
        return key
    return key.sort(dim=1).values
