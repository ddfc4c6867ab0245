"""Classifier guidance: the energy, temperatures, and the papers' three presets against loops written from the papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.drawn import normal
from support.pipelines_dit import tiny_dit
from torch import Tensor, nn

from handful.core.denoiser import Clamped, Condition, Denoiser
from handful.core.noise import EDM, VP, Level, Levels, Schedule, level
from handful.core.samplers import ddim, ddpm, dpmpp_2m, heun
from handful.errors import RequestError, RunError
from handful.features.registry import FeatureExtractor, load_extractor
from handful.guidance import CFG, Classifier, Guidance, Guided, NoisyClassifier, Pull, Timing
from handful.guidance.classifier import temperature_at, tempered_energy
from handful.models import load

SHAPE = (3, 4, 4)
CLASSES = 5
TARGETS = torch.tensor([0, 3, 4, 3])
DDPM_PULL = Pull(rule="ancestral", normalize="none", jacobian="identity", input="x0_hat")
EDM_PULL = Pull(rule="before", input="x_t", normalize="sample")


class Toy(Denoiser):
    """A smooth denoiser of pixels whose estimates leave [-1, 1]; label 2 is its null class."""

    def __init__(self, levels: Schedule, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.shape, self.levels, self.null_class = SHAPE, levels, 2
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1))
            self.label = nn.Embedding(3, 3)
        self.to(dtype).requires_grad_(False)

    def condition(self, labels: Any) -> Condition:
        return Condition(torch.as_tensor(labels), null_label=2)

    def estimate(self, x_t: Tensor, alpha: float, sigma: float, labels: Tensor) -> Tensor:
        total = math.hypot(alpha, sigma)
        return (alpha / total**2) * x_t + 2 * (sigma / total) * (self.body(x_t / total) + self.label(labels)[:, :, None, None])

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        assert condition.labels is not None
        return self.estimate(x_t, float(level.alpha), float(level.sigma), condition.labels)


def net(dtype: torch.dtype = torch.float64, width: float = 2.0) -> nn.Module:
    """A small smooth classifier of images 3 x 4 x 4."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(6, CLASSES))
    network[3].weight.data *= width
    return network.to(dtype).requires_grad_(False)


def extractor(dtype: torch.dtype = torch.float64, **words: Any) -> FeatureExtractor:
    network = net(dtype)
    return FeatureExtractor("net", network, classify=network, **words)


def log_likelihood_gradient(network: Any, images: Tensor, targets: Tensor, tau1: float, tau2: float) -> Tensor:
    """g = -grad U: of tau1 f_y - log sum_j exp(tau2 f_j), at detached images."""
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = network(leaf)
        value = tau1 * logits[torch.arange(len(leaf)), targets] - (tau2 * logits).exp().sum(1).log()
        return torch.autograd.grad(value.sum(), leaf)[0]


# --- the energy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau1", "tau2"), [(1.0, 1.0), (1.0, 0.5), (1.0, 0.0), (0.3, 2.0), (0.0, 1.0)])
def test_the_energy_is_the_formula(tau1: float, tau2: float):
    logits = 3 * normal(4, CLASSES)
    wanted = [
        -(tau1 * float(row[y]) - math.log(sum(math.exp(tau2 * float(f)) for f in row)))
        for row, y in zip(logits, TARGETS.tolist(), strict=True)
    ]
    found = tempered_energy(logits, TARGETS, tau1, tau2)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tempered_energy(logits, 3, tau1, tau2), tempered_energy(logits, torch.full((4,), 3), tau1, tau2))


def test_equal_temperatures_are_minus_the_log_probability_and_no_second_one_the_logit():
    logits = 3 * normal(4, CLASSES)
    chosen = logits.log_softmax(1)[torch.arange(4), TARGETS]
    torch.testing.assert_close(tempered_energy(logits, TARGETS), -chosen)
    torch.testing.assert_close(tempered_energy(logits, TARGETS, 1.0, 0.0), math.log(CLASSES) - logits[torch.arange(4), TARGETS])


