"""The seam: shifts against finite differences and closed forms, and everything that must not change them."""

import math
from typing import Any

import pytest
import torch
from support.drawn import normal
from torch import Tensor, nn
from torch.nn.functional import interpolate

from handful.core.denoiser import Condition, Denoiser
from handful.core.noise import EDM, VP, Flow, Level, Levels, level
from handful.core.samplers import ddim, ddpm, start
from handful.errors import RequestError, RunError
from handful.features.registry import FeatureExtractor, pixels
from handful.guidance import CFG, Chamfer, Guidance, Guided, Potential, Pull, Step, Timing

LATENT = (2, 4, 4)


class Latent(Denoiser):
    """A small smooth denoiser of latents, with a decoder that is not the identity, and counters of what was asked of it."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.shape, self.levels = LATENT, VP.cosine()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 2, 3, padding=1))
            self.label, self.mix = nn.Embedding(4, 2), nn.Conv2d(2, 3, 1)
        self.to(dtype).requires_grad_(False)
        self.batches: list[int] = []
        self.decoded: list[int] = []
        self.backwards = 0
        self.body.register_full_backward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.backwards += 1

    def condition(self, labels) -> Condition:
        return Condition(torch.as_tensor(labels), null_label=3)

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        self.batches.append(len(x_t))
        assert condition.labels is not None
        alpha, sigma = level.on(x_t)
        n = torch.hypot(alpha, sigma)
        told = self.label(condition.labels)[:, :, None, None]
        return (alpha / n**2) * x_t + (sigma / n) * (self.body(x_t / n) + told)

    def decode(self, x0: Tensor) -> Tensor:
        self.decoded.append(len(x0))
        return torch.tanh(self.mix(interpolate(x0, scale_factor=2, mode="nearest")))


def phi(dtype: torch.dtype = torch.float64, seed: int = 1) -> FeatureExtractor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5))
    return FeatureExtractor("phi", network.to(dtype))


class Distance(Potential):
    """Squared distance of each image's features to a target: a per-image potential."""

    name, per = "distance", "image"

    def __init__(self, extractor: FeatureExtractor, target: float, scale: float, stiffness: float = 1.0, **words: Any) -> None:
        super().__init__(extractor, scale, **words)
        self.target, self.stiffness = target, stiffness

    def energy(self, features: Tensor) -> Tensor:
        return self.stiffness / 2 * (features - self.target).square().sum(1)


class Spread(Potential):
    """Minus the variance of the cohort's features: a potential of the set."""

    name, per = "spread", "set"

    def energy(self, features: Tensor) -> Tensor:
        return -features.var(0).sum()


def cohort(n: int = 5) -> tuple[Tensor, Level, Tensor]:
    return normal(n, *LATENT, seed=2), level(0.7, 0.5), torch.arange(n) % 3


def exemplars(k: int = 3) -> Tensor:
    return normal(k, 5, seed=3)


