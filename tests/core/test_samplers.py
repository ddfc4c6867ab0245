"""Samplers on denoisers with known answers: order of accuracy, parity with diffusers, and the marginals of ancestral noise."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from scipy.integrate import solve_ivp
from support.drawn import normal
from torch import Tensor

from handful.core.denoiser import Clamped, Condition, Denoiser, Prediction
from handful.core.noise import EDM, VP, Flow, Level, Levels, Schedule, noised, posterior_deviation
from handful.core.samplers import SAMPLERS, STOCHASTIC, ddim, ddpm, dpmpp_2m, heun, start
from handful.errors import RequestError
from handful.models import load
from handful.models.unet2d import UNet2DDenoiser

CIFAR = Path(__file__).resolve().parents[3] / "shared" / "models" / "cifar10-unet"
NOTHING = Condition(None)


class Ideal(Denoiser):
    """The posterior mean of a mixture of isotropic Gaussians; deviation 0 makes it a finite data set."""

    def __init__(self, means: Tensor, deviation: float, levels: Schedule | None = None) -> None:
        super().__init__()
        self.means, self.deviation = means, deviation
        self.shape = (means.shape[1], means.shape[2], means.shape[3])
        self.levels = levels or EDM()

    def condition(self, labels) -> Condition:
        return NOTHING

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        alpha, sigma = level.alpha.to(x_t.dtype), level.sigma.to(x_t.dtype)
        variance = alpha**2 * self.deviation**2 + sigma**2
        off = x_t[:, None] - alpha * self.means.to(x_t.dtype)
        weight = (-off.square().sum((2, 3, 4)) / (2 * variance)).softmax(1)
        component = self.means.to(x_t.dtype) + alpha * self.deviation**2 / variance * off
        return (weight.view(*weight.shape, 1, 1, 1) * component).sum(1)


def mixture() -> Ideal:
    return Ideal(torch.tensor([[1.0, 0.2], [-0.6, 0.9], [0.1, -1.1]], dtype=torch.float64).view(3, 2, 1, 1), 0.35)


# --- order of accuracy -------------------------------------------------------------------------------------------------


def vp_path(steps: int) -> Levels:
    ratio = torch.logspace(math.log10(10.0), math.log10(0.05), steps + 1, dtype=torch.float64)
    total = torch.hypot(ratio, torch.ones_like(ratio))
    return Levels(1 / total, ratio / total)


def edm_path(steps: int) -> Levels:
    return Levels(
        torch.ones(steps + 1, dtype=torch.float64),
        torch.linspace(10.0 ** (1 / 7), 0.05 ** (1 / 7), steps + 1, dtype=torch.float64) ** 7,
    )


def flow_path(steps: int) -> Levels:
    s = torch.linspace(0.92, 0.05, steps + 1, dtype=torch.float64)
    return Levels(1 - s, s)


def exact(denoiser: Ideal, x: Tensor, levels: Levels) -> Tensor:
    """The probability-flow ODE in EDM's coordinates y = x / alpha, r = sigma / alpha: dy/dr = (y - x0_hat) / r, to 1e-12."""

    def slope(r: float, y: np.ndarray) -> np.ndarray:
        at = Level(torch.ones((), dtype=torch.float64), torch.tensor(r, dtype=torch.float64))
        state = torch.from_numpy(y).view_as(x)
        return ((state - denoiser(state, at, NOTHING)) / r).flatten().numpy()

    first, last = levels[0], levels[-1]
    span = (float(first.ratio), float(last.ratio))
    solved = solve_ivp(slope, span, (x / first.alpha).flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-12)
    return last.alpha * torch.from_numpy(solved.y[:, -1]).view_as(x)


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2), (dpmpp_2m, 2)])
@pytest.mark.parametrize("path", [vp_path, edm_path, flow_path])
def test_error_falls_with_the_samplers_order(path, sampler, order):
    denoiser = mixture()
    first = path(1)[0]
    x = noised(denoiser.means[torch.arange(24) % 3], normal(24, 2, 1, 1, seed=1), first)
    reference = exact(denoiser, x, path(1))
    counts = (32, 64, 128, 256, 512)
    errors = [float((sampler(denoiser, x, path(n), NOTHING) - reference).square().mean().sqrt()) for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.2), errors
    assert errors[-1] < (2e-2 if order == 1 else 5e-4)


