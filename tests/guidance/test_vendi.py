"""The Vendi score as a potential and c-VSG: values against the metric, gradients by differences, the paper's own step."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.drawn import normal
from torch import Tensor, nn

from handful.core.denoiser import Condition, Denoiser
from handful.core.noise import VP, Level
from handful.core.samplers import ddim
from handful.errors import RequestError
from handful.features.registry import FeatureExtractor, pixels
from handful.guidance import CVSG, Guided, Pull, Vendi, vendi_score
from handful.guidance.cvsg import CVSGRequest
from handful.guidance.method import Context, make_terms
from handful.metrics import vendi
from handful.models import load
from handful.recipe.file import read_recipe
from handful.recipe.resolve import complete

ORDERS = [0.5, 1.0, 2.0, math.inf]
RECIPE = Path(__file__).parents[2] / "recipes" / "sd15-cvsg.yaml"


def duplicated() -> Tensor:
    """Six rows of which two pairs are alike."""
    rows = normal(4, 8, seed=3)
    return rows[[0, 0, 1, 2, 2, 3]]


# --- the score ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (1, 7), (7, 1)])
def test_the_score_is_the_metrics(shape, order):
    features = normal(*shape, seed=1)
    assert float(vendi_score(features, order)) == pytest.approx(vendi(features.numpy(), order), rel=1e-8)


@pytest.mark.parametrize("order", ORDERS)
def test_so_it_is_with_duplicates_and_in_float32(order):
    features = duplicated()
    assert float(vendi_score(features, order)) == pytest.approx(vendi(features.numpy(), order), rel=1e-6)
    assert float(vendi_score(features.float(), order)) == pytest.approx(vendi(features.numpy(), order), rel=1e-5)


def test_images_alike_score_one_and_orthogonal_ones_their_number():
    assert float(vendi_score(torch.ones(6, 4))) == pytest.approx(1)
    assert float(vendi_score(torch.eye(5, 9))) == pytest.approx(5)


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_its_gradient_is_the_finite_difference(shape, order):
    features = normal(*shape, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: vendi_score(f, order), (features,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "features",
    [duplicated(), torch.ones(4, 3), torch.zeros(3, 2), torch.eye(4, dtype=torch.float64)],
    ids=["pairs", "all alike", "nothing", "orthogonal"],
)
def test_its_gradient_is_finite_where_eigenvalues_coincide_or_vanish(features, order):
    leaf = features.double().requires_grad_()
    (gradient,) = torch.autograd.grad(vendi_score(leaf, order), leaf)
    assert gradient.isfinite().all()
    if not features.any():
        assert float(vendi_score(features, order)) == 1


def test_at_duplicates_the_gradient_is_that_of_the_distinct_images_weighted():
    """Moved together, two images alike change the score as the finite difference says; it knows no order among them."""
    features, move = duplicated().requires_grad_(), torch.zeros(6, 8, dtype=torch.float64)
    move[:2] = normal(8, seed=7)
    (gradient,) = torch.autograd.grad(vendi_score(features), features)
    step = 1e-6
    with torch.no_grad():
        wanted = (vendi_score(features + step * move) - vendi_score(features - step * move)) / (2 * step)
    assert float((gradient * move).sum()) == pytest.approx(float(wanted), rel=1e-4)
    torch.testing.assert_close(gradient[0], gradient[1], rtol=1e-6, atol=1e-9)


def test_a_permuted_cohort_has_the_permuted_gradient():
    features, order = normal(6, 5, seed=4), torch.tensor([3, 0, 5, 1, 4, 2])

    def gradient(rows: Tensor) -> Tensor:
        leaf = rows.clone().requires_grad_()
        return torch.autograd.grad(Vendi(pixels(), 1.0).energy(leaf), leaf)[0]

    torch.testing.assert_close(gradient(features[order]), gradient(features)[order], rtol=1e-9, atol=1e-12)


# --- the terms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_vendi_guidance_lowers_minus_the_score(order):
    features = normal(5, 9, seed=1)
    found = Vendi(pixels(), 1.0, order=order).energy(features)
    assert found.shape == ()
    assert float(found) == pytest.approx(-vendi(features.numpy(), order), rel=1e-8)


@pytest.mark.parametrize("beta", [0.0, 2.0, 3.5])
@pytest.mark.parametrize("memory", [None, normal(3, 9, seed=8)], ids=["no memory", "memory"])
def test_cvsg_is_new_against_the_memory_and_nothing_new_against_the_exemplars(memory, beta):
    """The paper's formula by the metric: VS(memory + Y) - beta VS(exemplars + Y), maximised."""
    exemplars, features = normal(4, 9, seed=5), normal(6, 9, seed=6)
    before = np.empty((0, 9)) if memory is None else memory.numpy()
    both = np.concatenate([exemplars.numpy(), features.numpy()])
    wanted = beta * vendi(both) - vendi(np.concatenate([before, features.numpy()]))
    found = CVSG(pixels(), exemplars, 1.0, beta=beta, memory=memory).energy(features)
    assert float(found) == pytest.approx(wanted, rel=1e-8)