def test_its_gradient_is_the_finite_difference_of_the_formula():
    logits, step = 2 * normal(2, CLASSES), 1e-6
    leaf = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(tempered_energy(leaf, [1, 4], 0.8, 0.4).sum(), leaf)

    def formula(row: Tensor, y: int) -> float:
        return math.log(sum(math.exp(0.4 * float(f)) for f in row)) - 0.8 * float(row[y])

    for n, y in enumerate((1, 4)):
        for j in range(CLASSES):
            move = torch.zeros(CLASSES, dtype=torch.float64)
            move[j] = step
            wanted = (formula(logits[n] + move, y) - formula(logits[n] - move, y)) / (2 * step)
            assert float(found[n, j]) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_huge_logits_give_a_finite_energy_and_gradient(dtype: torch.dtype):
    huge = min(1e30, torch.finfo(dtype).max / 4)
    leaf = torch.tensor([[huge, -huge, 0.0], [-huge, huge, huge], [0.0, 0.0, huge]], dtype=dtype, requires_grad=True)
    energy = tempered_energy(leaf, [0, 0, 1], 1.0, 0.5)
    assert bool(energy.isfinite().all())
    (gradient,) = torch.autograd.grad(energy.sum(), leaf)
    wanted = torch.tensor([[-0.5, 0, 0], [-1, 0.25, 0.25], [0, -1, 0.5]], dtype=dtype)
    torch.testing.assert_close(gradient, wanted)
    assert energy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_the_potential_of_an_image_is_the_energy_of_its_logits_whoever_stands_beside_it():
    images = normal(4, *SHAPE).clamp(-1, 1)
    term = Classifier(extractor(), TARGETS, 1.0, tau1=0.7, tau2=0.3)
    found = term.energy(term.view(images))
    torch.testing.assert_close(found, tempered_energy(net()(images), TARGETS, 0.7, 0.3))
    alone = Classifier(extractor(), 3, 1.0, tau1=0.7, tau2=0.3)
    torch.testing.assert_close(alone.energy(alone.view(images[1:2])), found[1:2])
    assert term.per == "image"


# --- temperatures fitted for each level --------------------------------------------------------------------------------

FITTED = ((0.1, 1.0), (1.0, 2.0), (10.0, 8.0))


def test_a_temperature_lies_between_its_neighbours_in_logarithms_and_is_constant_beyond():
    for ratio, wanted in (
        (0.1, 1.0),
        (1.0, 2.0),
        (10.0, 8.0),
        (math.sqrt(0.1), math.sqrt(2)),
        (math.sqrt(10), 4.0),
        (0.0, 1.0),
        (1e-9, 1.0),
        (99.0, 8.0),
        (math.inf, 8.0),
    ):
        assert temperature_at(FITTED, ratio) == pytest.approx(wanted, rel=1e-12)
    assert temperature_at(((0.5, 3.0),), 7.0) == 3.0


def test_at_a_level_the_logits_are_divided_by_its_temperature_in_both_terms():
    logits = 3 * normal(4, CLASSES)
    term = Classifier(extractor(), TARGETS, 1.0, tau1=0.7, tau2=0.3, temperatures=FITTED)
    for at, temperature in ((level(1.0, 1.0), 2.0), (level(0.5, 5.0), 8.0), (level(1.0, math.sqrt(10)), 4.0)):
        wanted = tempered_energy(logits / temperature, TARGETS, 0.7, 0.3)
        torch.testing.assert_close(term.at(at).energy(logits), wanted)
    torch.testing.assert_close(term.energy(logits), tempered_energy(logits, TARGETS, 0.7, 0.3)), "of finished images"


