"""Auto guidance: its shift is the closed form's, 0 without a shift, and the pull is energy's at that strength."""

from __future__ import annotations

import pytest
import torch

from handful.core.denoiser import Condition, Denoiser
from handful.core.noise import VP, Level, level
from handful.features.extractor import pixels
from handful.guidance import Auto, Energy, Guided, Pull
from handful.guidance.auto import shift_between


class Half(Denoiser):
    """x0_hat = x_t / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.levels = (1, 4, 5), VP.cosine()

    def condition(self, labels) -> Condition:
        return Condition(torch.as_tensor(labels))

    def forward(self, x_t: torch.Tensor, level: Level, condition: Condition) -> torch.Tensor:
        return x_t / 2


def normal(n: int, seed: int, mean: float = 0.0, size: int = 400) -> torch.Tensor:
    return mean + torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_shift_is_the_squared_distance_of_the_means_over_it_and_the_scatter():
    # means d apart in each of 400 coordinates of variance 1: d^2 / (d^2 + 1); the mean of 200 is nearer than .02
    for d in (0.5, 1.0, 3.0):
        found = [shift_between(normal(4, seed, d), normal(50, 1000 + seed)) for seed in range(200)]
        assert sum(found) / 200 == pytest.approx(d**2 / (d**2 + 1), abs=0.02)


def test_there_is_no_shift_between_draws_of_one_distribution_however_few():
    for k in (1, 2, 16):
        found = [shift_between(normal(k, seed), normal(50, 1000 + seed)) for seed in range(100)]
        assert sum(found) / 100 < 0.05


def test_of_one_image_nothing_is_said():
    assert shift_between(normal(4, 0, 3.0), normal(1, 1)) == 0


@pytest.mark.parametrize("chunk", [None, 3])
def test_it_pulls_as_energy_does_at_the_strength_that_it_measured(chunk):
    denoiser, x_t, at = Half(), normal(8, 0, size=20).view(8, 1, 4, 5), level(0.8, 0.6)
    exemplars, told = normal(3, 1, 1.0, size=20), denoiser.condition([0] * 8)
    shift = shift_between(exemplars, x_t.flatten(1) / 2)
    assert 0.2 < shift < 0.9
    pull = Pull(jacobian="gaussian")
    by_auto = Guided(denoiser, [Auto(pixels(), exemplars, 0.3, pull=pull)], chunk)
    by_energy = Guided(denoiser, [Energy(pixels(), exemplars, 0.3 * shift, pull=pull)])
    torch.testing.assert_close(by_auto(x_t, at, told), by_energy(x_t, at, told))
    same = Guided(denoiser, [Auto(pixels(), x_t.flatten(1) / 2, 0.3, pull=pull)], chunk)
    torch.testing.assert_close(same(x_t, at, told), denoiser(x_t, at, told), rtol=0, atol=0)
    torch.testing.assert_close(by_auto(x_t, at, told), by_energy(x_t, at, told))  # what it saw before leaves no trace
