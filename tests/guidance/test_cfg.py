"""Classifier-free guidance: the formula, its relation to diffusers' scale, and what it costs."""

import math

import pytest
import torch
from torch import Tensor, nn

from handful.core.denoiser import Condition, Denoiser
from handful.core.noise import VP, Level, level
from handful.core.samplers import ddim, heun
from handful.errors import RequestError
from handful.guidance import CFG, Guided, Timing


class Eps(Denoiser):
    """An eps network with labels 0 to 2 and the null label 3; it remembers the labels it was given."""

    def __init__(self, null_label: int | None = 3) -> None:
        super().__init__()
        self.shape, self.levels, self.null_label = (1, 4, 4), VP.linear(), null_label
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.label = nn.Conv2d(1, 1, 3, padding=1).double(), nn.Embedding(4, 1).double()
        self.requires_grad_(False)
        self.asked: list[list[int]] = []

    def condition(self, labels) -> Condition:
        return Condition(torch.as_tensor(labels), self.null_label)

    def eps(self, x_t: Tensor, labels: Tensor) -> Tensor:
        return torch.tanh(self.body(x_t) + self.label(labels)[:, :, None, None])

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        assert condition.labels is not None
        self.asked.append(condition.labels.tolist())
        return (x_t - level.sigma * self.eps(x_t, condition.labels)) / level.alpha


LABELS, AT = [0, 1, 2], VP.linear().at(500)


def noise(n: int = 3) -> Tensor:
    return torch.randn(n, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("w", [0.5, 1.0, 6.5])
def test_the_estimate_moves_away_from_the_unconditional_one(w):
    denoiser, x_t = Eps(), noise()
    conditional, null = denoiser(x_t, AT, denoiser.condition(LABELS)), denoiser(x_t, AT, denoiser.condition([3, 3, 3]))
    found = Guided(denoiser, [CFG(w)])(x_t, AT, denoiser.condition(LABELS))
    torch.testing.assert_close(found, conditional + w * (conditional - null), rtol=1e-12, atol=1e-12)


def test_the_gain_scales_w():
    denoiser, x_t = Eps(), noise()
    at = Level(AT.alpha, AT.sigma, index=2, progress=0.25)
    condition = denoiser.condition(LABELS)
    falling = Guided(denoiser, [CFG(2.0, Timing(gain="linear"))])(x_t, at, condition)
    torch.testing.assert_close(falling, Guided(denoiser, [CFG(1.5)])(x_t, at, condition), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("guidance_scale", [1.5, 2.0, 7.5])
def test_diffusers_guidance_scale_is_one_more(guidance_scale):
    """Pipelines mix eps = eps_null + guidance_scale (eps_cond - eps_null), then denoise."""
    denoiser, x_t = Eps(), noise()
    conditional, null = denoiser.eps(x_t, torch.tensor(LABELS)), denoiser.eps(x_t, torch.tensor([3, 3, 3]))
    mixed = null + guidance_scale * (conditional - null)
    found = Guided(denoiser, [CFG(guidance_scale - 1)])(x_t, AT, denoiser.condition(LABELS))
    torch.testing.assert_close(found, (x_t - AT.sigma * mixed) / AT.alpha, rtol=1e-10, atol=1e-10)


def test_scale_zero_is_the_conditional_model_to_the_bit_and_at_its_price():
    denoiser, x_t = Eps(), noise()
    wanted = denoiser(x_t, AT, denoiser.condition(LABELS))
    denoiser.asked.clear()
    assert torch.equal(Guided(denoiser, [CFG(0.0)])(x_t, AT, denoiser.condition(LABELS)), wanted)
    assert denoiser.asked == [LABELS]
    without_null = Eps(null_label=None)
    torch.testing.assert_close(Guided(without_null, [CFG(0.0)])(x_t, AT, without_null.condition(LABELS)), wanted)


def test_a_model_without_null_class_is_refused():
    denoiser = Eps(null_label=None)
    with pytest.raises(RequestError, match="no null class"):
        Guided(denoiser, [CFG(1.0)])(noise(), AT, denoiser.condition(LABELS))


def test_it_costs_a_second_evaluation_under_the_null_label_however_many_terms_ask():
    denoiser = Eps()
    Guided(denoiser, [CFG(1.0), CFG(0.5, Timing(gain="linear"))])(noise(), AT, denoiser.condition(LABELS))
    assert denoiser.asked == [LABELS, [3, 3, 3]]


def test_a_limited_interval_saves_the_evaluations_outside_it():
    denoiser = Eps()
    levels = denoiser.levels.spacing(10)
    ratios = [float(at.ratio) for at in levels][:10]
    inside = Timing(noise=(ratios[6], ratios[3]))  # four levels
    ddim(Guided(denoiser, [CFG(1.0, inside)]), noise(), levels, denoiser.condition(LABELS))
    assert len(denoiser.asked) == 10 + 4
    assert denoiser.asked.count([3, 3, 3]) == 4
    denoiser.asked.clear()
    heun(Guided(denoiser, [CFG(1.0, inside)]), noise(), levels, denoiser.condition(LABELS))
    assert len(denoiser.asked) == 19 + 8  # Heun sees each inner level twice


def test_inside_a_limited_interval_it_is_plain_cfg_and_outside_no_guidance():
    denoiser, x_t = Eps(), noise()
    condition = denoiser.condition(LABELS)
    limited, everywhere = (Guided(denoiser, [CFG(2.0, Timing(noise=band))]) for band in ((0.5, 2.0), (0.0, math.inf)))
    for ratio in (0.3, 0.6, 1.9, 3.0):
        at = level(1.0, ratio)
        wanted = everywhere if 0.5 <= ratio <= 2.0 else denoiser
        assert torch.equal(limited(x_t, at, condition), wanted(x_t, at, condition))
