"""Noise levels: equal to diffusers' and to the papers' formulas, and time is the inverse of level."""

import math
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from handful.core.noise import EDM, VP, Flow, Level, Levels, level, noised
from handful.errors import RequestError


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- VP: training steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "name"), [(VP.linear(), "linear"), (VP.cosine(), "squaredcos_cap_v2")])
def test_vp_schedules_are_diffusers_alphas_cumprod(schedule, name):
    scheduler: Any = DDPMScheduler(beta_schedule=name)
    # diffusers multiplies a thousand factors in float32
    torch.testing.assert_close(schedule.alpha**2, scheduler.alphas_cumprod.double(), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(1000, dtype=torch.float64))


def test_cosine_is_the_papers_formula_where_beta_is_not_clipped():
    def f(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = VP.cosine()
    for t in (0, 10, 500, 900):  # step t ends at (t + 1) / T
        assert float(schedule.alpha[t] ** 2) == pytest.approx(f(t + 1) / f(0), rel=1e-9)


def test_more_training_steps_are_honoured():
    assert len(VP.linear(steps=50)) == 50
    scheduler: Any = DDPMScheduler(num_train_timesteps=50, beta_start=1e-3, beta_end=0.3)
    torch.testing.assert_close(VP.linear(50, 1e-3, 0.3).alpha ** 2, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("schedule", [VP.linear(), VP.cosine(), VP.linear(rounded=True)])
def test_time_is_the_inverse_of_at_on_every_training_step(schedule):
    steps = torch.arange(1000)
    at = Level(schedule.alpha[steps], schedule.sigma[steps])
    torch.testing.assert_close(schedule.time(at), steps.double(), atol=1e-6, rtol=0)
    assert float(schedule.time(schedule.at(437))) == pytest.approx(437, abs=1e-6)


def test_time_between_two_steps_is_linear_in_log_snr():
    schedule = VP.cosine()
    low, high = schedule.at(300).ratio.log(), schedule.at(301).ratio.log()
    for part in (0.25, 0.5, 0.9):
        ratio = (low + part * (high - low)).exp()
        assert float(schedule.time(level(1.0, ratio))) == pytest.approx(300 + part, abs=1e-6)


def test_time_depends_on_the_ratio_alone():
    schedule, t = VP.linear(), 250
    at = schedule.at(t)
    for scale in (0.1, 1.0, 7.0):
        assert float(schedule.time(level(scale * at.alpha, scale * at.sigma))) == pytest.approx(t, abs=1e-6)


def test_rounded_time_is_the_nearest_step_in_log_snr():
    schedule = VP.cosine(rounded=True)
    low, high = schedule.at(300).ratio.log(), schedule.at(301).ratio.log()
    for part, step in ((0.1, 300), (0.45, 300), (0.55, 301), (0.99, 301)):
        assert float(schedule.time(level(1.0, (low + part * (high - low)).exp()))) == step


def test_time_outside_the_trained_range_is_its_end():
    schedule = VP.linear()
    assert float(schedule.time(level(0.0, 1.0))) == 999
    assert float(schedule.time(level(1.0, 0.0))) == 0


def test_time_is_defined_at_zero_terminal_snr():
    scheduler: Any = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    schedule = VP(scheduler.alphas_cumprod)
    assert float(schedule.alpha[-1]) < 1e-6
    assert float(schedule.time(schedule.at(999))) == 999
    assert float(schedule.time(schedule.at(998))) == pytest.approx(998, abs=1e-6)


@pytest.mark.parametrize("kind", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 3, 7, 18, 20, 50, 250, 999, 1000])
def test_spacings_are_diffusers_timesteps(kind, steps):
    scheduler: Any = DDIMScheduler(timestep_spacing=kind)
    scheduler.set_timesteps(steps)
    schedule = VP.linear()
    assert schedule.steps_of(steps, kind).tolist() == scheduler.timesteps.tolist()
    levels = schedule.spacing(steps, kind)
    assert levels.steps == steps
    torch.testing.assert_close(levels.alpha[:-1], schedule.alpha[scheduler.timesteps], rtol=0, atol=0)


def test_logsnr_spacing_has_equal_steps_in_log_snr_over_the_trained_range():
    schedule = VP.linear()
    levels = schedule.spacing(12, "logsnr")
    lam = (levels.alpha / levels.sigma).log()[:-1]
    torch.testing.assert_close(lam.diff(), lam.diff().mean().expand(11), rtol=1e-9, atol=0)
    first, last = Level(levels.alpha[0], levels.sigma[0]), Level(levels.alpha[11], levels.sigma[11])
    assert float(schedule.time(first)) == pytest.approx(999, abs=1e-6)
    assert float(schedule.time(last)) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(13, dtype=torch.float64))


# --- EDM and flow ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high", "rho"), [(0.002, 80.0, 7.0), (0.01, 50.0, 5.0)])
def test_edm_spacing_is_equation_5(low, high, rho):
    steps = 18
    wanted = [(high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)]
    levels = EDM(low, high, rho).spacing(steps)
    torch.testing.assert_close(levels.sigma, vector(*wanted, 0.0), rtol=1e-12, atol=0)
    assert levels.alpha.tolist() == [1.0] * (steps + 1)