def differences(f, x: Tensor, step: float = 1e-5) -> Tensor:
    """The gradient of f at x by central differences, one coordinate at a time."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        move = torch.zeros(x.numel(), dtype=x.dtype)
        move[i] = step
        move = move.view_as(x)
        gradient.view(-1)[i] = (f(x + move) - f(x - move)) / (2 * step)
    return gradient


ABSOLUTE = {j: Pull(j, "none") for j in ("exact", "gaussian", "identity")}
JACOBIANS = ("exact", "gaussian", "identity")


def chamfer(scale: float = 0.3, pull: Pull | None = None, timing: Timing | None = None) -> Chamfer:
    return Chamfer(phi(), exemplars(), scale, coverage_weight=2.0, pull=pull, timing=timing)


# --- no guidance -------------------------------------------------------------------------------------------------------


class Out(Guidance):
    """A term that must not be asked."""

    name = "out"

    def shift(self, step: Step) -> Tensor:
        raise AssertionError("an inactive term was asked for its shift")


def test_scale_zero_and_inactive_terms_change_no_bit():
    denoiser = Latent(torch.float32)
    x_t, at, labels = cohort()
    x_t, condition = x_t.float(), denoiser.condition(labels)
    wanted = denoiser(x_t, at, condition)
    off = [Timing(interval=(0.5, 1.0)), Timing(noise=(2.0, math.inf)), Timing(noise=(0.0, 0.1)), Timing(gain="sine")]
    terms: list[Guidance] = [CFG(0.0), Chamfer(phi(torch.float32), exemplars(), 0.0), Out(0.0), *(Out(1.0, t) for t in off)]
    for guided in (Guided(denoiser, []), *(Guided(denoiser, [term]) for term in terms), Guided(denoiser, terms)):
        assert torch.equal(guided(x_t, at, condition), wanted)
    assert denoiser.decoded == []
    levels = denoiser.levels.spacing(6)
    plain = ddim(denoiser, x_t, levels, condition)
    assert torch.equal(ddim(Guided(denoiser, [Chamfer(phi(torch.float32), exemplars(), 0.0)]), x_t, levels, condition), plain)


def test_a_guided_denoiser_is_the_denoiser_in_all_but_its_estimate():
    denoiser = Latent()
    guided = Guided(denoiser, [chamfer()])
    assert (guided.shape, guided.levels) == (denoiser.shape, denoiser.levels)
    x0 = normal(2, *LATENT)
    torch.testing.assert_close(guided.decode(x0), denoiser.decode(x0))
    assert guided.encode(x0) is x0
    assert guided.condition([1, 2]).null_label == 3


# --- a potential's gradient becomes a shift ----------------------------------------------------------------------------


def shift_of(denoiser: Denoiser, terms: list[Guidance], x_t: Tensor, at: Level, condition: Condition, **words: Any) -> Tensor:
    return Guided(denoiser, terms, **words)(x_t, at, condition) - denoiser(x_t, at, condition)


@pytest.mark.parametrize("at", [level(0.7, 0.5), level(1.0, 3.0), level(0.2, 0.8), VP.cosine().at(600)])
@pytest.mark.parametrize("make", [chamfer, lambda **w: Distance(phi(), 0.3, 0.3, **w), lambda **w: Spread(phi(), 0.3, **w)])
def test_the_absolute_shift_is_the_finite_difference_of_the_potential(make, at):
    denoiser = Latent()
    x_t, _, labels = cohort(3)
    condition = denoiser.condition(labels)
    term = make(pull=ABSOLUTE["exact"])

    def potential(x0: Tensor) -> Tensor:
        return term.energy(term.extractor(denoiser.decode(x0))).sum()

    alpha, sigma = float(at.alpha), float(at.sigma)
    through = differences(lambda x: potential(denoiser(x, at, condition)), x_t)
    directly = differences(potential, denoiser(x_t, at, condition))
    for jacobian, wanted in (
        ("exact", -(sigma**2 / alpha) * through),
        ("gaussian", -(sigma**2 / (alpha**2 + sigma**2)) * directly),
        ("identity", -(sigma**2 / alpha) * directly),
    ):
        found = shift_of(denoiser, [make(pull=ABSOLUTE[jacobian])], x_t, at, condition)
        assert float(wanted.abs().max()) > 1e-4
        torch.testing.assert_close(found, 0.3 * wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_rms_scales_the_cohort_for_a_set_and_each_image_for_images(jacobian):
    denoiser = Latent()
    x_t, at, labels = cohort()
    condition, r = denoiser.condition(labels), 0.5 / math.hypot(0.7, 0.5)
    of_set = shift_of(denoiser, [chamfer(0.3, Pull(jacobian))], x_t, at, condition)
    assert float(of_set.square().mean().sqrt()) == pytest.approx(0.3 * r, rel=1e-9)
    each = of_set.square().mean((1, 2, 3)).sqrt()
    assert float(each.max() / each.min()) > 1.1  # images keep their ratio to each other
    absolute = shift_of(denoiser, [chamfer(0.3, ABSOLUTE[jacobian])], x_t, at, condition)
    torch.testing.assert_close(of_set / of_set.norm(), absolute / absolute.norm(), rtol=1e-9, atol=1e-12)

    of_images = shift_of(denoiser, [Distance(phi(), 0.3, 0.3, pull=Pull(jacobian))], x_t, at, condition)
    torch.testing.assert_close(of_images.square().mean((1, 2, 3)).sqrt(), torch.full((5,), 0.3 * r, dtype=torch.float64))


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_rms_image_scales_each_image_for_a_set_too_and_keeps_its_direction(jacobian):
    denoiser = Latent()
    x_t, at, labels = cohort()
    condition, r = denoiser.condition(labels), 0.5 / math.hypot(0.7, 0.5)
    found = shift_of(denoiser, [chamfer(0.3, Pull(jacobian, "rms-image"))], x_t, at, condition)
    torch.testing.assert_close(found.square().mean((1, 2, 3)).sqrt(), torch.full((5,), 0.3 * r, dtype=torch.float64))
    absolute = shift_of(denoiser, [chamfer(0.3, ABSOLUTE[jacobian])], x_t, at, condition)
    lengths = [shift.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for shift in (found, absolute)]
    torch.testing.assert_close(found / lengths[0], absolute / lengths[1], rtol=1e-9, atol=1e-12)


def test_rms_does_not_see_the_potentials_unit():
    denoiser = Latent()
    x_t, at, labels = cohort()
    condition = denoiser.condition(labels)
    one, other = (shift_of(denoiser, [Distance(phi(), 0.3, 0.3, stiffness)], x_t, at, condition) for stiffness in (1.0, 1e-9))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_small_gradient_whose_square_underflows_is_still_scaled_to_its_rms(dtype):
    """1e-26 squared is 0 in float32, and 1e-5 squared is 0 in float16."""
    stiffness = 1e-26 if dtype == torch.float32 else 1e-5
    denoiser = Unit().to(dtype)
    x_t = normal(4, 1, 3, 3, seed=4).to(dtype)
    at = level(0.6, 0.8)
    for per in ("image", "set"):
        term = Slope(pixels(), stiffness, 0.5, pull=Pull("gaussian"))
        term.per = per  # pyright: ignore[reportAttributeAccessIssue]  # both scales, one potential
        found = shift_of(denoiser, [term], x_t, at, Condition(None))
        torch.testing.assert_close(found, torch.full_like(found, 0.4), rtol=2e-2, atol=0)


def test_a_potential_without_gradient_shifts_nothing():
    denoiser = Unit()
    x_t = normal(4, 1, 3, 3, seed=4)
    found = shift_of(denoiser, [Slope(pixels(), 0.0, 0.5)], x_t, level(0.6, 0.8), Condition(None))
    assert torch.equal(found, torch.zeros_like(x_t))


@pytest.mark.parametrize("pull", [Pull("exact", "none"), Pull("identity", "none"), Pull("gaussian", "none")])
def test_at_alpha_zero_an_absolute_shift_is_finite(pull):
    denoiser = Latent()
    x_t, _, labels = cohort()
    at, condition = level(0.0, 1.0), denoiser.condition(labels)
    found = shift_of(denoiser, [chamfer(0.3, pull)], x_t, at, condition)
    if pull.jacobian == "gaussian":  # its factor is r^2 = 1 there
        assert float(found.abs().max()) > 1e-4
    else:  # sigma^2 / alpha has no limit; x_t says nothing of the image there
        assert torch.equal(found, torch.zeros_like(found))
    assert bool(found.isfinite().all())


# --- closed forms ------------------------------------------------------------------------------------------------------


class Unit(Denoiser):
    """E[x0 | x_t] for data N(mean, deviation^2), each pixel for itself."""

    def __init__(self, mean: float = 0.0, deviation: float = 1.0) -> None:
        super().__init__()
        self.shape, self.levels = (1, 3, 3), EDM()
        self.mean, self.deviation = mean, deviation

    def condition(self, labels) -> Condition:
        return Condition(None)

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        alpha, sigma = level.on(x_t)
        return self.mean + alpha * self.deviation**2 / (alpha**2 * self.deviation**2 + sigma**2) * (x_t - alpha * self.mean)


class Slope(Potential):
    """U = -slope * sum of pixels: tilts N(m, s^2) to N(m + s^2 slope, s^2)."""

    name, per = "slope", "image"

    def __init__(self, extractor: FeatureExtractor, slope: float, scale: float, **words: Any) -> None:
        super().__init__(extractor, scale, **words)
        self.slope = slope

    def energy(self, features: Tensor) -> Tensor:
        return -self.slope * features.sum(1)


PROCESSES = {
    "vp": [VP.linear().at(t) for t in (10, 300, 900)],
    "edm": [level(1.0, s) for s in (0.1, 1.0, 20.0)],
    "flow": [level(1 - s, s) for s in (0.1, 0.5, 0.95)],
}


@pytest.mark.parametrize("process", PROCESSES)
def test_the_exact_shift_of_a_linear_potential_is_the_tilted_posterior_mean(process):
    m, s, slope = 0.3, 0.7, 0.9
    x_t = normal(4, 1, 3, 3, seed=5)
    guided = Guided(Unit(m, s), [Slope(pixels(), slope, 1.0, pull=Pull("exact", "none"))])
    for at in PROCESSES[process]:
        wanted = Unit(m + s**2 * slope, s)(x_t, at, Condition(None))
        torch.testing.assert_close(guided(x_t, at, Condition(None)), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_exact_shift_of_a_quadratic_potential_is_the_tilted_posterior_mean(process):
    """Data N(m, s^2) tilted by exp(-g/2 (x0 - y)^2) is N((m/s^2 + g y) v, v), v = 1 / (1/s^2 + g).

    The tilted score at x_t is that of E[exp(-U(x0)) | x_t], and x0 given x_t is N(x0_hat, p), p = s^2 sigma^2 /
    (alpha^2 s^2 + sigma^2): a quadratic again, of x0_hat, with the stiffness g / (1 + g p).
    """
    m, s, g, y = -0.2, 0.8, 2.5, 1.1
    v = 1 / (1 / s**2 + g)
    tilted = Unit((m / s**2 + g * y) * v, v**0.5)
    x_t = normal(4, 1, 3, 3, seed=6)
    for at in PROCESSES[process]:
        p = float(s**2 * at.sigma**2 / (at.alpha**2 * s**2 + at.sigma**2))
        term = Distance(pixels(), y, 1.0, g / (1 + g * p), pull=Pull("exact", "none"))
        found = Guided(Unit(m, s), [term])(x_t, at, Condition(None))
        torch.testing.assert_close(found, tilted(x_t, at, Condition(None)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [VP.linear(), EDM(), Flow()])
def test_guided_sampling_of_a_gaussian_is_sampling_of_the_tilted_gaussian(schedule):
    m, s, slope = 0.3, 0.7, 0.9
    levels = schedule.spacing(15)
    noise = start(normal(4, 1, 3, 3, seed=7), levels)
    if isinstance(schedule, Flow):  # at alpha = 0 the absolute shift is left out: begin after it
        levels = Levels(levels.alpha[1:], levels.sigma[1:])
    guided = Guided(Unit(m, s), [Slope(pixels(), slope, 1.0, pull=Pull("exact", "none"))])
    wanted = ddim(Unit(m + s**2 * slope, s), noise, levels, Condition(None))
    torch.testing.assert_close(ddim(guided, noise, levels, Condition(None)), wanted, rtol=1e-9, atol=1e-9)


# --- chunks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("normalize", ["rms", "none"])
@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_chunks_give_what_the_whole_cohort_gives(jacobian, normalize, chunk):
    denoiser, pull = Latent(), Pull(jacobian, normalize)
    x_t, at, labels = cohort(5)
    condition = denoiser.condition(labels)
    terms = [chamfer(0.3, pull), Distance(phi(seed=4), 0.3, 0.2, pull=pull), Spread(phi(), 0.1, pull=pull), CFG(1.5)]
    whole = shift_of(denoiser, terms, x_t, at, condition)
    denoiser.batches.clear()
    denoiser.decoded.clear()
    found = Guided(denoiser, terms, chunk=chunk)(x_t, at, condition)
    assert max(denoiser.batches + denoiser.decoded) == chunk  # nothing larger went through, CFG's null estimate neither
    torch.testing.assert_close(found, denoiser(x_t, at, condition) + whole, rtol=1e-11, atol=1e-12)


class Cramped(Latent):
    """Out of memory above so many images at once: its allocation fails, as a device's would."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        if len(x_t) > self.most:
            raise torch.OutOfMemoryError(f"no memory for {len(x_t)} images")
        return super().forward(x_t, level, condition)