def test_a_guided_run_takes_the_temperature_of_each_step():
    denoiser, x = Toy(VP.cosine()), normal(4, *SHAPE)
    levels, condition = denoiser.levels.spacing(6), denoiser.condition([0, 1, 0, 1])
    asked: list[float] = []

    class Noting(Classifier):
        def energy(self, features: Tensor) -> Tensor:
            asked.append(self.temperature)
            return super().energy(features)

    term = Noting(extractor(), TARGETS, 0.3, temperatures=FITTED, pull=Pull("gaussian"))
    ddim(Guided(denoiser, [term]), x, levels, condition)
    assert asked == [temperature_at(FITTED, float(t.ratio)) for t, _ in levels.pairs()]
    assert len(set(asked)) > 3

    flat = [Classifier(extractor(), TARGETS, 0.3, temperatures=((1.0, t),), pull=Pull("gaussian")) for t in (1.0, 5.0)]
    one, other = (ddim(Guided(denoiser, [each]), x, levels, condition) for each in flat)
    assert float((one - other).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ({"tau1": -1.0}, "tau1"),
        ({"tau2": math.inf}, "tau2"),
        ({"tau1": math.nan}, "tau1"),
        ({"tau1": 0.0, "tau2": 0.0}, "tau1, tau2"),
        ({"temperatures": ((1.0, 0.0),)}, "temperatures[0][1]"),
        ({"temperatures": ((1.0, 2.0), (1.0, 3.0))}, "temperatures"),
        ({"temperatures": ((2.0, 2.0), (1.0, 3.0))}, "temperatures"),
        ({"temperatures": ((0.0, 2.0),)}, "temperatures[0][0]"),
        ({"temperatures": ((math.inf, 2.0),)}, "temperatures[0][0]"),
    ],
)
def test_temperatures_that_make_no_sense_are_refused(words: dict[str, Any], field: str):
    with pytest.raises(RequestError) as caught:
        Classifier(extractor(), 0, 1.0, **words)
    assert caught.value.field == field


def test_what_has_no_logits_is_no_classifier():
    with pytest.raises(RequestError, match=r"^classifier: 'pixels': this network has no logits"):
        Classifier(load_extractor("pixels"), 0, 1.0)


# --- the DDPM preset ---------------------------------------------------------------------------------------------------


def ancestral_loop(
    estimate: Any, guide: Any, x: Tensor, levels: Levels, noises: list[Tensor], scale: float, boost: float
) -> Tensor:
    """Ho et al.'s algorithm 2 with EluCD's mean, (V_t + c sin(pi t / T) max V) s g; t counts down from T = N.

    Args:
        estimate: x_t, index -> x0_hat, clipped where it is.
        guide: x0_hat -> g.
    """
    cumulative = [float(one) ** 2 for one in levels.alpha]  # abar at each level, the noisy end first
    steps = len(cumulative) - 1
    betas = [1 - cumulative[i] / cumulative[i + 1] for i in range(steps)]
    variances = [betas[i] * (1 - cumulative[i + 1]) / (1 - cumulative[i]) for i in range(steps)]
    for i in range(steps):
        t, now, after = steps - i, cumulative[i], cumulative[i + 1]
        x0 = estimate(x, i)
        mean = math.sqrt(after) * betas[i] / (1 - now) * x0 + math.sqrt(1 - betas[i]) * (1 - after) / (1 - now) * x
        mean = mean + (variances[i] + boost * math.sin(math.pi * t / steps) * max(variances)) * scale * guide(x0)
        x = mean + (math.sqrt(variances[i]) * noises[i] if t > 1 else 0)
    return x


