"""TFG and those it unites (universal guidance, FreeDoM, MPGD, DPS) as options, each against its own paper's rule written out.

TFG (Ye et al., NeurIPS 2024, arXiv 2409.15761, algorithm 1) at each step, N_recur times:

    f~(x)   = mean over delta ~ N(0, 1) of f(x + gamma sigma_t delta)
    Delta_t = rho_t grad_{x_t} log f~(x0_hat(x_t))
    Delta_0 = N_iter times  Delta_0 += mu_t grad_{x0} log f~(x0_hat + Delta_0)
    x_s     = Sample(x_t, x0_hat) + (alpha_s / alpha_t) Delta_t + alpha_s Delta_0;   x_t is drawn again from x_s

The strengths that Guided has for them, without normalisation, are rho_t = scale sigma_t^2, and mu_t = scale sigma_t^2 with the
gaussian jacobian (variance-preserving models) or scale sigma_t^2 / alpha_t with the identity's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from support.drawn import normal
from torch import Tensor, nn

from handful.core.denoiser import Condition, Denoiser
from handful.core.noise import VP, Level, Levels
from handful.core.samplers import ddim, ddpm
from handful.errors import RequestError
from handful.features.registry import FeatureExtractor, pixels
from handful.guidance import Chamfer, Classifier, Guidance, Guided, Potential, Pull, Smoothing, Timing

SHAPE, N, STEPS = (1, 4, 4), 4, 5
TARGETS = torch.tensor([0, 1, 2, 1])
CONDITION = Condition()


class Smooth(Denoiser):
    """A smooth network in pixels that predicts v, so that no level blows its error up; all in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.levels = SHAPE, VP.cosine()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 1, 3, padding=1)).double()
        self.requires_grad_(False)

    def condition(self, labels: Any) -> Condition:
        return CONDITION

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        return t.sigma * x_t + t.alpha * self.body(x_t)

    def x0_hat(self, x_t: Tensor, t: Level) -> Tensor:
        return t.alpha * x_t - t.sigma * self.body(x_t)

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        return self.x0_hat(x_t, level)


@cache
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()


def classifier(scale: float, pull: Pull, timing: Timing | None = None) -> Classifier:
    classify = network()
    return Classifier(FeatureExtractor("c", classify, channels=1, classify=classify), TARGETS, scale, timing=timing, pull=pull)


def log_f(x0: Tensor) -> Tensor:
    """log p(y | x), (n,)."""
    return torch.log_softmax(network()(x0), 1)[torch.arange(len(x0)), TARGETS[: len(x0)]]