@pytest.mark.filterwarnings("ignore:out of memory with 7")
@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_out_of_memory_halves_the_chunk_and_goes_on_to_the_same_answer(jacobian):
    cramped, roomy = Cramped(2), Latent()
    x_t, at, labels = cohort(7)
    condition = roomy.condition(labels)
    terms = [chamfer(0.3, Pull(jacobian)), CFG(0.5)]
    wanted = Guided(roomy, terms)(x_t, at, condition)
    guided = Guided(cramped, terms)
    with pytest.warns(UserWarning, match="out of memory with 4 images at once; going on with 2"):
        found = guided(x_t, at, condition)
    assert guided.chunk == 2
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    tried = len(cramped.batches)
    guided(x_t, at, condition)
    assert max(cramped.batches[tried:]) == 2  # it remembers


@pytest.mark.filterwarnings("ignore:out of memory")
def test_out_of_memory_with_a_single_image_is_said():
    denoiser = Cramped(0)
    x_t, at, labels = cohort(3)
    with pytest.raises(torch.OutOfMemoryError):
        Guided(denoiser, [chamfer()])(x_t, at, denoiser.condition(labels))


def test_a_chunk_below_one_is_refused():
    with pytest.raises(ValueError, match="chunk"):
        Guided(Latent(), [], chunk=0)