@pytest.mark.parametrize("boost", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [None, 3])
def test_the_ddpm_preset_is_the_papers_loop(boost: float, chunk: int | None):
    denoiser, network, x = Toy(VP.linear()), net(), normal(4, *SHAPE, seed=2)
    levels, labels = denoiser.levels.spacing(9), torch.tensor([0, 1, 0, 1])
    noises = [normal(4, *SHAPE, seed=10 + i) for i in range(9)]
    seen: list[Tensor] = []

    def estimate(x: Tensor, i: int) -> Tensor:
        seen.append(denoiser.estimate(x, float(levels.alpha[i]), float(levels.sigma[i]), labels))
        return seen[-1].clamp(-1, 1)

    wanted = ancestral_loop(
        estimate, lambda x0: log_likelihood_gradient(network, x0, TARGETS, 1.0, 0.5), x, levels, noises, 2.0, boost
    )
    assert max(float(each.abs().max()) for each in seen) > 1.5, "the clipping must matter"
    term = Classifier(extractor(), TARGETS, 2.0, tau2=0.5, timing=Timing(boost=boost), pull=DDPM_PULL)
    guided = Guided(Clamped(denoiser), [term], chunk)
    drawn = iter(noises)
    found = ddpm(guided, x, levels, denoiser.condition(labels), noise=lambda: next(drawn))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    drawn = iter(noises)
    plain = ddpm(Clamped(denoiser), x, levels, denoiser.condition(labels), noise=lambda: next(drawn))
    assert float((found - plain).abs().max()) > 0.05


def test_the_ddpm_preset_on_the_digits_model_is_the_papers_loop():
    """Float32; the network is called here as diffusers' own, and its v turned into x0 by hand."""
    denoiser, guide = load("digits"), load_extractor("digits-guide")
    assert guide.is_classifier
    levels, labels = denoiser.levels.spacing(20), torch.tensor([3, 3, 7, 7])
    noises = [normal(4, 1, 8, 8, seed=20 + i).float() for i in range(20)]
    network: Any = denoiser.network

    @torch.no_grad()
    def estimate(x: Tensor, i: int) -> Tensor:
        alpha, sigma = float(levels.alpha[i]), float(levels.sigma[i])
        time = denoiser.levels.time(levels[i]).float().expand(4)
        return (alpha * x - sigma * network(x, time, class_labels=labels)[0]).clamp(-1, 1)

    def guide_by(x0: Tensor) -> Tensor:
        return log_likelihood_gradient(load_extractor("digits-guide").logits, x0, labels, 1.0, 0.5)

    x = normal(4, 1, 8, 8, seed=3).float()
    wanted = ancestral_loop(estimate, guide_by, x, levels, noises, 1.0, 0.3)
    term = Classifier(guide, labels, 1.0, tau2=0.5, timing=Timing(boost=0.3), pull=DDPM_PULL)
    drawn = iter(noises)
    with torch.no_grad():
        found = ddpm(Guided(Clamped(denoiser), [term]), x, levels, denoiser.condition(labels), noise=lambda: next(drawn))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# --- the EDM preset ----------------------------------------------------------------------------------------------------


def heun_loop(estimate: Any, guide: Any, x: Tensor, sigmas: list[float], w: float, a: float) -> Tensor:
    """Karras et al.'s algorithm 1 without churn, and EluCD's move of x before each step.

    Args:
        estimate: x, sigma -> denoised.
        guide: images -> g.
    """
    n = len(sigmas) - 1

    def rms(each: Tensor) -> Tensor:
        return each.pow(2).mean(dim=(1, 2, 3), keepdim=True).sqrt()

    for i in range(n):
        weight = max(w / (n + 1) * (n + 1 - i), 1e-5) + a * w * math.sin(math.pi * i / n)
        g = guide(torch.where(rms(x) > 1, x / rms(x), x))
        x = x + g / rms(g) * rms(x) * weight
        now, after = sigmas[i], sigmas[i + 1]
        slope = (x - estimate(x, now)) / now
        euler = x + (after - now) * slope
        if after > 0:
            euler = x + (after - now) * 0.5 * (slope + (euler - estimate(euler, after)) / after)
        x = euler
    return x