def test_edm_tells_sigma_whatever_the_scale_of_the_level():
    assert float(EDM().time(level(1.0, 3.5))) == 3.5
    assert float(EDM().time(level(0.5, 1.75))) == 3.5


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_spacing_is_the_shifted_line(shift):
    levels = Flow(shift).spacing(10)
    for i in range(10):
        t = 1 - i / 10  # Esser et al. 2024, equation 23: sqrt(m / n) is the shift
        s = shift * t / (1 + (shift - 1) * t)
        assert float(levels.sigma[i]) == pytest.approx(s, rel=1e-12)
        assert float(levels.alpha[i]) == pytest.approx(1 - s, abs=1e-12)
    assert (float(levels.alpha[0]), float(levels.sigma[0])) == (0.0, 1.0)


def test_flow_tells_s_at_its_own_scale():
    at = level(0.3, 0.7)
    assert float(Flow().time(at)) == pytest.approx(700)
    assert float(Flow(time_scale=1.0).time(at)) == pytest.approx(0.7)
    assert float(Flow().time(level(1.0, 1.0))) == pytest.approx(500)  # an EDM level of ratio 1 is the flow's s = 1/2
    assert float(Flow().time(level(0.0, 1.0))) == 1000


@pytest.mark.parametrize("schedule", [VP.linear(), VP.cosine(), EDM(), Flow(), Flow(3.0)])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_every_spacing_falls_to_a_clean_image(schedule, steps):
    for kind in schedule.spacings:
        levels = schedule.spacing(steps, kind)
        assert len(levels) == steps + 1
        assert (float(levels.alpha[-1]), float(levels.sigma[-1])) == (1.0, 0.0)
        ratio = levels.sigma / levels.alpha
        assert bool((ratio.diff()[1:] < 0).all())


# --- levels ------------------------------------------------------------------------------------------------------------


def test_levels_count_their_place_and_progress_from_the_noisy_end():
    levels = EDM().spacing(5)
    assert [at.index for at in levels] == [0, 1, 2, 3, 4, 5]
    # the last level that is evaluated has progress 1; the clean end past it too
    assert [at.progress for at in levels] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert levels[-1].index == 5
    assert [(t.index, s.index) for t, s in levels.pairs()] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert EDM().spacing(1)[0].progress == 0
    assert (level(1.0, 2.0).index, level(1.0, 2.0).progress) == (None, 0.0)


@pytest.mark.parametrize(
    ("alpha", "sigma"),
    [
        ([1.0, 1.0], [1.0, 1.0]),  # stands still
        ([1.0, 1.0, 1.0], [1.0, 2.0, 0.0]),  # rises
        ([0.5, 1.0], [1.0, 2.0]),  # sigma rises and alpha with it: the same ratio
        ([0.0, 0.0, 1.0], [1.0, 0.5, 0.0]),  # infinite twice
        ([1.0, -1.0], [1.0, 0.5]),
        ([1.0, 1.0], [1.0, -0.5]),
        ([1.0, math.nan], [1.0, 0.5]),
        ([1.0], [1.0]),
    ],
)
def test_a_path_whose_noise_does_not_fall_is_refused(alpha, sigma):
    with pytest.raises(ValueError, match="levels"):
        Levels(vector(*alpha), vector(*sigma))


def test_vectors_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one length"):
        Levels(vector(1, 1, 1), vector(2, 1))


def test_a_path_may_raise_sigma_as_long_as_the_ratio_falls():
    levels = Levels(vector(0.1, 0.9), vector(0.2, 0.3))
    assert float(levels[0].ratio) == pytest.approx(2)


def test_noised_mixes_by_the_level_for_all_and_for_each():
    x0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(noised(x0, eps, level(0.6, 0.8)), 0.6 * x0 + 0.8 * eps)
    each = noised(x0, eps, level(vector(0.6, 1, 0), vector(0.8, 5, 1)))
    torch.testing.assert_close(each, torch.stack([0.6 * x0[0] + 0.8 * eps[0], x0[1] + 5 * eps[1], eps[2]]))


def test_noising_keeps_the_precision_of_the_image():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x0 = torch.ones(2, 1, 2, 2, dtype=dtype)
        assert noised(x0, x0, level(0.6, 0.8)).dtype == dtype
        assert noised(x0, x0, level(vector(0.6, 0.5), vector(0.8, 0.5))).dtype == dtype


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_impossible_requests_are_refused_by_name():
    with pytest.raises(RequestError, match=r"steps: 0: .*at least one"):
        EDM().spacing(0)
    with pytest.raises(RequestError, match=r"spacing: 'trailing': EDM .*karras"):
        EDM().spacing(10, "trailing")
    with pytest.raises(RequestError, match=r"steps: 1001: .*1000"):
        VP.linear().spacing(1001)


def test_impossible_schedules_are_refused_by_name():
    with pytest.raises(ValueError, match="alphas_cumprod"):
        VP(vector(0.5, 0.6))
    with pytest.raises(ValueError, match="sigma_min"):
        EDM(2.0, 1.0)
    with pytest.raises(ValueError, match="shift"):
        Flow(0.0)
