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
    flags = []
    for name, features in generated.items():
        limit = np.quantile(nearest(real[name], exemplars[name])[0], quantile)
        flags.append(nearest(features, exemplars[name])[0] < limit)
    return float(np.concatenate(flags).mean())