@pytest.mark.parametrize("steps", [2, 7, 18])
@pytest.mark.parametrize("chunk", [None, 3])
def test_the_edm_preset_is_the_papers_loop(steps: int, chunk: int | None):
    denoiser, network, labels = Toy(EDM()), net(), torch.tensor([0, 1, 0, 1])
    levels = denoiser.levels.spacing(steps)
    x = float(levels.sigma[0]) * normal(4, *SHAPE, seed=2)
    w = 0.05
    wanted = heun_loop(
        lambda x, sigma: denoiser.estimate(x, 1.0, sigma, labels),
        lambda images: log_likelihood_gradient(network, images, TARGETS, 1.0, 0.0),
        x,
        [float(s) for s in levels.sigma],
        w,
        0.3,
    )
    term = Classifier(extractor(), TARGETS, w, tau2=0.0, timing=Timing(gain="edm", boost=0.3), pull=EDM_PULL)
    found = heun(Guided(denoiser, [term], chunk), x, levels, denoiser.condition(labels))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    plain = heun(denoiser, x, levels, denoiser.condition(labels))
    assert float((found - plain).abs().max()) > 0.01


def test_the_edm_gain_is_the_papers_weight_over_w():
    """Its floor of 1e-5 is never reached at w = 0.004 and fewer than 400 steps."""
    for steps in (2, 10, 18, 36, 256):
        levels, timing = EDM().spacing(steps), Timing(gain="edm", boost=0.3)
        for i in range(steps):
            wanted = max(0.004 / (steps + 1) * (steps + 1 - i), 1e-5) + 0.3 * 0.004 * math.sin(math.pi * i / steps)
            assert 0.004 * timing.strength(levels[i]) == pytest.approx(wanted, rel=1e-9)


# --- the DiT preset ----------------------------------------------------------------------------------------------------


