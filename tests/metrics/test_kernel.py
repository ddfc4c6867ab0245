"""Kernel distances, FD-infinity and authenticity are equal to published formulas and to torchmetrics, to 1e-5 or better.

Sources: KID, KD: torchmetrics' `poly_mmd`, Binkowski et al. 2018 (subsets). CMMD: Jayasumana et al. 2024, its formula.
FD-infinity: Chong & Forsyth 2020, with dgm-eval's numbers of images. Authenticity: dgm-eval's AuthPct / 100.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import maximum_mean_discrepancy, poly_mmd

from handful.errors import RequestError
from handful.metrics import authenticity, cmmd, frechet, frechet_at_infinity, kernel_distance

RNG = np.random.default_rng(0)
REAL, MADE = RNG.normal(size=(60, 7)), 0.8 * RNG.normal(size=(60, 7)) + 0.3


def test_the_kernel_distance_is_torchmetrics_of_the_whole_sets():
    x, y = torch.from_numpy(REAL), torch.from_numpy(MADE)
    kernel = [(a @ b.T / 7 + 1) ** 3 for a, b in ((x, x), (x, y), (y, y))]
    assert kernel_distance(REAL, MADE) == pytest.approx(float(maximum_mean_discrepancy(*kernel)), rel=1e-9)
    assert kernel_distance(REAL, MADE) == pytest.approx(float(poly_mmd(x, y)), rel=1e-9)


def test_the_kernel_distance_by_subsets_is_the_published_loop():
    draw, found = np.random.default_rng(3), []
    for _ in range(5):
        x, y = (of[draw.choice(60, 20, replace=False)] for of in (REAL, MADE))
        xx, yy, xy = ((a @ b.T / 7 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        off = ~np.eye(20, dtype=bool)
        found.append(xx[off].sum() / 380 + yy[off].sum() / 380 - 2 * xy.sum() / 400)
    assert kernel_distance(REAL, MADE, subsets=5, size=20, seed=3) == pytest.approx(np.mean(found), rel=1e-10)


def test_cmmd_is_its_formula_pair_by_pair():
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (REAL, MADE[:40]))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[np.exp(-np.sum((p - q) ** 2) / 200) for q in b] for p in a]))

    assert cmmd(REAL, 3 * MADE[:40]) == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-7)
    assert cmmd(REAL, REAL) == pytest.approx(0, abs=1e-9)


def test_frechet_at_infinity_takes_the_bias_of_few_images_away():
    rng = np.random.default_rng(1)
    real, made = rng.normal(size=(20000, 4)), rng.normal(size=(600, 4))
    assert abs(frechet_at_infinity(real, made)) < frechet(real, made[:60]) / 3  # one distribution: the truth is 0
    sizes = np.linspace(60, 600, 15).astype(int)  # the line by hand, from the same draws
    draw = np.random.default_rng(0)
    y = [frechet(real, made[draw.choice(600, size, replace=False)]) for size in sizes]
    assert frechet_at_infinity(real, made) == pytest.approx(np.polyfit(1 / sizes, y, 1)[1], rel=1e-5, abs=1e-9)


def test_frechet_at_infinity_begins_at_5000_images_as_dgm_eval_does():
    rng = np.random.default_rng(2)
    real, made = rng.normal(size=(500, 2)), rng.normal(size=(60_000, 2))
    sizes = np.linspace(5000, 60_000, 15).astype("int32")
    draw = np.random.default_rng(0)
    y = [frechet(real, made[draw.choice(60_000, size, replace=False)]) for size in sizes]
    slope, wanted = np.linalg.lstsq(np.stack([1 / sizes, np.ones(15)], 1), np.array(y), rcond=None)[0]
    assert frechet_at_infinity(real, made) == pytest.approx(wanted, rel=1e-5)
    assert slope != 0


def test_authenticity_is_dgm_evals_share_and_copies_have_none():
    """dgm-eval: authentic where d(real nearest to it, its own nearest real) < d(generated, real nearest to it)."""
    among = np.linalg.norm(REAL[:, None] - REAL[None], axis=2)
    np.fill_diagonal(among, np.inf)
    across = np.linalg.norm(REAL[:, None] - MADE[None], axis=2)
    closest = across.argmin(0)
    wanted = np.mean(among.min(1)[closest] < across[closest, np.arange(60)])
    assert authenticity(REAL, MADE) == wanted
    assert 0 < wanted < 1
    assert authenticity(REAL, REAL + 1e-6) == 0


def test_sets_that_are_too_small_are_refused():
    for metric, real, made in ((kernel_distance, 5, 1), (frechet_at_infinity, 5, 19), (authenticity, 1, 5)):
        with pytest.raises(RequestError, match="needs"):
            metric(REAL[:real], MADE[:made])