# --- learned variance --------------------------------------------------------------------------------------------------


class Learned(Latent):
    """Says of the variance what the last image and label make of it; out of memory above so many images, where it is told."""

    most: int | None = None
    calls = 0

    @property
    def learns_variance(self) -> bool:
        return True

    def says(self, x_t: Tensor, condition: Condition) -> Tensor:
        assert condition.labels is not None
        return torch.tanh(x_t + self.label(condition.labels)[:, :, None, None])

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        self.calls += 1
        if self.most is not None and (len(x_t) > self.most or self.calls == 2):  # the second: half-way through the chunks
            raise torch.OutOfMemoryError(f"no memory for {len(x_t)} images")
        self.learned_variance = self.says(x_t, condition).detach()
        return super().forward(x_t, level, condition)


@pytest.mark.parametrize("chunk", [None, 1, 2, 5])
@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_the_learned_variance_is_the_conditional_evaluations_whole_or_in_chunks(jacobian, chunk):
    denoiser = Learned()
    x_t, at, labels = cohort(5)
    condition = denoiser.condition(labels)
    wanted, null = denoiser.says(x_t, condition), denoiser.says(x_t, condition.null())
    assert float((wanted - null).abs().max()) > 0.1  # the null evaluation says something else
    term = chamfer(0.3, Pull(jacobian))
    for terms in ([], [CFG(1.5)], [CFG(1.5), term], [term, Spread(phi(), 0.1, pull=Pull(jacobian)), CFG(0.5)]):
        guided = Guided(denoiser, terms, chunk=chunk)
        guided(x_t, at, condition)
        assert guided.learned_variance is not None
        assert torch.equal(guided.learned_variance, wanted)
    nested = Guided(Guided(denoiser, [CFG(0.5)], chunk=chunk), [CFG(1.5)])
    nested(x_t, at, condition)
    assert nested.learned_variance is not None
    assert torch.equal(nested.learned_variance, wanted)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_the_learned_variance_is_whole_after_a_chunk_ran_out_of_memory():
    denoiser = Learned()
    denoiser.most = 4
    x_t, at, labels = cohort(7)
    condition = denoiser.condition(labels)
    guided = Guided(denoiser, [CFG(1.5)], chunk=4)
    guided(x_t, at, condition)
    assert guided.chunk == 2
    assert guided.learned_variance is not None
    assert torch.equal(guided.learned_variance, denoiser.says(x_t, condition))