def smoothed(draws: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """log of the mean of f over x plus each of the draws."""

    def log_mean(x0: Tensor) -> Tensor:
        return torch.stack([log_f(x0 + delta).exp() for delta in draws]).mean(0).log()

    return log_mean


def gradient(of: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.detach().clone().requires_grad_()
    return torch.autograd.grad(of(leaf).sum(), leaf)[0]


class Noise:
    """The same sequence of noise for a sampler and for the loop it is compared with."""

    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(9)

    def __call__(self) -> Tensor:
        return torch.randn(N, *SHAPE, dtype=torch.float64, generator=self.draw)


def path(steps: int = STEPS) -> Levels:
    return VP.cosine().spacing(steps + 1).last(steps)  # from alpha = 0.26 on


def start() -> Tensor:
    return normal(N, *SHAPE, seed=3)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def draws_of(smoothing: Smoothing, t: Level) -> list[Tensor]:
    """The deltas of a step, times their deviation."""
    return list(smoothing.views(torch.zeros(N, *SHAPE, dtype=torch.float64), t))


Step = Callable[[Tensor, Level, Level, Noise], Tensor]


def walked(step: Step, recurrence: int = 1) -> Tensor:
    """A sampler of one's own: `step` takes x_t to x_s, which is noised again and repeated; the last step needs no noise."""
    x, noise = start(), Noise()
    for t, s in path().pairs():
        for more in reversed(range(recurrence)):
            x = step(x, t, s, noise)
            if more:  # x_t = sqrt(alphabar_t / alphabar_s) x_s + sqrt(1 - alphabar_t / alphabar_s) eps
                part = (t.alpha / s.alpha) ** 2
                x = part.sqrt() * x + (1 - part).sqrt() * noise()
    return x


def sampled(x_t: Tensor, eps: Tensor, t: Level, s: Level, noise: Noise, eta: float) -> Tensor:
    """DDIM's step by alphabars (its paper's equations 12 and 16); eta 1 is DDPM's."""
    a_t, a_s = t.alpha**2, s.alpha**2
    deviation = eta * ((1 - a_s) / (1 - a_t)).sqrt() * (1 - a_t / a_s).sqrt()
    x0 = (x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    mean = a_s.sqrt() * x0 + (1 - a_s - deviation**2).clamp_min(0).sqrt() * eps
    return mean + deviation * noise() if eta and s.sigma > 0 else mean


# --- each method's rule ------------------------------------------------------------------------------------------------

RHO, MU, ITERATIONS, SMOOTHING = 3.0, 0.5, 3, Smoothing(4, noise=0.3)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("recurrence", [1, 2])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_tfg_is_its_algorithm(eta: float, recurrence: int, chunk: int | None):
    denoiser = Smooth()

    def step(x_t: Tensor, t: Level, s: Level, noise: Noise) -> Tensor:
        log_mean = smoothed(draws_of(SMOOTHING, t))
        delta_t = RHO * t.sigma**2 * gradient(lambda x: log_mean(denoiser.x0_hat(x, t)), x_t)
        x0_hat, delta_0 = denoiser.x0_hat(x_t, t), torch.zeros_like(x_t)
        for _ in range(ITERATIONS):
            delta_0 = delta_0 + MU * t.sigma**2 / t.alpha * gradient(log_mean, x0_hat + delta_0)
        return sampled(x_t, denoiser.eps(x_t, t), t, s, noise, eta) + s.alpha / t.alpha * delta_t + s.alpha * delta_0

    terms = [
        classifier(RHO, Pull("exact", "none", rule="held", smoothing=SMOOTHING)),
        classifier(MU, Pull("identity", "none", rule="held", inner=ITERATIONS, smoothing=SMOOTHING)),
    ]
    guided = Guided(denoiser, terms, chunk=chunk)
    wanted = walked(step, recurrence)
    close(ddim(guided, start(), path(), CONDITION, eta=eta, noise=Noise(), recurrence=recurrence), wanted)
    if eta == 1:
        close(ddpm(guided, start(), path(), CONDITION, noise=Noise(), recurrence=recurrence), wanted)
    assert not torch.allclose(wanted, ddim(denoiser, start(), path(), CONDITION, eta=eta, noise=Noise()), atol=0.05)


@pytest.mark.parametrize("recurrence", [1, 3])
def test_universal_guidance_is_its_forward_and_its_backward_rule(recurrence: int):
    """Bansal et al. 2023, arXiv 2302.07121: eps + s(t) grad_{x_t} l with s(t) = s sigma_t, then - (alpha / sigma) Delta_0."""
    denoiser = Smooth()

    def step(x_t: Tensor, t: Level, s: Level, noise: Noise) -> Tensor:
        eps = denoiser.eps(x_t, t) + RHO * t.sigma * gradient(lambda x: -log_f(denoiser.x0_hat(x, t)), x_t)
        clean, delta = denoiser.x0_hat(x_t, t), torch.zeros_like(x_t)
        for _ in range(ITERATIONS):  # gradient descent on l(z0 + Delta)
            delta = delta - MU * t.sigma**2 / t.alpha * gradient(lambda x0: -log_f(x0), clean + delta)
        return sampled(x_t, eps - t.alpha / t.sigma * delta, t, s, noise, 0.0)

    terms = [classifier(RHO, Pull("exact", "none")), classifier(MU, Pull("identity", "none", inner=ITERATIONS))]
    found = ddim(Guided(denoiser, terms), start(), path(), CONDITION, noise=Noise(), recurrence=recurrence)
    close(found, walked(step, recurrence))


@pytest.mark.parametrize("recurrence", [1, 2])
def test_freedom_is_the_ancestral_step_and_the_gradient_at_x_t(recurrence: int):
    """Yu et al. 2023, arXiv 2303.09833, algorithm 2: x_s = m + deviation z - rho_t grad_{x_t} E(c, x0_hat)."""
    denoiser = Smooth()

    def step(x_t: Tensor, t: Level, s: Level, noise: Noise) -> Tensor:
        rho_t = RHO * t.sigma**2 * s.alpha / t.alpha
        pulled = gradient(lambda x: -log_f(denoiser.x0_hat(x, t)), x_t)
        return sampled(x_t, denoiser.eps(x_t, t), t, s, noise, 1.0) - rho_t * pulled

    guided = Guided(denoiser, [classifier(RHO, Pull("exact", "none", rule="held"))])
    found = ddpm(guided, start(), path(), CONDITION, noise=Noise(), recurrence=recurrence)
    close(found, walked(step, recurrence))


@pytest.mark.parametrize("jacobian", ["gaussian", "identity"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_mpgd_moves_the_estimate_alone_and_needs_no_backward_pass_of_the_denoiser(eta: float, jacobian: Any):
    """He et al. 2024, arXiv 2311.16424, algorithm 1: x0_hat - c_t grad_{x0} L, re-mixed with the model's own eps."""
    denoiser = Smooth()

    def step(x_t: Tensor, t: Level, s: Level, noise: Noise) -> Tensor:
        c_t = MU * t.sigma**2 / (1 if jacobian == "gaussian" else t.alpha)
        x0_hat = denoiser.x0_hat(x_t, t)
        moved = x0_hat - c_t * gradient(lambda x0: -log_f(x0), x0_hat)
        plain = sampled(x_t, denoiser.eps(x_t, t), t, s, noise, eta)
        return plain + s.alpha * (moved - x0_hat)

    backwards: list[int] = []
    denoiser.body.register_full_backward_hook(lambda *_: backwards.append(1))
    guided = Guided(denoiser, [classifier(MU, Pull(jacobian, "none", rule="held"))])
    found = ddim(guided, start(), path(), CONDITION, eta=eta, noise=Noise())
    assert not backwards
    close(found, walked(step))


class Measured(Potential):
    """|y - A(x0)|^2 of each image, A the mean of squares of pixels: a linear inverse problem."""

    name, per = "measured", "image"

    def __init__(self, y: Tensor, scale: float, pull: Pull) -> None:
        super().__init__(pixels(), scale, pull=pull)
        self.y = y

    def energy(self, features: Tensor) -> Tensor:
        return (self.y - features.unflatten(1, (2, 8)).mean(1)).square().sum(1)


def test_dps_is_the_ancestral_step_and_the_gradient_of_the_residual():
    """Chung et al. 2023, arXiv 2209.14687, algorithm 1: x_s = x_s' - zeta_t grad_{x_t} |y - A(x0_hat)|^2."""
    denoiser, y = Smooth(), normal(N, 8, seed=4)

    def residual(x0: Tensor) -> Tensor:
        return (y - (x0.flatten(1)[:, :8] + x0.flatten(1)[:, 8:]) / 2).square().sum(1)

    def step(x_t: Tensor, t: Level, s: Level, noise: Noise) -> Tensor:
        zeta_t = 0.4 * t.sigma**2 * s.alpha / t.alpha
        pulled = gradient(lambda x: residual(denoiser.x0_hat(x, t)), x_t)
        return sampled(x_t, denoiser.eps(x_t, t), t, s, noise, 1.0) - zeta_t * pulled

    guided = Guided(denoiser, [Measured(y, 0.4, Pull("exact", "none", rule="held"))])
    found = ddpm(guided, start(), path(), CONDITION, noise=Noise())
    close(found, walked(step))
    plain = ddpm(denoiser, start(), path(), CONDITION, noise=Noise())
    assert float(residual(found).mean()) < 0.5 * float(residual(plain).mean()), "it must fit the measurement"


# --- parity ------------------------------------------------------------------------------------------------------------


def plain_exact(rule: Any) -> list[Guidance]:
    return [classifier(RHO, Pull("exact", "none", rule=rule))]


def tfg_with_nothing_of_its_own(rule: Any) -> list[Guidance]:
    """TFG's terms: mu is 0, though its inner steps are many; views are many, though nothing disturbs them."""
    still = Smoothing(samples=8, noise=0.0)
    return [
        classifier(RHO, Pull("exact", "none", rule=rule, inner=1, smoothing=still)),
        classifier(0.0, Pull("identity", "none", rule=rule, inner=4, smoothing=still)),
    ]


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("rule", ["shift", "held"])
def test_tfg_with_recurrence_one_no_inner_steps_and_no_smoothing_is_plain_exact_guidance_to_the_bit(rule: str, chunk: Any):
    denoiser = Smooth()
    plain, special = (Guided(denoiser, make(rule), chunk) for make in (plain_exact, tfg_with_nothing_of_its_own))
    for t, _ in path().pairs():
        one, other = plain.parts(start(), t, CONDITION), special.parts(start(), t, CONDITION)
        assert torch.equal(one[0], other[0])
        assert (one[1] is None) == (other[1] is None) == (rule == "held")
        assert one[1] is None or other[1] is None or torch.equal(one[1], other[1])
    for sampler, options in ((ddim, {}), (ddim, {"eta": 0.5}), (ddpm, {})):
        found = [sampler(each, start(), path(), CONDITION, noise=Noise(), **options) for each in (plain, special)]
        assert torch.equal(*found)
        again = sampler(special, start(), path(), CONDITION, noise=Noise(), recurrence=1, **options)
        assert torch.equal(again, found[0])


def test_plain_exact_guidance_is_the_scores_own_correction():
    """What it is equal to: x0_hat + (sigma^2 / alpha) scale grad_{x_t} log p(y | x0_hat), by plain autograd."""
    denoiser = Smooth()
    for t, _ in path().pairs():
        score = gradient(lambda x, t=t: log_f(denoiser.x0_hat(x, t)), start())
        wanted = denoiser.x0_hat(start(), t) + t.sigma**2 / t.alpha * RHO * score
        close(Guided(denoiser, tfg_with_nothing_of_its_own("shift"))(start(), t, CONDITION), wanted)


def test_on_the_last_step_the_rules_shift_and_held_coincide():
    denoiser, levels = Smooth(), path().last(1)
    shift, held = (ddim(Guided(denoiser, plain_exact(rule)), start(), levels, CONDITION) for rule in ("shift", "held"))
    close(shift, held)


# --- smoothing and inner steps -----------------------------------------------------------------------------------------


class Bowl(Potential):
    """a / 2 |x|^2 of each image: exp(-U) smoothed by a Gaussian is known."""

    name, per, a = "bowl", "image", 3.0

    def energy(self, features: Tensor) -> Tensor:
        return self.a / 2 * features.square().sum(1)


def test_many_views_give_the_smoothed_likelihoods_own_gradient():
    """E exp(-a |x + s d|^2 / 2) is a Gaussian of variance 1 / a + s^2: its score is -a x / (1 + a s^2).

    Of 2,000 draws the shift's error has a deviation of about 2 % of it; the seed is fixed.
    """
    t = VP.cosine().spacing(5)[2]
    x, amount = torch.tensor([[[[0.4, -0.2]]]], dtype=torch.float64), 0.5
    s = amount * float(t.sigma / t.total)

    class Still(Smooth):
        def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
            return x_t

    pull = Pull("gaussian", "none", smoothing=Smoothing(2_000, noise=amount))
    _, shift = Guided(Still(), [Bowl(pixels(), 1.0, pull=pull)]).parts(x, t, CONDITION)
    assert shift is not None
    radius = float(t.sigma / t.total)
    wanted = -(radius**2) * Bowl.a * x / (1 + Bowl.a * s**2)
    torch.testing.assert_close(shift, wanted, rtol=0.1, atol=0.01)
    assert not torch.allclose(shift, -(radius**2) * Bowl.a * x, rtol=0.3), "the smoothing must matter"


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize(
    "smoothing",
    [Smoothing(3, noise=0.4), Smoothing(2, shift=1), Smoothing(4, flip=True), Smoothing(3, noise=0.2, shift=1, flip=True)],
    ids=["noise", "shift", "flip", "all"],
)
@pytest.mark.parametrize("jacobian", ["exact", "gaussian", "identity"])
def test_a_smoothed_shift_is_that_of_the_mean_likelihood_over_the_views(jacobian: Any, smoothing: Smoothing, chunk: Any):
    denoiser, t = Smooth(), path()[2]

    def log_mean(x0: Tensor) -> Tensor:
        return torch.stack([log_f(view).exp() for view in smoothing.views(x0, t)]).mean(0).log()

    x0_hat = denoiser.x0_hat(start(), t)
    factor = t.sigma**2 / (1 if jacobian == "gaussian" else t.alpha)
    at_x_t = gradient(lambda x: log_mean(denoiser.x0_hat(x, t)), start())
    wanted = x0_hat + 2.0 * factor * (at_x_t if jacobian == "exact" else gradient(log_mean, x0_hat))
    term = classifier(2.0, Pull(jacobian, "none", smoothing=smoothing))
    close(Guided(denoiser, [term], chunk=chunk)(start(), t, CONDITION), wanted)


@pytest.mark.parametrize("chunk", [None, 3])
def test_of_a_set_the_energy_itself_is_averaged(chunk: Any):
    denoiser, t, smoothing, real = Smooth(), path()[2], Smoothing(3, noise=0.4), normal(3, 16, seed=6)

    def energy(x0: Tensor) -> Tensor:
        views = [view.flatten(1) for view in smoothing.views(x0, t)]
        return sum(Chamfer(pixels(), real, 1.0).energy(view) for view in views) / len(views)  # type: ignore[return-value]

    x0_hat = denoiser.x0_hat(start(), t)
    term = Chamfer(pixels(), real, 0.7, pull=Pull("gaussian", "none", smoothing=smoothing))
    close(Guided(denoiser, [term], chunk=chunk)(start(), t, CONDITION), x0_hat - 0.7 * t.sigma**2 * gradient(energy, x0_hat))


def test_views_are_the_same_in_every_run_and_others_at_every_step_and_seed():
    images = normal(2, *SHAPE)

    def views(index: int, seed: int = 0) -> list[Tensor]:
        return list(Smoothing(3, noise=0.4, shift=1).views(images, path()[index], seed))

    for one, other in zip(views(1), views(1), strict=True):
        assert torch.equal(one, other)
    for others in (views(2), views(1, seed=1)):
        assert not any(torch.equal(one, other) for one, other in zip(views(1), others, strict=True))
    assert not torch.equal(*views(1)[:2])


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("inner", [1, 2, 5])
@pytest.mark.parametrize("normalize", ["none", "rms"])
@pytest.mark.parametrize("jacobian", ["gaussian", "identity"])
def test_inner_steps_are_gradient_descent_on_the_estimate(jacobian: Any, normalize: Any, inner: int, chunk: Any):
    denoiser, t, scale = Smooth(), path()[2], 0.3
    x0_hat = moved = denoiser.x0_hat(start(), t)
    for _ in range(inner):
        g = gradient(log_f, moved)
        if normalize == "rms":
            size = g.square().mean((1, 2, 3), keepdim=True).sqrt()
            moved = moved + scale * t.sigma / t.total * g / size
        else:
            moved = moved + scale * t.sigma**2 / (1 if jacobian == "gaussian" else t.alpha) * g
    term = classifier(scale, Pull(jacobian, normalize, inner=inner))
    close(Guided(denoiser, [term], chunk=chunk)(start(), t, CONDITION), moved)
    assert not torch.allclose(moved, x0_hat, atol=1e-3)


@pytest.mark.parametrize("words", [{"jacobian": "exact"}, {"input": "x_t"}, {"rule": "ancestral"}])
def test_inner_steps_that_could_not_be_made_are_refused(words: dict[str, Any]):
    with pytest.raises(RequestError, match=r"^inner: 3: inner steps move x0_hat"):
        Pull(**{"jacobian": "identity", "normalize": "none", **words}, inner=3)
