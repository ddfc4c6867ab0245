"""Random numbers that belong to one image: functions of its seed and a place, on the CPU, so the same whatever stands beside.

The last word of a place says what its numbers are for: 1 to 4 are guidance by inversion's, 5 is CADS's, 6
chooses an exemplar to start from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def random_at(key: int, *place: int) -> np.random.RandomState:
    """A generator for one place of one key's own: Philox with the place (three words) in the upper part of its counter.

    With any word above 0 it shares no number with the image's own noise, which starts at counter 0.
    """
    return np.random.RandomState(np.random.Philox(key=key, counter=[0, *place]))


def normal(keys: Sequence[int], shape: tuple[int, ...], *place: int) -> Tensor:
    """Standard normal noise for each key, (n, *shape) float32 on the CPU."""
    drawn = [random_at(key, *place).standard_normal(shape).astype(np.float32) for key in keys]
    return torch.from_numpy(np.stack(drawn))