def test_a_guided_denoiser_learned_a_variance_where_its_denoiser_did():
    x_t, at, labels = cohort(3)
    plain = Guided(Latent(), [CFG(1.5)])
    plain(x_t, at, plain.condition(labels))
    assert plain.learned_variance is None
    assert not plain.learns_variance
    assert Guided(Learned(), [CFG(1.5)]).learns_variance


def test_ancestral_sampling_takes_the_conditional_variance_under_guidance_whole_or_in_chunks():
    denoiser = Learned()
    x_t, _, labels = cohort(5)
    condition, levels = denoiser.condition(labels), denoiser.levels.spacing(5)

    def sampled(guided: Denoiser) -> Tensor:
        draw = torch.Generator().manual_seed(7)
        fresh = lambda: torch.randn(x_t.shape, dtype=x_t.dtype, generator=draw)  # noqa: E731
        return ddpm(guided, x_t, levels, condition, noise=fresh, variance="learned")

    class NoShift(CFG):
        """Evaluates the null condition, and shifts nothing: sampling must be that of the denoiser alone."""

        def shift(self, step: Step) -> Tensor:
            return 0 * step.x0_hat_null

    wanted = sampled(denoiser)
    for chunk in (None, 2):
        torch.testing.assert_close(sampled(Guided(denoiser, [NoShift(1.5)], chunk=chunk)), wanted, rtol=1e-11, atol=1e-12)


# --- cost --------------------------------------------------------------------------------------------------------------


def test_potentials_that_share_a_pull_cost_one_backward_pass_and_one_decode():
    denoiser = Latent()
    x_t, at, labels = cohort()
    terms = [chamfer(), Distance(phi(), 0.3, 0.2), Spread(phi(), 0.1)]
    Guided(denoiser, terms)(x_t, at, denoiser.condition(labels))
    assert (denoiser.batches, denoiser.decoded, denoiser.backwards) == ([5], [5], 1)


def test_the_cheap_jacobians_never_go_back_through_the_denoiser():
    denoiser = Latent()
    x_t, at, labels = cohort()
    terms = [chamfer(pull=Pull("gaussian")), Distance(phi(), 0.3, 0.2, pull=Pull("identity", "none"))]
    Guided(denoiser, terms)(x_t, at, denoiser.condition(labels))
    assert (denoiser.batches, denoiser.decoded, denoiser.backwards) == ([5], [5], 0)