def test_the_dit_preset_is_the_papers_loop_on_decoded_latents_with_cfg(tmp_path):
    """Float64. The classifier looks at what classifier-free guidance makes of the estimate, and latents are not clipped."""
    tiny_dit(tmp_path)
    denoiser: Any = load(tmp_path).double()
    transformer, vae, w, n = denoiser.network, denoiser.vae, 1.5, 6
    levels, labels, targets = denoiser.levels.spacing(n), torch.tensor([5, 9]), torch.tensor([2, 3])
    noises = [normal(2, 4, 8, 8, seed=30 + i) for i in range(n)]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4), nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES)).double()
    network(torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    network.requires_grad_(False)

    @torch.no_grad()
    def estimate(x: Tensor, i: int) -> Tensor:
        alpha, sigma = float(levels.alpha[i]), float(levels.sigma[i])
        time = denoiser.levels.time(levels[i]).float().expand(2)
        told, untold = (transformer(x, time, class_labels=given).sample[:, :4] for given in (labels, torch.full((2,), 1000)))
        return (x - sigma * (told + w * (told - untold))) / alpha

    def guide(x0: Tensor) -> Tensor:
        return log_likelihood_gradient(
            lambda z: network(vae.decode(z / vae.config.scaling_factor).sample), x0, targets, 1.0, 0.5
        )

    x = normal(2, 4, 8, 8, seed=4)
    wanted = ancestral_loop(estimate, guide, x, levels, noises, 3.0, 0.3)
    classifier = FeatureExtractor("net", network, classify=network)
    condition = denoiser.condition(labels)
    term = Classifier(classifier, targets, 3.0, tau2=0.5, timing=Timing(boost=0.3), pull=DDPM_PULL)
    for terms, chunk in (([CFG(w), term], None), ([term, CFG(w)], None), ([CFG(w), term], 1)):
        drawn = iter(noises)
        with torch.no_grad():
            found = ddpm(Guided(denoiser, terms, chunk), x, levels, condition, noise=lambda drawn=drawn: next(drawn))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    drawn = iter(noises)
    with torch.no_grad():
        unguided = ddpm(Guided(denoiser, [CFG(w)]), x, levels, condition, noise=lambda: next(drawn))
    assert float((unguided - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize("jacobian", ["exact", "identity"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_beside_cfg_what_moves_the_sample_looks_at_its_estimate_through_the_conditional_one(jacobian: Any, chunk: int | None):
    """The rule "held", written out: the gradient is taken at classifier-free guidance's estimate, its shift as a constant."""

    class Decoded(Toy):
        def decode(self, x0: Tensor) -> Tensor:
            return torch.tanh(x0)

    denoiser, network, w, scale = Decoded(VP.cosine()), net(), 1.5, 0.7
    levels, labels = denoiser.levels.spacing(5), torch.tensor([0, 1, 0, 1])
    start = wanted = normal(4, *SHAPE, seed=6)
    for t, s in levels.pairs():
        alpha, sigma = float(t.alpha), float(t.sigma)
        told, untold = (denoiser.estimate(wanted, alpha, sigma, each) for each in (labels, torch.full((4,), 2)))
        used = told + w * (told - untold)
        leaf = wanted.clone().requires_grad_()
        at = denoiser.estimate(leaf, alpha, sigma, labels) + (used - told) if jacobian == "exact" else leaf - wanted + used
        value = network(torch.tanh(at)).log_softmax(1)[torch.arange(4), TARGETS].sum()
        (g,) = torch.autograd.grad(value, leaf)
        eps = (wanted - alpha * used) / sigma
        wanted = float(s.alpha) * (used + sigma**2 / alpha * scale * g) + float(s.sigma) * eps
    term = Classifier(extractor(), TARGETS, scale, pull=Pull(jacobian, "none", rule="held"))
    for terms in ([CFG(w), term], [term, CFG(w)]):
        found = ddim(Guided(denoiser, terms, chunk), start, levels, denoiser.condition(labels))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# --- nothing, and zero -------------------------------------------------------------------------------------------------

WAYS: dict[str, tuple[Pull, str]] = {
    "shift": (Pull(), "ddim"),
    "held": (Pull(rule="held"), "ddim"),
    "ancestral": (DDPM_PULL, "ddpm"),
    "before": (EDM_PULL, "heun"),
    "gaussian": (Pull("gaussian"), "dpmpp_2m"),
    "inner": (Pull("identity", inner=2), "ddim"),
}
SAMPLERS: dict[str, Any] = {"ddim": ddim, "ddpm": ddpm, "heun": heun, "dpmpp_2m": dpmpp_2m}


def sampled(way: str, terms: list[Guidance], dtype: torch.dtype = torch.float32) -> Tensor:
    sampler, denoiser = WAYS[way][1], Toy(VP.cosine(), dtype)
    noises = iter([normal(4, *SHAPE, seed=40 + i).to(dtype) for i in range(5)])
    words = {"noise": lambda: next(noises)} if sampler == "ddpm" else {}
    x, levels = normal(4, *SHAPE, seed=5).to(dtype), denoiser.levels.spacing(5)
    return SAMPLERS[sampler](Guided(denoiser, terms), x, levels, denoiser.condition([0, 1, 0, 1]), **words)


@pytest.mark.parametrize("way", WAYS)
def test_scale_zero_is_no_guidance_to_the_bit(way: str):
    plain = sampled(way, [])
    assert torch.equal(sampled(way, [Classifier(extractor(torch.float32), TARGETS, 0.0, pull=WAYS[way][0])]), plain)
    guided = sampled(way, [Classifier(extractor(torch.float32), TARGETS, 0.5, pull=WAYS[way][0])])
    assert float((guided - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_a_constant_classifier_guides_nowhere(way: str):
    network = net(torch.float32)
    network[3].weight.data.zero_()
    constant = FeatureExtractor("constant", network, classify=network)
    found = sampled(way, [Classifier(constant, TARGETS, 0.5, pull=WAYS[way][0])])
    torch.testing.assert_close(found, sampled(way, []), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_classifier_whose_gradient_vanishes_for_one_image_leaves_that_one_alone(way: str):
    """ReLU behind a large negative bias: image 0 is dead, the others are not."""

    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.first = net(torch.float32), True

        def forward(self, images: Tensor) -> Tensor:
            alive = torch.ones(len(images), 1)
            alive[0] = 0
            return torch.relu(alive * self.body(images))

    network = Dead()
    found = sampled(way, [Classifier(FeatureExtractor("dead", network, classify=network), TARGETS, 0.5, pull=WAYS[way][0])])
    plain = sampled(way, [])
    torch.testing.assert_close(found[0], plain[0], rtol=1e-6, atol=1e-6)
    assert float((found[1:] - plain[1:]).abs().amax((1, 2, 3)).min()) > 1e-3


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][0].normalize != "none"])
def test_logits_of_any_finite_size_guide_alike_where_gradients_are_normalised(way: str):
    """tau2 = 0: the logit alone, whose gradient has the same direction at every size."""
    found = []
    for size in (1.0, 1e30):
        network = net(torch.float32, width=2 * size)
        huge = FeatureExtractor("huge", network, classify=network)
        found.append(sampled(way, [Classifier(huge, TARGETS, 0.3, tau2=0.0, pull=WAYS[way][0])]))
    assert bool(found[1].isfinite().all())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_logits_that_overflow_are_a_failure_that_names_the_guidance():
    class Infinite(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :CLASSES] / 0.0

    network = Infinite()
    with pytest.raises(RunError, match="guidance classifier: the gradient is not finite"):
        sampled("shift", [Classifier(FeatureExtractor("inf", network, classify=network), TARGETS, 0.3)])


# --- classifiers of noisy states ---------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """f(x_t / n, t): time changes what it looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.times: list[Tensor] = []

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        self.times.append(time)
        return self.body(images) * (1 + time[:, None].double() / 1000)


def test_the_noisy_classifier_is_dhariwal_and_nichols_mean():
    """mean + V s grad_{x_t} log p(y | x_t, t), on the discrete steps of a variance-preserving model."""
    denoiser, network, x = Toy(VP.linear()), Noisy(), normal(4, *SHAPE, seed=2)
    levels, labels = denoiser.levels.spacing(7), torch.tensor([0, 1, 0, 1])
    noises = [normal(4, *SHAPE, seed=50 + i) for i in range(7)]
    cumulative = [float(one) ** 2 for one in levels.alpha]
    wanted = x
    for i in range(7):
        now, after = cumulative[i], cumulative[i + 1]
        beta = 1 - now / after
        variance = beta * (1 - after) / (1 - now)
        x0 = denoiser.estimate(wanted, math.sqrt(now), math.sqrt(1 - now), labels)
        time = denoiser.levels.time(levels[i]).float().expand(4)
        g = log_likelihood_gradient(
            lambda z, time=time: network.body(z) * (1 + time[:, None].double() / 1000), wanted, TARGETS, 1.0, 1.0
        )
        mean = math.sqrt(after) * beta / (1 - now) * x0 + math.sqrt(1 - beta) * (1 - after) / (1 - now) * wanted
        wanted = mean + variance * 2.0 * g + (math.sqrt(variance) * noises[i] if i < 6 else 0)
    pull = Pull(rule="ancestral", normalize="none", jacobian="identity", input="state")
    term = NoisyClassifier(network, denoiser.levels, TARGETS, 2.0, pull=pull)
    drawn = iter(noises)
    found = ddpm(Guided(denoiser, [term]), x, levels, denoiser.condition(labels), noise=lambda: next(drawn))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert [float(time[0]) for time in network.times] == [float(denoiser.levels.time(t)) for t, _ in levels.pairs()]
    assert all(time.shape == (4,) and time.dtype == torch.float32 for time in network.times)


def test_a_noisy_classifier_looks_at_the_state_alone():
    with pytest.raises(RequestError, match=r"^input: 'x0_hat': .*looks at the noisy state"):
        NoisyClassifier(Noisy(), VP.linear(), 0, 1.0, pull=Pull("identity"))