@pytest.mark.parametrize("sampler", [ddim, heun, dpmpp_2m])
def test_the_three_processes_lead_to_the_same_images(sampler):
    """Where the paths share their ratios, VP, EDM and flow are one ODE in three coordinates."""
    denoiser = mixture()
    ratio = edm_path(400).sigma
    paths = [Levels(scale, ratio * scale) for scale in (torch.ones_like(ratio), 1 / (1 + ratio), 1 / (1 + ratio**2).sqrt())]
    noise = normal(12, 2, 1, 1, seed=2)
    ends = []
    for levels in paths:
        first, last = levels[0], levels[-1]
        ends.append(sampler(denoiser, first.sigma * noise, levels, NOTHING) / last.alpha)
    # DDIM and DPM-Solver++ are exact under a change of coordinates; Heun's trapezoid has its own error in each
    tolerance = 1e-3 if sampler is heun else 1e-10
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=tolerance)


def test_heun_is_algorithm_1_of_karras_et_al_on_an_edm_path():
    denoiser, levels = mixture(), EDM().spacing(12)
    x = 80 * normal(6, 2, 1, 1, seed=3)
    found = heun(denoiser, x, levels, NOTHING)
    t = levels.sigma
    for i in range(12):
        d = (x - denoiser(x, levels[i], NOTHING)) / t[i]
        euler = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d = (d + (euler - denoiser(euler, levels[i + 1], NOTHING)) / t[i + 1]) / 2
        x = x + (t[i + 1] - t[i]) * d
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


# --- data --------------------------------------------------------------------------------------------------------------


def drawing(shape: torch.Size, seed: int, dtype: torch.dtype = torch.float64) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, dtype=dtype, generator=generator)