def test_terms_of_one_pull_and_absolute_size_add_up():
    denoiser, pull = Latent(), ABSOLUTE["exact"]
    x_t, at, labels = cohort()
    condition = denoiser.condition(labels)
    terms: list[Guidance] = [chamfer(0.3, pull), Distance(phi(), 0.3, 0.2, pull=pull), CFG(0.7)]
    together = shift_of(denoiser, terms, x_t, at, condition)
    apart = sum(shift_of(denoiser, [term], x_t, at, condition) for term in terms)
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)


def test_terms_of_different_pulls_add_up():
    denoiser = Latent()
    x_t, at, labels = cohort()
    condition = denoiser.condition(labels)
    terms: list[Guidance] = [chamfer(0.3, Pull(j, n)) for j in JACOBIANS for n in ("rms", "none")]
    together = shift_of(denoiser, terms, x_t, at, condition)
    apart = sum(shift_of(denoiser, [term], x_t, at, condition) for term in terms)
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)


# --- cohorts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_permuting_a_cohort_permutes_its_shift(jacobian):
    denoiser = Latent()
    x_t, at, labels = cohort(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    terms: list[Guidance] = [chamfer(0.3, Pull(jacobian)), Distance(phi(), 0.3, 0.2, pull=Pull(jacobian)), CFG(0.5)]
    one = shift_of(denoiser, terms, x_t, at, denoiser.condition(labels))
    other = shift_of(denoiser, terms, x_t[order], at, denoiser.condition(labels[order]))
    torch.testing.assert_close(other, one[order], rtol=1e-11, atol=1e-12)


def test_potentials_of_images_do_not_see_the_neighbours_and_those_of_sets_do():
    denoiser = Latent()
    x_t, at, labels = cohort(6)
    moved = x_t.clone()
    moved[3:] += 1
    condition = denoiser.condition(labels)
    for term, alone in ((Distance(phi(), 0.3, 0.2), True), (chamfer(), False)):
        one, other = (shift_of(denoiser, [term], x, at, condition)[:3] for x in (x_t, moved))
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14) == alone


# --- when a term acts --------------------------------------------------------------------------------------------------


class Record(Guidance):
    """Shifts by nothing, and remembers when it was asked and how strongly."""

    name = "record"

    def __init__(self, scale: float, timing: Timing) -> None:
        super().__init__(scale, timing)
        self.asked: list[int | None] = []
        self.strengths: list[float] = []

    def shift(self, step: Step) -> Tensor:
        self.asked.append(step.level.index)
        self.strengths.append(self.strength(step.level))
        return torch.zeros_like(step.x_t)


def acted(timing: Timing, levels: Levels) -> Record:
    term = Record(2.0, timing)
    ddim(Guided(Unit(), [term]), normal(1, 1, 3, 3), levels, Condition(None))
    return term


def test_every_nth_step_acts_counted_so_that_the_pure_noise_is_left_out():
    levels = EDM().spacing(9)
    assert acted(Timing(every=1), levels).asked == list(range(9))
    assert acted(Timing(every=2), levels).asked == [1, 3, 5, 7]
    assert acted(Timing(every=3), levels).asked == [2, 5, 8]
    assert Timing(every=3).due(level(1.0, 1.0))  # off a path there is nothing to count


def test_intervals_are_of_progress_and_of_noise_ends_included():
    levels = EDM().spacing(9)
    assert acted(Timing(interval=(0.25, 0.5)), levels).asked == [2, 3, 4]
    ratios = [float(at.ratio) for at in levels][:9]
    band = Timing(noise=(ratios[6], ratios[3]))
    assert acted(band, levels).asked == [3, 4, 5, 6]
    assert acted(Timing(every=2, noise=band.noise, interval=(0.5, 1.0)), levels).asked == [5]
    assert acted(Timing(noise=(0.3, math.inf)), Flow().spacing(4)).asked[0] == 0  # alpha = 0 is inside (lo, inf)


def test_gains_follow_the_progress():
    levels = EDM().spacing(5)
    assert acted(Timing(), levels).strengths == [2.0] * 5
    assert acted(Timing(gain="linear"), levels).strengths == [2.0, 1.5, 1.0, 0.5]  # 0 at the end: not asked
    sine = [2 * math.sin(math.pi * p) for p in (0.25, 0.5, 0.75)]
    assert acted(Timing(gain="sine"), levels).strengths[:3] == pytest.approx(sine)


def test_the_gain_scales_the_shift():
    denoiser = Latent()
    x_t, _, labels = cohort()
    at = Level(torch.tensor(0.7), torch.tensor(0.5), index=1, progress=0.25)
    for pull in (Pull(), ABSOLUTE["exact"]):
        full = shift_of(denoiser, [chamfer(0.3, pull)], x_t, at, denoiser.condition(labels))
        less = shift_of(denoiser, [chamfer(0.3, pull, Timing(gain="linear"))], x_t, at, denoiser.condition(labels))
        torch.testing.assert_close(less, 0.75 * full, rtol=1e-6, atol=1e-9)