def test_without_exemplars_weight_and_memory_it_is_vendi_guidance_to_the_bit():
    features = normal(6, 9, seed=6)
    assert torch.equal(CVSG(pixels(), normal(2, 9), 1.0, beta=0.0).energy(features), Vendi(pixels(), 1.0).energy(features))


def test_a_memory_of_these_very_images_asks_for_others():
    """One image, remembered before: the gradient vanishes only where nothing is remembered."""
    image, memory = normal(1, 9, seed=6), normal(3, 9, seed=7)

    def gradient(memory: Tensor | None) -> Tensor:
        leaf = image.clone().requires_grad_()
        term = CVSG(pixels(), normal(2, 9), 1.0, beta=0.0, memory=memory)
        return torch.autograd.grad(term.energy(leaf), leaf)[0]

    assert float(gradient(None).abs().max()) < 1e-9, "alone an image has the score 1, whatever it is"
    assert float(gradient(memory).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_energy_follows_the_precision_of_the_features(dtype):
    term = CVSG(pixels(), normal(3, 9), 1.0, memory=normal(2, 9))
    assert term.energy(normal(4, 9).to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("order", lambda: Vendi(pixels(), 1.0, order=0.0)),
        ("order", lambda: Vendi(pixels(), 1.0, order=math.nan)),
        ("beta", lambda: CVSG(pixels(), normal(2, 4), 1.0, beta=-1.0)),
        ("beta", lambda: CVSG(pixels(), normal(2, 4), 1.0, beta=math.inf)),
        ("exemplars", lambda: CVSG(pixels(), normal(0, 4), 1.0)),
        ("scale", lambda: Vendi(pixels(), -1.0)),
    ],
)
def test_impossible_settings_are_refused_by_name(field, make):
    with pytest.raises(RequestError, match=f"^{field}: "):
        make()


def test_scale_zero_is_no_guidance_and_above_it_a_cohort_of_digits_grows_more_diverse():
    denoiser = load("digits")
    levels, condition = denoiser.levels.spacing(6), denoiser.condition([3] * 8)
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    real = torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def sampled(*terms: Vendi | CVSG) -> Tensor:
        return ddim(Guided(denoiser, terms), x, levels, condition)

    plain = sampled()
    pull = Pull("gaussian")
    assert torch.equal(sampled(Vendi(pixels(), 0.0, pull=pull), CVSG(pixels(), real, 0.0, pull=pull)), plain)
    diverse = sampled(Vendi(pixels(), 0.3, pull=pull))
    assert vendi(diverse.flatten(1).numpy()) > 1.05 * vendi(plain.flatten(1).numpy())


# --- the paper's own step ----------------------------------------------------------------------------------------------


