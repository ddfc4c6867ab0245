"""The Chamfer distance: its formula, its gradient, and what must not change them."""

import pytest
import torch
from support.drawn import normal
from torch import Tensor

from handful.errors import RequestError
from handful.features.registry import pixels
from handful.guidance import Chamfer, chamfer_distance
from handful.guidance.chamfer import COVERAGE_WEIGHT, ChamferRequest, spacing
from handful.guidance.distances import squared_distances


def naive(exemplars: Tensor, generated: Tensor, w_c: float = 1.0, w_f: float = 1.0) -> float:
    """Equation 4, word for word."""

    def d(a: Tensor, b: Tensor) -> float:
        return sum((p - q) ** 2 for p, q in zip(a.tolist(), b.tolist(), strict=True))

    coverage = sum(min(d(x, y) for y in generated) for x in exemplars) / len(exemplars)
    fidelity = sum(min(d(y, x) for x in exemplars) for y in generated) / len(generated)
    return w_c * coverage + w_f * fidelity


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 5), (4, 1), (3, 7), (8, 5)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (4.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_the_distance_is_the_papers_formula(k, n, weights):
    exemplars, generated = normal(k, 6, seed=1), normal(n, 6, seed=2)
    found = float(chamfer_distance(exemplars, generated, *weights))
    assert found == pytest.approx(naive(exemplars, generated, *weights), rel=1e-12)


def test_the_energy_of_the_term_is_the_distance_with_its_weights():
    exemplars, generated = normal(3, 6, seed=1), normal(5, 6, seed=2)
    term = Chamfer(pixels(), exemplars, 0.2, coverage_weight=4.0, fidelity_weight=0.5)
    assert float(term.energy(generated)) == pytest.approx(naive(exemplars, generated, 4.0, 0.5), rel=1e-12)
    assert (term.per, term.name, term.scale) == ("set", "chamfer", 0.2)


def test_the_energy_follows_the_precision_of_the_features():
    term = Chamfer(pixels(), normal(3, 6), 0.2)
    for dtype in (torch.float32, torch.float64):
        assert term.energy(normal(5, 6, seed=2).to(dtype)).dtype == dtype


@pytest.mark.parametrize("weights", [(1.0, 1.0), (4.0, 1.0)])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 6), (6, 2)])
def test_the_gradient_is_the_finite_difference(k, n, weights):
    exemplars = normal(k, 4, seed=3)
    generated = normal(n, 4, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: chamfer_distance(exemplars, y, *weights), (generated,), eps=1e-6, atol=1e-7)