SCHEDULES = {"vp linear": VP.linear(), "vp cosine": VP.cosine(), "edm": EDM(), "flow": Flow(), "flow shifted": Flow(3.0)}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_ideal_denoiser_of_a_finite_data_set_ends_on_its_images(kind, name):
    data = normal(7, 1, 4, 4, seed=4)
    levels = SCHEDULES[kind].spacing(40)
    x = start(normal(30, 1, 4, 4, seed=5), levels)
    extra: Any = {"noise": drawing(x.shape, 6)} if name in STOCHASTIC else {}
    found = SAMPLERS[name](Ideal(data, 0.0), x, levels, NOTHING, **extra)
    distance = (found[:, None] - data).abs().amax((2, 3, 4))
    assert float(distance.amin(1).max()) < 1e-6
    assert len(distance.argmin(1).unique()) >= 5  # of 7 images, 30 draws: fewer than 5 has a chance below 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_point_mass_is_reached_in_one_step_from_pure_noise(name):
    point = normal(1, 1, 3, 3, seed=7)
    for schedule in SCHEDULES.values():
        levels = schedule.spacing(1)
        x = start(normal(2, 1, 3, 3, seed=8), levels)
        extra: Any = {"noise": drawing(x.shape, 0)} if name in STOCHASTIC else {}
        found = SAMPLERS[name](Ideal(point, 0.0), x, levels, NOTHING, **extra)
        torch.testing.assert_close(found, point.expand_as(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_flow_starts_from_alpha_zero_without_dividing_by_it(name, steps):
    levels = Flow(3.0).spacing(steps)
    assert float(levels.alpha[0]) == 0
    denoiser = mixture()
    x = start(normal(5, 2, 1, 1, seed=9).float(), levels)
    for eta in (0.0, 1.0):
        extra: Any = {"noise": drawing(x.shape, 10, torch.float32)} if name in STOCHASTIC else {}
        found = SAMPLERS[name](denoiser, x, levels, NOTHING, **extra, **({"eta": eta} if name == "ddim" else {}))
        assert found.dtype == torch.float32
        assert bool(found.isfinite().all())
        # the first estimate is the mean of the data: after it, images are where data can be
        assert float(found.abs().max()) < 3


def test_the_start_is_the_noise_of_the_first_level():
    noise = normal(2, 1, 3, 3, seed=11)
    assert start(noise, VP.linear().spacing(10)) is noise  # alpha x0 is left out: unit variance either way
    torch.testing.assert_close(start(noise, EDM(sigma_max=80.0).spacing(10)), 80 * noise)
    torch.testing.assert_close(start(noise, Flow().spacing(10)), noise)
    later = Levels(torch.tensor([0.4, 1.0], dtype=torch.float64), torch.tensor([0.6, 0.0], dtype=torch.float64))
    torch.testing.assert_close(start(noise, later), 0.6 * noise)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_reports_its_index_and_its_estimate(name):
    levels, seen = EDM().spacing(6), []
    denoiser = mixture()
    x = start(normal(3, 2, 1, 1, seed=12), levels)
    extra: Any = {"noise": drawing(x.shape, 0)} if name in STOCHASTIC else {}
    found = SAMPLERS[name](denoiser, x, levels, NOTHING, each=lambda i, x0: seen.append((i, x0)), **extra)
    assert [i for i, _ in seen] == list(range(6))
    torch.testing.assert_close(seen[0][1], denoiser(x, levels[0], NOTHING))
    torch.testing.assert_close(seen[-1][1], found)  # the last step goes to sigma = 0, where x is the estimate


def test_stochastic_samplers_without_noise_say_so():
    levels, x = EDM().spacing(3), normal(1, 2, 1, 1)
    with pytest.raises(ValueError, match="noise"):
        ddim(mixture(), x, levels, NOTHING, eta=0.5)


# --- ancestral noise ---------------------------------------------------------------------------------------------------


def test_ddpm_is_ddim_with_eta_1():
    for schedule in SCHEDULES.values():
        levels = schedule.spacing(9)
        x = start(normal(4, 2, 1, 1, seed=13), levels)
        one = ddpm(mixture(), x, levels, NOTHING, noise=drawing(x.shape, 14))
        other = ddim(mixture(), x, levels, NOTHING, noise=drawing(x.shape, 14), eta=1.0)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_posterior_deviation_is_that_of_the_gaussian_posterior(kind):
    """x_s given x_t and x0, by Bayes: precision 1 / sigma_s^2 plus that of the forward step x_t | x_s."""
    for t, s in SCHEDULES[kind].spacing(8).pairs():
        forward = float(t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2)
        scale = float(t.alpha / s.alpha)
        if float(s.sigma) == 0:
            assert float(posterior_deviation(t, s)) == 0
            continue
        precision = 1 / float(s.sigma) ** 2 + scale**2 / forward
        assert float(posterior_deviation(t, s)) == pytest.approx(precision**-0.5, rel=1e-9)


def without_clean_end(levels: Levels) -> Levels:
    return Levels(levels.alpha[:-1], levels.sigma[:-1])


def moments(x: Tensor) -> tuple[float, float]:
    return float(x.mean()), float(x.var())


@pytest.mark.parametrize("kind", SCHEDULES)
def test_small_variance_keeps_the_marginals_of_a_point_mass(kind):
    """Ho et al. 2020, section 3.2: the posterior's variance is right for data that is one point, at any number of steps.

    50,000 draws: the mean is off by 5 of its standard errors, or the variance, with a chance below 2e-6.
    """
    n, point = 50_000, 0.7
    levels = without_clean_end(SCHEDULES[kind].spacing(6))
    first, last = levels[0], levels[-1]
    x = noised(torch.full((n, 1, 1, 1), point, dtype=torch.float64), normal(n, 1, 1, 1, seed=15), first)
    denoiser = Ideal(torch.full((1, 1, 1, 1), point, dtype=torch.float64), 0.0)
    mean, variance = moments(ddpm(denoiser, x, levels, NOTHING, noise=drawing(x.shape, 16)))
    assert abs(mean - float(last.alpha) * point) < 5 * float(last.sigma) / n**0.5
    assert variance == pytest.approx(float(last.sigma) ** 2, rel=5 * (2 / n) ** 0.5)


@pytest.mark.parametrize("kind", ["vp linear", "vp cosine"])
def test_large_variance_keeps_the_marginals_of_standard_normal_data(kind):
    """Their other choice is right for N(0, 1) data under a variance-preserving process, at any number of steps.

    50,000 draws: off by 5 standard errors with a chance below 2e-6.
    """
    n = 50_000
    levels = without_clean_end(SCHEDULES[kind].spacing(6))
    x = normal(n, 1, 1, 1, seed=17)
    denoiser = Ideal(torch.zeros(1, 1, 1, 1, dtype=torch.float64), 1.0)
    mean, variance = moments(ddpm(denoiser, x, levels, NOTHING, noise=drawing(x.shape, 18), variance="large"))
    assert abs(mean) < 5 / n**0.5
    assert variance == pytest.approx(1, rel=5 * (2 / n) ** 0.5)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_ancestral_sampling_reaches_a_gaussian(kind, variance):
    """N(0.5, 0.6^2) in 200 steps; 20,000 draws.

    Discretisation costs up to 1.5 % of the deviation; 5 standard errors of the mean are 0.021, of the deviation 2.5 %
    (a false alarm below 2e-6).
    """
    n, levels = 20_000, SCHEDULES[kind].spacing(200)
    denoiser = Ideal(torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), 0.6)
    x = start(normal(n, 1, 1, 1, seed=19), levels)
    mean, spread = moments(ddpm(denoiser, x, levels, NOTHING, noise=drawing(x.shape, 20), variance=variance))
    assert abs(mean - 0.5) < 0.021
    assert spread**0.5 == pytest.approx(0.6, rel=0.04)


# --- parity with diffusers ---------------------------------------------------------------------------------------------


def tiny_unet(out_channels: int = 1) -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=out_channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            num_class_embeds=5,
        )
    return unet.eval()