class Latents(Denoiser):
    """A smooth eps network of latents with a decoder, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.levels = (2, 4, 4), VP.linear()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 2, 3, padding=1)).double()
            self.decoder = nn.Conv2d(2, 3, 1).double()
        self.requires_grad_(False)

    def condition(self, labels) -> Condition:
        return Condition()

    def eps(self, x_t: Tensor) -> Tensor:
        return self.body(x_t)

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        return (x_t - level.sigma * self.eps(x_t)) / level.alpha

    def decode(self, x0: Tensor) -> Tensor:
        return torch.tanh(self.decoder(x0))


def clip_like() -> FeatureExtractor:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 5)).double()
    return FeatureExtractor("clip", network)


def by_the_recipe(exemplars: Tensor, extractor: FeatureExtractor) -> CVSG:
    """The term that recipes/sd15-cvsg.yaml asks for."""
    recipe, _ = complete(read_recipe(RECIPE))
    assert recipe.guidance is not None
    (term,) = make_terms(recipe.guidance, Context({"clip": extractor}, {("clip", 1): exemplars}))
    assert isinstance(term, CVSG)
    return term


def test_the_preset_is_the_papers_settings():
    recipe, _ = complete(read_recipe(RECIPE))
    assert recipe.guidance is not None
    (asked,) = recipe.guidance
    assert isinstance(asked, CVSGRequest)
    assert (recipe.sampler.name, recipe.sampler.steps, recipe.sampler.eta, asked.every) == ("ddim", 50, 0.0, 5)
    assert (asked.beta, asked.scale, asked.hold, asked.features) == (2.0, 0.05, False, "clip")


def independent_gradient(denoiser: Latents, x_t: Tensor, t: Level, exemplars: Tensor, extractor: FeatureExtractor) -> Tensor:
    """d (VS(Y) - 2 VS(exemplars + Y)) / d x_t by plain autograd, of what the paper decodes."""

    def score(rows: Tensor) -> Tensor:
        unit = rows / rows.norm(dim=1, keepdim=True)
        shares = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp_min(1e-12)
        return torch.exp(-(shares * shares.log()).sum())

    leaf = x_t.clone().requires_grad_()
    alphabar = t.alpha**2
    x0_hat = (leaf - (1 - alphabar).sqrt() * denoiser.eps(leaf)) / alphabar.sqrt()
    seen = extractor(denoiser.decode(x0_hat * (1 - alphabar).sqrt() + leaf * (1 - (1 - alphabar).sqrt())))
    (gradient,) = torch.autograd.grad(score(seen) - 2 * score(torch.cat([exemplars, seen])), leaf)
    return gradient


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("index", [4, 24, 44])
def test_one_ddim_step_by_the_preset_is_the_papers_rule(index: int, chunk: int | None):
    """eps held fixed, x_s moves by (alpha_s / alpha_t) g, g the gradient rescaled to 0.05 |x_t|, image by image."""
    denoiser, extractor, exemplars = Latents(), clip_like(), normal(3, 5, seed=5)
    levels = denoiser.levels.spacing(50)
    x_t, t, s = 1.3 * normal(4, 2, 4, 4, seed=6), levels[index], levels[index + 1]
    gradient = independent_gradient(denoiser, x_t, t, exemplars, extractor)
    size = x_t.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
    g = 0.05 * size[:, None, None, None] * gradient
    eps = denoiser.eps(x_t)
    wanted = s.alpha * (x_t - t.sigma * eps) / t.alpha + s.sigma * eps + (s.alpha / t.alpha) * g

    guided = Guided(denoiser, [by_the_recipe(exemplars, extractor)], chunk=chunk)
    x = guided.enter(x_t, levels, index, Condition())
    x0 = guided(x, t, Condition())
    assert torch.equal(x0, denoiser(x_t, t, Condition())), "eps is held: the estimate is the model's own"
    x_s = guided.leave(s.alpha * x0 + s.sigma * (x - t.alpha * x0) / t.sigma, levels, index)
    torch.testing.assert_close(x_s, wanted, rtol=1e-7, atol=1e-9)
    assert float((g.flatten(1).norm(dim=1) / x_t.flatten(1).norm(dim=1) - 0.05).abs().max()) < 1e-12
    assert not torch.allclose(wanted, wanted - (s.alpha / t.alpha) * g, atol=1e-3), "the guidance must matter"


def test_for_one_image_the_norm_over_it_is_that_over_the_whole_latent():
    """As the paper, which generates one at a time, has it; its memory is then what makes it differ."""
    denoiser, extractor, exemplars = Latents(), clip_like(), normal(3, 5, seed=5)
    levels, x_t = denoiser.levels.spacing(50), 1.3 * normal(1, 2, 4, 4, seed=6)
    guided = Guided(denoiser, [by_the_recipe(exemplars, extractor)])
    guided(x_t, levels[24], Condition())
    move = guided.leave(torch.zeros_like(x_t), levels, 24)
    assert float(move.norm() / x_t.norm()) == pytest.approx(0.05 * float(levels[25].alpha / levels[24].alpha), rel=1e-9)


def test_between_its_fifth_steps_the_sampler_is_plain_ddim_to_the_bit():
    denoiser, extractor, exemplars = Latents(), clip_like(), normal(3, 5, seed=5)
    levels, x = denoiser.levels.spacing(50).last(4), normal(2, 2, 4, 4, seed=6)
    guided = Guided(denoiser, [by_the_recipe(exemplars, extractor)])
    assert torch.equal(ddim(guided, x, levels, Condition()), ddim(denoiser, x, levels, Condition()))