def test_the_gradient_pulls_the_nearest_image_to_each_exemplar_and_each_image_to_its_exemplar():
    exemplars = torch.tensor([[0.0, 0.0], [10.0, 0.0]], dtype=torch.float64)
    generated = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 1.0]], dtype=torch.float64).requires_grad_()
    # exemplar 0 is covered by image 0, exemplar 1 by image 2 (49 + 1); all images are nearest exemplar 0
    (coverage,) = torch.autograd.grad(chamfer_distance(exemplars, generated, 1.0, 0.0), generated)
    torch.testing.assert_close(coverage, torch.tensor([[1.0, 0], [0, 0], [-7, 1]], dtype=torch.float64))
    (fidelity,) = torch.autograd.grad(chamfer_distance(exemplars, generated, 0.0, 1.0), generated)
    torch.testing.assert_close(fidelity, 2 / 3 * torch.tensor([[1.0, 0], [2, 0], [3, 1]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_common_offset_of_the_features_costs_no_precision(dtype):
    """Norms of 1e4 and distances of 1: without care the expansion |a|^2 + |b|^2 - 2ab loses all of float32's digits."""
    exemplars, generated = normal(4, 6, seed=5), normal(9, 6, seed=6)
    offset = torch.full((6,), 4096.0, dtype=torch.float64)  # a power of two: adding it rounds, but each feature alone
    a, b = (exemplars + offset).to(dtype), (generated + offset).to(dtype)
    wanted = (a.double()[:, None] - b.double()[None]).square().sum(2)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(squared_distances(a, b).double(), wanted, rtol=tolerance, atol=tolerance)
    leaf = b.clone().requires_grad_()
    (found,) = torch.autograd.grad(chamfer_distance(a, leaf), leaf)
    near = b.double().requires_grad_()
    (exact,) = torch.autograd.grad(chamfer_distance(a.double(), near), near)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)


def test_the_distance_of_a_set_to_itself_is_zero_and_so_is_its_gradient():
    exemplars = normal(5, 6, seed=7)
    generated = exemplars[torch.tensor([3, 1, 4, 0, 2])].clone().requires_grad_()
    distance = chamfer_distance(exemplars, generated)
    assert float(distance.detach()) < 1e-12
    (gradient,) = torch.autograd.grad(distance, generated)
    assert float(gradient.abs().max()) < 1e-12  # squared distances: no square root's infinite slope at 0


def test_the_order_of_images_and_exemplars_does_not_matter():
    exemplars, generated = normal(4, 6, seed=8), normal(7, 6, seed=9)
    one = chamfer_distance(exemplars, generated)
    for order in (torch.arange(7).flip(0), torch.tensor([3, 0, 6, 1, 5, 2, 4])):
        torch.testing.assert_close(chamfer_distance(exemplars.flip(0), generated[order]), one)


def test_repeating_the_exemplars_or_the_images_changes_nothing():
    exemplars, generated = normal(4, 6, seed=8), normal(7, 6, seed=9)
    one = chamfer_distance(exemplars, generated)
    torch.testing.assert_close(chamfer_distance(exemplars.repeat(3, 1), generated), one)
    torch.testing.assert_close(chamfer_distance(exemplars, generated.repeat(2, 1)), one)


def test_the_exemplars_get_no_gradient():
    exemplars = normal(3, 6).requires_grad_()
    term = Chamfer(pixels(), exemplars, 0.2)
    term.energy(normal(5, 6, seed=2).requires_grad_()).backward()
    assert exemplars.grad is None


# --- with a margin -----------------------------------------------------------------------------------------------------


def test_an_exemplars_spacing_is_the_squared_distance_to_its_nearest_other():
    exemplars = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(spacing(exemplars), torch.tensor([1.0, 9.0, 16.0, 1.0], dtype=torch.float64))
    assert spacing(exemplars[:1]).tolist() == [0.0]


def test_a_margin_takes_each_exemplars_own_spacing_off_its_distances():
    exemplars, generated, m = normal(4, 6, seed=10), normal(7, 6, seed=11), 0.6
    nearest = [min(float((exemplars[i] - exemplars[j]).square().sum()) for j in range(4) if j != i) for i in range(4)]
    d = [
        [max(0.0, float((x - y).square().sum()) - m**2 * s) for y in generated] for x, s in zip(exemplars, nearest, strict=True)
    ]
    wanted = 2 * sum(min(row) for row in d) / 4 + sum(min(row[j] for row in d) for j in range(7)) / 7
    term = Chamfer(pixels(), exemplars, 0.2, coverage_weight=2.0, margin=m)
    assert float(term.energy(generated)) == pytest.approx(wanted, rel=1e-10)


def test_within_the_margin_nothing_pulls_and_outside_it_the_pull_is_the_papers():
    exemplars = torch.tensor([[0.0, 0.0], [4.0, 0.0]], dtype=torch.float64)  # spacing 4: touching within m * 4 = 2
    generated = torch.tensor([[1.9, 0.0], [0.0, 2.1]], dtype=torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(
        Chamfer(pixels(), exemplars, 0.2, coverage_weight=0.0, margin=0.5).energy(generated), generated
    )
    (plain,) = torch.autograd.grad(Chamfer(pixels(), exemplars, 0.2, coverage_weight=0.0).energy(generated), generated)
    assert found[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(found[1], plain[1])
    assert float(plain[0].abs().max()) > 1


def test_margin_zero_is_the_papers_formula_to_the_bit():
    exemplars, generated = normal(4, 6, seed=10), normal(7, 6, seed=11)
    term = Chamfer(pixels(), exemplars, 0.2, margin=0.0, coverage_weight=1.0)
    assert torch.equal(term.energy(generated), chamfer_distance(exemplars, generated))


def test_the_coverage_weight_has_one_default_in_python_and_in_recipes():
    exemplars, generated = normal(4, 6, seed=10), normal(7, 6, seed=11)
    assert ChamferRequest().coverage_weight == COVERAGE_WEIGHT == 4
    assert torch.equal(Chamfer(pixels(), exemplars, 0.2).energy(generated), chamfer_distance(exemplars, generated, 4.0, 1.0))


def test_a_negative_margin_is_refused_by_name():
    with pytest.raises(RequestError, match=r"^margin: "):
        Chamfer(pixels(), normal(3, 6), 0.2, margin=-0.5)


def test_a_single_exemplar_has_no_margin_and_that_is_said():
    exemplar, generated = normal(1, 6), normal(4, 6, seed=1)
    with_margin, without = (Chamfer(pixels(), exemplar, 0.2, margin=m).energy(generated) for m in (0.75, 0.0))
    assert torch.equal(with_margin, without)
    assert ChamferRequest(margin=0.75).of_few(1).startswith("margin: none for a class with a single exemplar")
    assert not ChamferRequest(margin=0.75).of_few(2)
    assert not ChamferRequest(margin=0.0).of_few(1)


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [torch.zeros(0, 6), torch.zeros(6), torch.zeros(2, 3, 4)])
def test_exemplars_that_are_no_feature_rows_are_refused_by_name(features):
    with pytest.raises(RequestError, match=r"^exemplars: .*at least one exemplar"):
        Chamfer(pixels(), features, 0.2)


@pytest.mark.parametrize("weights", [(-1.0, 1.0), (1.0, -0.1), (0.0, 0.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_impossible_weights_are_refused_by_name(weights):
    with pytest.raises(RequestError, match=r"^(coverage|fidelity)_weight: "):
        Chamfer(pixels(), normal(2, 6), 0.2, coverage_weight=weights[0], fidelity_weight=weights[1])


def test_a_negative_scale_is_refused_by_name():
    with pytest.raises(RequestError, match=r"^scale: -0.2: "):
        Chamfer(pixels(), normal(2, 6), -0.2)