def test_hold_uses_the_last_direction_again_at_the_present_radius():
    denoiser = Latent()
    x_t, _, labels = cohort()
    condition = denoiser.condition(labels)
    levels = denoiser.levels.spacing(6)
    guided = Guided(denoiser, [chamfer(0.3, Pull(hold=True), Timing(every=2, interval=(0.0, 0.7)))])
    shifts = [guided(x_t, at, condition) - denoiser(x_t, at, condition) for at in levels][:6]
    radii = [float(at.sigma / at.total) for at in levels]
    assert float(shifts[0].abs().max()) == 0  # nothing held yet
    fresh = shift_of(denoiser, [chamfer(0.3)], x_t, levels[1], condition)
    torch.testing.assert_close(shifts[1], fresh)
    torch.testing.assert_close(shifts[2], fresh * radii[2] / radii[1])
    torch.testing.assert_close(shifts[3], shift_of(denoiser, [chamfer(0.3)], x_t, levels[3], condition))
    assert not torch.allclose(shifts[3] / radii[3], shifts[1] / radii[1])  # it was taken anew
    assert float(shifts[4].abs().max()) == 0  # past the interval nothing is held
    evaluations = len(denoiser.batches)
    guided(x_t, levels[2], condition)
    assert denoiser.backwards == 4  # two steps of six, and the two comparisons
    assert len(denoiser.batches) == evaluations + 1


def test_a_new_path_forgets_what_was_held():
    denoiser = Latent()
    x_t, _, labels = cohort()
    condition, levels = denoiser.condition(labels), denoiser.levels.spacing(6)
    guided = Guided(denoiser, [chamfer(0.3, Pull(hold=True), Timing(every=3))])
    first = ddim(guided, x_t, levels, condition)
    assert torch.equal(ddim(guided, x_t, levels, condition), first)
    smaller = guided(x_t[:2], levels[0], condition[slice(0, 2)])
    assert torch.equal(smaller, denoiser(x_t[:2], levels[0], condition[slice(0, 2)]))


# --- composition -------------------------------------------------------------------------------------------------------


def test_a_guided_denoiser_can_be_guided_again():
    """The outer potential sees the inner's estimate; its gradient goes through the inner's unguided part."""
    denoiser = Latent()
    x_t, at, labels = cohort()
    condition, pull = denoiser.condition(labels), ABSOLUTE["gaussian"]
    inner = Guided(denoiser, [CFG(0.8)])
    found = Guided(inner, [chamfer(0.3, pull)])(x_t, at, condition)
    leaf = inner(x_t, at, condition).requires_grad_()
    term = chamfer()
    (gradient,) = torch.autograd.grad(term.energy(term.extractor(denoiser.decode(leaf))), leaf)
    torch.testing.assert_close(found, leaf.detach() - 0.3 * 0.25 / 0.74 * gradient, rtol=1e-10, atol=1e-12)


def test_nested_terms_off_is_no_guidance_to_the_bit():
    denoiser = Latent()
    x_t, at, labels = cohort()
    condition = denoiser.condition(labels)
    guided = Guided(Guided(denoiser, [chamfer(0.0)]), [CFG(0.0)])
    assert torch.equal(guided(x_t, at, condition), denoiser(x_t, at, condition))


