"""Energy-distance guidance: the formula, its gradient, and what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from handful.errors import RequestError
from handful.features.registry import FeatureExtractor
from handful.guidance import Chamfer, Energy, energy_distance


def _draw(n: int, seed: int, width: int = 5) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _naive(x: torch.Tensor, y: torch.Tensor) -> float:
    across = sum(float((a - b).norm()) for a in x for b in y) / (len(x) * len(y))
    within = sum(float((a - b).norm()) for a in y for b in y) / len(y) ** 2
    return 2 * across - within


def test_it_is_the_double_sum_of_its_formula():
    x, y = _draw(3, 0), _draw(7, 1)
    # the rounding at zero distance stays below a thousandth of the mean distance
    assert float(energy_distance(x, y)) == pytest.approx(_naive(x, y), rel=1e-3)


def test_its_gradient_is_that_of_finite_differences():
    x, y = _draw(3, 0), _draw(4, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: energy_distance(x, v), (y,), eps=1e-7, atol=1e-4)


def test_its_gradient_is_finite_where_images_coincide():
    y = _draw(4, 1)
    y = torch.cat([y, y[:1]]).requires_grad_()
    (gradient,) = torch.autograd.grad(energy_distance(y.detach()[:2], y), y)
    assert gradient.isfinite().all()


def test_permuting_the_cohort_changes_nothing_and_permutes_the_gradient():
    x, y, order = _draw(3, 0), _draw(6, 1), torch.tensor([3, 0, 5, 1, 4, 2])
    gradients = []
    for given in (y, y[order]):
        leaf = given.clone().requires_grad_()
        gradients.append(torch.autograd.grad(energy_distance(x, leaf), leaf)[0])
    torch.testing.assert_close(gradients[0][order], gradients[1])


def test_it_is_lowest_where_both_sets_have_one_distribution():
    # 2,000 against 2,000 draws: the distances between distributions are far above their noise of about 0.02
    x = _draw(2000, 0)
    y = _draw(2000, 1)
    sets = {"same": y, "narrow": 0.5 * y, "wide": 2 * y, "off": y + 1}
    at = {name: float(energy_distance(x, generated)) for name, generated in sets.items()}
    assert min(at, key=lambda name: at[name]) == "same"


def test_with_few_exemplars_it_spreads_the_pull_that_chamfer_puts_on_k_images():
    exemplars, y = _draw(2, 0) * 3, _draw(64, 1)
    extractor = FeatureExtractor("flat", nn.Identity(), channels=None)
    shares = []
    for term in (Chamfer(extractor, exemplars, 1.0, coverage_weight=4.0), Energy(extractor, exemplars, 1.0)):
        leaf = y.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(term.energy(leaf), leaf)
        power = gradient.square().sum(1)
        shares.append(float(power.topk(2).values.sum() / power.sum()))
    chamfer, energy = shares
    assert chamfer > 0.9, "two images take nearly the whole of Chamfer's pull"
    assert energy < 0.2, "and no more than a few of 64 shares of the energy distance's"


def test_no_exemplar_is_refused_by_name():
    with pytest.raises(RequestError, match="at least one exemplar"):
        Energy(FeatureExtractor("flat", nn.Identity(), channels=None), torch.zeros(0, 4), 1.0)
