"""Copies are found, and real images are what they are measured by."""

from __future__ import annotations

import numpy as np
import pytest

from handful.metrics.copying import copied_share


def _cloud(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 8))


def test_exact_copies_are_all_found():
    exemplars = _cloud(16, 0)
    assert copied_share({"a": exemplars[:5]}, {"a": exemplars}, {"a": _cloud(500, 1)}) == 1.0


def test_real_images_score_the_quantile_themselves():
    # 4,000 draws at 5 %: five standard deviations are 1.7 points, a false alarm in a million
    share = copied_share({"a": _cloud(4000, 2)}, {"a": _cloud(16, 0)}, {"a": _cloud(20000, 1)}, quantile=0.05)
    assert share == pytest.approx(0.05, abs=0.02)


def test_each_class_is_measured_by_its_own_exemplars():
    exemplars = {"a": _cloud(16, 0), "b": _cloud(16, 0) + 100}
    real = {"a": _cloud(500, 1), "b": _cloud(500, 1) + 100}
    swapped = {"a": exemplars["b"], "b": exemplars["a"]}
    assert copied_share(swapped, exemplars, real) == 0.0