def replay(denoiser: UNet2DDenoiser, x: Tensor, labels: Tensor, scheduler: Any, **step: Any) -> Tensor:
    """diffusers' own loop over a scheduler's timesteps."""
    for t in scheduler.timesteps:
        told = t.expand(len(x))
        out = denoiser.network(scheduler.scale_model_input(x, t), told, class_labels=labels, return_dict=False)[0]
        x = scheduler.step(out, t, x, **step).prev_sample
    return x


Case = tuple[UNet2DDenoiser, Tensor, Tensor, dict[str, Any]]


@pytest.fixture(params=["tiny eps linear", "tiny v cosine", "cifar10"])
def case(request) -> Iterator[Case]:
    """A model, noise, labels, and the keywords of its diffusers scheduler."""
    draw = torch.Generator().manual_seed(21)
    if request.param == "cifar10":
        if not CIFAR.is_dir():
            pytest.skip(f"{CIFAR} is not there: it is shared among the developers, not shipped")
        denoiser = load(CIFAR)
        assert isinstance(denoiser, UNet2DDenoiser)
        yield (
            denoiser,
            torch.randn(2, 3, 32, 32, generator=draw),
            torch.tensor([3, 7]),
            {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        )
        return
    v = "v" in request.param.split()
    words: dict[str, Any] = {
        "beta_schedule": "squaredcos_cap_v2" if v else "linear",
        "prediction_type": "v_prediction" if v else "epsilon",
    }
    made: Any = DDPMScheduler(**words)
    denoiser = UNet2DDenoiser(tiny_unet(), "v" if v else "eps", VP(made.alphas_cumprod))
    yield denoiser, torch.randn(3, 1, 8, 8, generator=draw), torch.tensor([0, 2, 4]), words


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [4, 10, 20])
def test_ddim_is_diffusers_ddim(case, steps, spacing):
    denoiser, noise, labels, words = case
    scheduler: Any = DDIMScheduler(**words, clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    wanted = replay(denoiser, noise, labels, scheduler)
    levels = denoiser.levels.spacing(steps, spacing)
    found = ddim(denoiser, noise, levels, denoiser.condition(labels))
    scale = max(1.0, float(wanted.abs().max()))  # an untrained eps network leaves the range of images
    assert float((found - wanted).abs().max()) < 1e-4 * scale


@torch.no_grad()
@pytest.mark.parametrize("steps", [4, 10])
def test_ddim_with_eta_1_is_diffusers_with_the_same_noise(case, steps):
    denoiser, noise, labels, words = case
    scheduler: Any = DDIMScheduler(**words, clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    wanted = replay(denoiser, noise, labels, scheduler, eta=1.0, generator=torch.Generator().manual_seed(22))
    levels = denoiser.levels.spacing(steps, "leading")
    drawn = drawing(noise.shape, 22, torch.float32)
    found = ddim(denoiser, noise, levels, denoiser.condition(labels), eta=1.0, noise=drawn)
    assert float((found - wanted).abs().max()) < 1e-4 * max(1.0, float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize(("variance", "theirs"), [("small", "fixed_small"), ("large", "fixed_large")])
def test_ddpm_is_diffusers_ddpm_with_the_same_noise(case, variance, theirs):
    denoiser, noise, labels, words = case
    scheduler: Any = DDPMScheduler(**words, clip_sample=False, variance_type=theirs, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    wanted = replay(denoiser, noise, labels, scheduler, generator=torch.Generator().manual_seed(23))
    levels = denoiser.levels.spacing(10, "leading")
    drawn = drawing(noise.shape, 23, torch.float32)
    found = ddpm(denoiser, noise, levels, denoiser.condition(labels), noise=drawn, variance=variance)
    assert float((found - wanted).abs().max()) < 1e-4 * max(1.0, float(wanted.abs().max()))


def learned_case(prediction: Prediction = "eps") -> tuple[UNet2DDenoiser, Tensor, Tensor]:
    """A network that says of the variance something from the range of trained ones, [-1, 1]; a start and labels."""
    unet = tiny_unet(out_channels=2)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(26)
        unet.conv_out.weight[1] = 0.05 * torch.randn(8, 3, 3)
    made: Any = DDPMScheduler()
    denoiser = UNet2DDenoiser(unet, prediction, VP(made.alphas_cumprod))
    return denoiser, torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(27)), torch.tensor([0, 2, 4])


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize(("prediction", "theirs"), [("eps", "epsilon"), ("x0", "sample")])
def test_ddpm_with_learned_variance_is_diffusers_learned_range_step_by_step(prediction, theirs, steps, spacing):
    denoiser, noise, labels = learned_case(prediction)
    scheduler: Any = DDPMScheduler(
        variance_type="learned_range", prediction_type=theirs, clip_sample=False, timestep_spacing=spacing
    )
    scheduler.set_timesteps(steps)
    x, estimates, draw = noise, [], torch.Generator().manual_seed(28)
    for t in scheduler.timesteps:
        out = denoiser.network(x, t.expand(3), class_labels=labels, return_dict=False)[0]
        made = scheduler.step(out, t, x, generator=draw)
        estimates.append(made.pred_original_sample)
        x = made.prev_sample
    ours: list[Tensor] = []
    levels = denoiser.levels.spacing(steps, spacing)
    drawn = drawing(noise.shape, 28, torch.float32)
    found = ddpm(
        denoiser, noise, levels, denoiser.condition(labels), noise=drawn, variance="learned", each=lambda _, x0: ours.append(x0)
    )
    if spacing == "trailing":
        # its last step starts above t = 0, where diffusers takes the small variance for 1e-20 instead of 0, and so still adds
        # a noise of that to the power (1 - v) / 2; a step to sigma = 0 ends in the estimate
        x = estimates[-1]
    for mine, wanted in zip([*ours, found], [*estimates, x], strict=True):
        assert float((mine - wanted).abs().max()) < 3e-5 * max(1.0, float(wanted.abs().max()))
    for fixed in ("small", "large"):  # neither of which comes near
        drawn = drawing(noise.shape, 28, torch.float32)
        other = ddpm(denoiser, noise, levels, denoiser.condition(labels), noise=drawn, variance=fixed)
        assert float((other - x).abs().max()) > 5e-4 * max(1.0, float(x.abs().max()))


class Says(Ideal):
    """An ideal denoiser that says the same of the variance everywhere, in [-1, 1]."""

    said = 0.0

    @property
    def learns_variance(self) -> bool:
        return True

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        self.learned_variance = torch.full_like(x_t, self.said)
        return super().forward(x_t, level, condition)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_learned_variance_runs_from_the_small_to_the_large_one_and_their_geometric_mean_lies_between(kind):
    levels, x = SCHEDULES[kind].spacing(2), normal(4, 2, 1, 1, seed=29)
    denoiser = Says(mixture().means, 0.35)
    condition, t, s = NOTHING, levels[0], levels[1]
    path = Levels(levels.alpha[:2], levels.sigma[:2])
    ones = lambda: torch.ones_like(x)  # noqa: E731
    zeros = lambda: torch.zeros_like(x)  # noqa: E731

    def noised_by(**words: Any) -> float:
        """The deviation of the noise that one step adds."""
        with_noise, without = (ddpm(denoiser, x, path, condition, noise=drawn, **words) for drawn in (ones, zeros))
        return float((with_noise - without).mean())

    small, large = noised_by(variance="small"), noised_by(variance="large")
    assert small == pytest.approx(float(posterior_deviation(t, s)), rel=1e-9)
    assert large == pytest.approx(float((t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2).sqrt()), rel=1e-9)
    for said, wanted in ((-1.0, small), (1.0, large), (0.0, (small * large) ** 0.5)):
        denoiser.said = said
        assert noised_by(variance="learned") == pytest.approx(wanted, rel=1e-9)


def test_a_learned_variance_passes_the_clamp():
    denoiser, noise, labels = learned_case()
    clamped, at = Clamped(denoiser), denoiser.levels.spacing(4)[1]
    with torch.no_grad():
        clamped(noise, at, denoiser.condition(labels))
        variance = clamped.learned_variance
        denoiser(noise, at, denoiser.condition(labels))
    assert clamped.learns_variance
    assert variance is not None
    assert denoiser.learned_variance is not None
    assert torch.equal(variance, denoiser.learned_variance)


def test_a_variance_that_was_not_learned_is_refused_by_name():
    x, levels = normal(2, 2, 1, 1), EDM().spacing(3)
    with pytest.raises(
        RequestError, match=r"^sampler\.variance: 'learned': this model has not learned its variance\. Use small or large"
    ):
        ddpm(mixture(), x, levels, NOTHING, noise=drawing(x.shape, 0), variance="learned")


@torch.no_grad()
@pytest.mark.parametrize("steps", [4, 10, 20])
def test_dpmpp_2m_is_diffusers_multistep_solver(case, steps):
    """Spaced "trailing", where both take the same training steps (its "linspace" and "leading" count otherwise)."""
    denoiser, noise, labels, words = case
    scheduler: Any = DPMSolverMultistepScheduler(**words, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    levels = denoiser.levels.spacing(steps, "trailing")
    assert scheduler.timesteps.tolist() == [round(float(denoiser.levels.time(at))) for at in levels][:-1]
    wanted = replay(denoiser, noise, labels, scheduler)
    found = dpmpp_2m(denoiser, noise, levels, denoiser.condition(labels))
    assert float((found - wanted).abs().max()) < 1e-4 * max(1.0, float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_is_diffusers_flow_match_heun(shift):
    denoiser = UNet2DDenoiser(tiny_unet(), "flow", Flow(shift))
    scheduler: Any = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(8)
    s = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()
    labels, x = torch.tensor([0, 2, 4]), normal(3, 1, 8, 8, seed=24).float()
    found = heun(denoiser, x, Levels(1 - s, s), denoiser.condition(labels))
    for t in scheduler.timesteps:
        v = denoiser.network(x, t.expand(3), class_labels=labels, return_dict=False)[0]
        x = scheduler.step(v, t, x).prev_sample
    assert float((found - x).abs().max()) < 1e-4


class Preconditioned(Denoiser):
    """A raw network within EDM's preconditioning, as diffusers' scheduler applies it."""

    def __init__(self, network: UNet2DModel, scheduler: Any) -> None:
        super().__init__()
        self.network, self.scheduler = network, scheduler
        self.shape, self.levels = (1, 8, 8), EDM()

    def condition(self, labels) -> Condition:
        return Condition(torch.as_tensor(labels))

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        sigma = level.sigma.float()
        scaled = self.scheduler.precondition_inputs(x_t, sigma)
        told = self.scheduler.precondition_noise(sigma).expand(len(x_t))
        out = self.network(scaled, told, class_labels=condition.labels, return_dict=False)[0]
        return self.scheduler.precondition_outputs(x_t, out, sigma)


@torch.no_grad()
def test_ddim_on_an_edm_path_is_diffusers_edm_euler():
    scheduler: Any = EDMEulerScheduler()
    scheduler.set_timesteps(10)
    denoiser = Preconditioned(tiny_unet(), scheduler)
    labels, noise = torch.tensor([0, 2, 4]), normal(3, 1, 8, 8, seed=25).float()
    levels = EDM().spacing(10)
    torch.testing.assert_close(levels.sigma.float(), scheduler.sigmas, rtol=1e-5, atol=0)
    found = ddim(denoiser, start(noise, levels), levels, denoiser.condition(labels))
    x = noise * 80
    for t in scheduler.timesteps:
        out = denoiser.network(scheduler.scale_model_input(x, t), t.expand(3), class_labels=labels, return_dict=False)[0]
        x = scheduler.step(out, t, x).prev_sample
    assert float((found - x).abs().max()) < 1e-4