def test_a_nested_set_potential_is_never_shown_a_part_of_its_cohort():
    """The outer chunk would cut the inner cohort: it is refused, and the inner may be chunked instead."""
    denoiser = Latent()
    x_t, at, labels = cohort()
    condition = denoiser.condition(labels)
    with pytest.raises(ValueError, match="chunk"):
        Guided(Guided(denoiser, [chamfer()]), [CFG(0.5)], chunk=2)
    whole = Guided(Guided(denoiser, [chamfer()]), [CFG(0.5)])(x_t, at, condition)
    inner = Guided(Guided(denoiser, [chamfer()], chunk=2), [CFG(0.5)])(x_t, at, condition)
    torch.testing.assert_close(inner, whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_estimate_is_differentiable_in_the_callers_graph_with_the_shift_constant(chunk):
    denoiser = Latent()
    x_t, at, labels = cohort()
    condition, weight = denoiser.condition(labels), normal(5, *LATENT, seed=8)
    outer = (2 * x_t).requires_grad_()
    guided = Guided(denoiser, [chamfer(0.3), CFG(0.5)], chunk=chunk)
    found = guided(outer / 2, at, condition)
    (gradient,) = torch.autograd.grad((weight * found).sum(), outer)
    leaf = x_t.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((weight * denoiser(leaf, at, condition)).sum(), leaf)
    torch.testing.assert_close(gradient, wanted / 2, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(guided(x_t, at, condition), found.detach(), rtol=1e-11, atol=1e-12)


def test_sampling_needs_no_graph_and_leaves_none():
    denoiser = Latent()
    x_t, at, labels = cohort()
    guided = Guided(denoiser, [chamfer(), CFG(0.5)])
    with torch.no_grad():
        under = guided(x_t, at, denoiser.condition(labels))
    assert not under.requires_grad
    assert not guided(x_t, at, denoiser.condition(labels)).requires_grad
    with torch.inference_mode(False):
        torch.testing.assert_close(guided(x_t, at, denoiser.condition(labels)), under)


# --- refusals ----------------------------------------------------------------------------------------------------------


class Broken(Potential):
    """Its gradient is not finite where an image is exactly at the target."""

    name, per = "broken", "image"

    def energy(self, features: Tensor) -> Tensor:
        return (features * 0).sum(1).sqrt()  # sqrt at 0: the slope is infinite, times 0 it is NaN


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("pull", [Pull(), Pull("gaussian"), Pull("exact", "none")])
def test_a_gradient_that_is_not_finite_is_refused_by_name(pull, chunk):
    denoiser = Latent()
    x_t, at, labels = cohort()
    terms = [chamfer(0.1, pull), Broken(phi(), 0.1, pull=pull)]
    with pytest.raises(RunError, match=r"chamfer and broken.*not finite at sigma / alpha = 0\.714"):
        Guided(denoiser, terms, chunk=chunk)(x_t, at, denoiser.condition(labels))


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("scale", lambda: CFG(-1.0)),
        ("scale", lambda: CFG(math.nan)),
        ("scale", lambda: CFG(math.inf)),
        ("every", lambda: Timing(every=0)),
        ("interval", lambda: Timing(interval=(0.6, 0.4))),
        (r"interval\[0\]", lambda: Timing(interval=(math.nan, 1.0))),
        (r"noise\[0\]", lambda: Timing(noise=(-1.0, 1.0))),
        ("gain", lambda: Timing(gain="cosine")),  # pyright: ignore[reportArgumentType]
        ("jacobian", lambda: Pull("none")),  # pyright: ignore[reportArgumentType]
        ("normalize", lambda: Pull("exact", "l2")),  # pyright: ignore[reportArgumentType]
        ("hold", lambda: Pull("exact", "none", hold=True)),
    ],
)
def test_impossible_settings_are_refused_by_name(field, make):
    with pytest.raises(RequestError, match=f"^{field}: "):
        make()


def test_a_potential_does_not_take_its_own_shift():
    step = Step(Latent(), *cohort()[:2], Condition(None), cohort()[0])
    with pytest.raises(TypeError, match="Guided"):
        chamfer().shift(step)


def test_levels_of_each_image_are_refused_where_a_term_acts():
    x_t, _, labels = cohort(3)
    many = level(torch.full((3,), 0.6), torch.full((3,), 0.8))
    denoiser = Latent()
    condition = denoiser.condition(labels)
    assert torch.equal(Guided(denoiser, [])(x_t, many, condition), denoiser(x_t, many, condition))
    with pytest.raises(ValueError, match="one level for the whole cohort, not at 3"):
        Guided(denoiser, [chamfer()])(x_t, many, condition)


def test_terms_that_are_held_at_different_turns_keep_their_own_directions():
    """Two terms of one Pull, every 2nd and every 4th step: on a step where neither acts, both directions are added."""
    denoiser, levels, condition = Latent(), VP.cosine().spacing(8), Condition(torch.tensor([0, 1, 2]), 3)
    pull = Pull("gaussian", hold=True)

    def walked(*terms: Guidance) -> list[Tensor]:
        guided, x = Guided(denoiser, terms), normal(3, *LATENT)
        return [guided(x, at, condition) - denoiser(x, at, condition) for at, _ in levels.pairs()]

    def often() -> Guidance:
        return chamfer(0.3, pull, Timing(every=2))

    def seldom() -> Guidance:
        return chamfer(0.2, pull, Timing(every=4))

    both, apart = walked(often(), seldom()), zip(walked(often()), walked(seldom()), strict=True)
    for found, (one, other) in zip(both, apart, strict=True):
        torch.testing.assert_close(found, one + other, rtol=1e-9, atol=1e-12)
