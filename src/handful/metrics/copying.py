"""Copying: are generated images nearer to the exemplars than other real images are?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from handful.metrics.neighbours import nearest


def copied_share(
    generated: Mapping[str, Any], exemplars: Mapping[str, Any], real: Mapping[str, Any], quantile: float = 0.01
) -> float:
    """Share of generated images that are suspiciously near to an exemplar of their class.

    Suspicious is nearer than the `quantile` of the real images' own distances to their nearest exemplar, class by class.
    Real images score `quantile` themselves; a model of typical images scores more without copying, because typical images
    lie near each other: compare with what it scores unguided.

    Args:
        generated, exemplars, real: Features (n, D) by class, of the same classes; pixels find copies, semantic features find
            paraphrases. The real images must not be the exemplars.

    Returns:
        0 to 1.
    """
    return float(copied(generated, exemplars, real, quantile).mean())


def copied(
    generated: Mapping[str, Any], exemplars: Mapping[str, Any], real: Mapping[str, Any], quantile: float = 0.01
) -> np.ndarray:
    """Which generated images `copied_share` counts, (n,) bool, class after class in the order of `generated`."""
    return np.concatenate(
        [
            nearer(nearest(features, exemplars[name])[0], nearest(real[name], exemplars[name])[0], quantile)
            for name, features in generated.items()
        ]
    )


def share_nearer(generated: np.ndarray, real: np.ndarray, quantile: float = 0.01) -> float:
    """The same of one class, from distances (n,) and (m,) to the nearest exemplar, whatever measured them."""
    return float(nearer(generated, real, quantile).mean())


def nearer(generated: np.ndarray, real: np.ndarray, quantile: float = 0.01) -> np.ndarray:
    """Which of one class's distances to the nearest exemplar, (n,), lie below the quantile of the real images', (m,)."""
    return generated < np.quantile(real, quantile)
