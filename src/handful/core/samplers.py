"""Samplers: from noise to x0, for any denoiser (so for any guided one) and any path of levels.

Each walks `levels` from its first level to its last, and reads like its paper. With x_t = alpha x0 + sigma eps, the
denoised estimate splits x_t into x0_hat and eps_hat = (x_t - alpha x0_hat) / sigma; a step re-mixes the two at the next
level. Written so, the start of a flow (alpha = 0) and the clean end (sigma = 0) need no special case. Before and after each
step a guided denoiser may move the sample itself (`Denoiser.enter`, `leave`), as some papers' rules do.

`x` is the start, (n, c, h, w), in the precision to sample in: `sigma_0 * noise` (see `start`). `condition` holds n
conditions. `each(index, x0_hat)` is called after every step. All return x at the last level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from handful.core.denoiser import Condition, Denoiser
from handful.core.noise import Level, Levels, posterior_deviation
from handful.errors import RequestError

Noise = Callable[[], Tensor]  # fresh standard normal noise of x's shape
Each = Callable[[int, Tensor], None]
Variance = Literal["small", "large", "learned"]


def start(noise: Tensor, levels: Levels) -> Tensor:
    """Standard normal noise (n, c, h, w) -> the state at the first level of the path, as if x0 were 0.

    Variance-preserving models are used to unit variance at their start, so their noise is unchanged; so is that of flows
    which begin within a hundredth of pure noise, as multistep solvers of diffusers do.
    """
    first = levels[0]
    variance_preserving = torch.isclose(first.total, torch.ones_like(first.total), atol=1e-6)
    flow = torch.isclose(first.alpha + first.sigma, torch.ones_like(first.total), atol=1e-6) and first.sigma > 0.99
    return noise if variance_preserving or flow else first.sigma * noise


def _split(denoiser: Denoiser, x: Tensor, level: Level, condition: Condition) -> tuple[Tensor, Tensor]:
    """x_t -> (x0_hat, eps_hat)."""
    x0 = denoiser(x, level, condition)
    return x0, (x - level.alpha * x0) / level.sigma


def ddim(
    denoiser: Denoiser,
    x: Tensor,
    levels: Levels,
    condition: Condition,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    recurrence: int = 1,
    each: Each | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, equation 12); eta = 0 is the Euler method on the probability-flow ODE.

    Args:
        eta: Share of the ancestral noise, 0 (none) to 1 (DDPM).
        noise: Draws fresh noise; needed where eta > 0 or recurrence > 1.
        recurrence: So many times each step is made: noised again, a guided sample is corrected by the model (RePaint; Bansal
            et al. 2023; TFG). Each costs its evaluations.
    """
    for index, (t, s) in enumerate(levels.pairs()):
        fresh = eta * posterior_deviation(t, s)
        for more in reversed(range(recurrence)):
            x = denoiser.enter(x, levels, index, condition)
            x0, eps = _split(denoiser, x, t, condition)
            x = s.alpha * x0 + (s.sigma**2 - fresh**2).clamp_min(0).sqrt() * eps
            if fresh > 0:
                x = x + fresh * _drawn(noise)
            x = denoiser.leave(x, levels, index)
            if more:
                x = _noised_again(x, s, t, _drawn(noise))
        if each:
            each(index, x0)
    return x


