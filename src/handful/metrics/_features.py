"""What every metric accepts as features: a finite (n, D) array, from numpy or torch. Torch is never imported for it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import numpy as np

from handful.errors import RequestError

# Squares of squares stay finite below this, in float64 and, after scaling, in float32; no network's features come near.
LARGEST = 1e30
# Float64 scratch per block of rows: 2 M values are 16 MB.
SCRATCH_VALUES = 1 << 21


def as_features(value: Any, name: str) -> np.ndarray:
    """Checks features and returns them as a float32 or float64 array, without a copy where there is nothing to convert.

    Args:
        value: features, (n, D); numpy array, torch tensor on any device, or nested sequence.
        name: the argument's name, for errors ("real", "generated", "queries" ...).

    Raises:
        RequestError: not two-dimensional, empty, not real numbers, NaN or infinite, or larger than 1e30.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # numpy has no bfloat16; float32 holds it exactly
            value = value.float()
    array = np.asarray(value)
    if array.ndim != 2:
        raise RequestError(name, array.shape, "features must have the shape (n, D)", "Give one row of features per image.")
    if 0 in array.shape:
        raise RequestError(name, array.shape, "this shape is empty", "Give at least one image and one feature.")
    if array.dtype.kind in "biu":
        array = array.astype(np.float64)
    elif array.dtype.kind != "f":
        raise RequestError(name, array.dtype, "features must be real numbers", "Give float32 or float64.")
    elif array.dtype.itemsize == 2:
        array = array.astype(np.float32)
    elif array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    for rows in row_blocks(*array.shape):
        largest = np.abs(array[rows]).max()
        if not largest <= LARGEST:  # true of NaN too
            row, column = np.argwhere(~(np.abs(array[rows]) <= LARGEST))[0] + (rows.start, 0)
            problem = f"at row {row}, column {column}; features must be finite and at most {LARGEST:g}"
            remedy = "Drop that image, or extract its features in float32."
            raise RequestError(name, float(array[row, column]), problem, remedy)
    return array


def require_same_width(first: np.ndarray, second: np.ndarray, first_name: str, second_name: str) -> None:
    """Raises RequestError where two sets differ in D."""
    if first.shape[1] != second.shape[1]:
        problem = f"the number of features differs from that of `{first_name}`, {first.shape[1]}"
        raise RequestError(second_name, second.shape[1], problem, "Extract both with the same extractor.")


def as_pair(real: Any, generated: Any) -> tuple[np.ndarray, np.ndarray]:
    """Checks a real and a generated set as `as_features` does, and that both have the same D.

    Raises:
        RequestError: as `as_features`, or the two differ in D.
    """
    real, generated = as_features(real, "real"), as_features(generated, "generated")
    require_same_width(real, generated, "real", "generated")
    return real, generated


def as_count(value: Any, name: str) -> int:
    """A positive whole number, such as k or a block size.

    Raises:
        RequestError: not a whole number, or below 1.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise RequestError(name, value, "this is not a whole number", "Give an integer of at least 1.") from None
    if count < 1:
        raise RequestError(name, count, "this is too small", "Give at least 1.")
    return count


def row_blocks(n: int, width: int, values: int = SCRATCH_VALUES) -> Iterator[slice]:
    """Slices that walk over n rows, each of at most `values` values (at least one row)."""
    size = max(1, values // max(width, 1))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def mean(features: np.ndarray) -> np.ndarray:
    """Mean over rows in float64, (D,), a block at a time."""
    total = np.zeros(features.shape[1])
    for rows in row_blocks(*features.shape):
        total += features[rows].sum(axis=0, dtype=np.float64)
    return total / len(features)