def ddpm(
    denoiser: Denoiser,
    x: Tensor,
    levels: Levels,
    condition: Condition,
    *,
    noise: Noise,
    variance: Variance = "small",
    recurrence: int = 1,
    each: Each | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), over any subset of the levels.

    Args:
        variance: Of the reverse step: "small", the posterior's, or "large", the forward step's (their two choices of
            sigma_t^2), or "learned": what the network says, each pixel between those two on a logarithmic scale (Nichol &
            Dhariwal 2021, equation 15). The last step, to sigma = 0, adds no noise in any case.

    Raises:
        RequestError: If the variance is to be the learned one and the network learned none.
    """
    if variance == "learned" and not denoiser.learns_variance:
        raise RequestError("sampler.variance", variance, "this model has not learned its variance", "Use small or large.")
    for index, (t, s) in enumerate(levels.pairs()):
        posterior = posterior_deviation(t, s)
        for more in reversed(range(recurrence)):
            x = denoiser.enter(x, levels, index, condition)
            x0, eps = _split(denoiser, x, t, condition)
            x = s.alpha * x0 + (s.sigma**2 - posterior**2).clamp_min(0).sqrt() * eps  # the posterior's mean
            share = _share_of_large(denoiser) if variance == "learned" else float(variance == "large")
            if s.sigma > 0:
                # the forward step t|s has variance sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2, the posterior that times
                # (sigma_s / sigma_t)^2
                x = x + posterior * float(t.sigma / s.sigma) ** share * _drawn(noise)
            x = denoiser.leave(x, levels, index, share)
            if more:
                x = _noised_again(x, s, t, _drawn(noise))
        if each:
            each(index, x0)
    return x


def lcm(
    denoiser: Denoiser,
    x: Tensor,
    levels: Levels,
    condition: Condition,
    *,
    noise: Noise,
    recurrence: int = 1,
    each: Each | None = None,
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1; latent consistency models, Luo et al.
    2023, arXiv 2310.04378, algorithm 3): each estimate is noised afresh to the next level. For networks distilled to it.
    """
    for index, (t, s) in enumerate(levels.pairs()):
        for more in reversed(range(recurrence)):
            x = denoiser.enter(x, levels, index, condition)
            x0 = denoiser(x, t, condition)
            x = s.alpha * x0
            if s.sigma > 0:
                x = x + s.sigma * _drawn(noise)
            x = denoiser.leave(x, levels, index)
            if more:
                x = _noised_again(x, s, t, _drawn(noise))
        if each:
            each(index, x0)
    return x


def heun(denoiser: Denoiser, x: Tensor, levels: Levels, condition: Condition, *, each: Each | None = None) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, algorithm 1, without churn): two evaluations a step.

    dx = x0 dalpha + eps dsigma along any path; the trapezoid of x0 and eps over a step is EDM's own rule where alpha = 1
    and the flow's where alpha = 1 - sigma. A step to sigma = 0 is Euler's, as there.
    """
    for index, (t, s) in enumerate(levels.pairs()):
        x = denoiser.enter(x, levels, index, condition)
        x0, eps = _split(denoiser, x, t, condition)
        euler = s.alpha * x0 + s.sigma * eps
        if s.sigma > 0:
            x0_s, eps_s = _split(denoiser, euler, s, condition)
            x = x + (s.alpha - t.alpha) * (x0 + x0_s) / 2 + (s.sigma - t.sigma) * (eps + eps_s) / 2
        else:
            x = euler
        x = denoiser.leave(x, levels, index)
        if each:
            each(index, x0)
    return x


def dpmpp_2m(denoiser: Denoiser, x: Tensor, levels: Levels, condition: Condition, *, each: Each | None = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order, one evaluation a step.

    Its steps live in lambda = log(alpha / sigma), which is infinite at either end of a path; a step from alpha = 0 or to
    sigma = 0 is first order, as is the first.
    """
    lam = torch.log(levels.alpha / levels.sigma)
    before = None
    for index, (t, s) in enumerate(levels.pairs()):
        x = denoiser.enter(x, levels, index, condition)
        x0 = denoiser(x, t, condition)
        blend = x0
        width, width_before = lam[index + 1] - lam[index], lam[index] - lam[index - 1] if index else lam.new_tensor(0.0)
        if before is not None and width.isfinite() and width_before.isfinite():
            blend = x0 + (width / (2 * width_before)) * (x0 - before)
        x = (s.sigma / t.sigma) * x + (s.alpha - t.alpha * s.sigma / t.sigma) * blend
        x = denoiser.leave(x, levels, index)
        before = x0
        if each:
            each(index, x0)
    return x


def _share_of_large(denoiser: Denoiser) -> Tensor:
    """v of equation 15: how far the learned variance lies from the small to the large one, the shape of x_t."""
    assert denoiser.learned_variance is not None, "a denoiser that learns its variance sets it at each evaluation"
    return (denoiser.learned_variance + 1) / 2


def _noised_again(x_s: Tensor, s: Level, t: Level, fresh: Tensor) -> Tensor:
    """A draw of x_t given x_s by the forward process; `fresh` standard normal, of their shape."""
    kept = t.alpha / s.alpha
    return kept * x_s + (t.sigma**2 - (kept * s.sigma) ** 2).clamp_min(0).sqrt() * fresh


def _drawn(noise: Noise | None) -> Tensor:
    if noise is None:
        raise ValueError("noise: this sampler adds noise at every step; pass a function that draws it")
    return noise()


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "heun": heun, "dpmpp_2m": dpmpp_2m, "lcm": lcm}
STOCHASTIC = ("ddim", "ddpm", "lcm")  # those that take `noise`
