"""Rules: how a term moves the sample, through every sampler; and who refuses rules that he can't follow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.drawn import normal
from support.pipelines import tiny_sdxl
from torch import Tensor, nn

from handful.core.denoiser import Clamped, Condition, Denoiser
from handful.core.noise import EDM, VP, Flow, Level, Levels, posterior_deviation
from handful.core.samplers import SAMPLERS, STOCHASTIC
from handful.errors import RequestError
from handful.features.registry import pixels
from handful.guidance import Chamfer, Guided, Potential, Pull, Timing
from handful.guidance.classifier import ClassifierRequest
from handful.guidance.method import check_terms
from handful.integrations.diffusers import GuidanceCallback, HandfulGuider
from handful.models import from_pipeline

SHAPE, N, STEPS, CONDITION = (1, 4, 4), 3, 6, Condition()
PATHS = {
    "vp": lambda: VP.cosine().spacing(STEPS + 1).last(STEPS),
    "edm": lambda: EDM().spacing(STEPS),
    "flow": lambda: Flow().spacing(STEPS + 1).last(STEPS),
}


class Smooth(Denoiser):
    """A smooth denoiser for any level, which notes where it was asked and what with."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.levels = SHAPE, VP.cosine()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 1, 3, padding=1)).double()
        self.requires_grad_(False)
        self.asked: list[tuple[int | None, Tensor]] = []

    def condition(self, labels: Any) -> Condition:
        return CONDITION

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        self.asked.append((level.index, x_t.detach()))
        return (level.alpha * x_t + level.sigma * self.body(x_t / level.total)) / level.total**2


class Target(Potential):
    """Half the squared distance of each image to a point: its gradient is the image less the point."""

    name, per = "target", "image"

    def __init__(self, scale: float, pull: Pull, timing: Timing | None = None) -> None:
        super().__init__(pixels(), scale, timing, pull)

    def energy(self, features: Tensor) -> Tensor:
        return (features - 0.5).square().sum(1) / 2


class Noise:
    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(9)

    def __call__(self) -> Tensor:
        return torch.randn(N, *SHAPE, dtype=torch.float64, generator=self.draw)


def run(sampler: str, denoiser: Denoiser, levels: Levels, **more: Any) -> Tensor:
    options = {"noise": Noise()} if sampler in STOCHASTIC else {}
    return SAMPLERS[sampler](denoiser, levels.sigma[0] * normal(N, *SHAPE, seed=3), levels, CONDITION, **options, **more)


class Watched(Guided):
    """Notes what the sampler brings to `enter` and `leave`, and what it is given back."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.entered: list[tuple[int, Tensor, Tensor]] = []
        self.left: list[tuple[int, Tensor, Tensor]] = []

    def enter(self, x: Tensor, levels: Levels, index: int, condition: Condition) -> Tensor:
        moved = super().enter(x, levels, index, condition)
        self.entered.append((index, x, moved))
        return moved

    def leave(self, x: Tensor, levels: Levels, index: int, share: Tensor | float = 0.0) -> Tensor:
        moved = super().leave(x, levels, index, share)
        self.left.append((index, x, moved))
        return moved


BEFORE = Pull("identity", "sample", input="x_t", rule="before")
HELD = Pull("identity", "none", rule="held")
ANCESTRAL = Pull("identity", "none", rule="ancestral")


# --- the rule shift leaves the sample alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("process", PATHS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_term_of_the_rule_shift_leaves_the_sample_alone_to_the_bit(sampler: str, process: str):
    real, levels = normal(2, 16, seed=4), PATHS[process]()
    terms = [Target(0.3, Pull()), Chamfer(pixels(), real, 0.2, pull=Pull("gaussian", hold=True), timing=Timing(every=2))]
    guided = Watched(Smooth(), terms)
    found = run(sampler, guided, levels)
    for calls in (guided.entered, guided.left):
        assert [index for index, _, _ in calls] == list(range(STEPS))
        assert all(x is moved for _, x, moved in calls)
    assert not torch.equal(found, run(sampler, Smooth(), levels)), "it guides, but by the estimate"


@pytest.mark.parametrize("rule", ["held", "before", "ancestral"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_scale_zero_moves_nothing_by_any_rule(sampler: str, rule: str):
    pull = {"held": HELD, "before": BEFORE, "ancestral": ANCESTRAL}[rule]
    levels = PATHS["vp"]()
    assert torch.equal(run(sampler, Guided(Smooth(), [Target(0.0, pull)]), levels), run(sampler, Smooth(), levels))


# --- before ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("process", PATHS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_before_moves_the_sample_once_a_step_and_there_the_model_is_asked(sampler: str, process: str, clamped: bool):
    """x_t + scale rms(x_t) g / rms(g), g at x_t / max(1, rms(x_t)); heun's second evaluation is of what it computed."""
    denoiser, levels = Smooth(), PATHS[process]()
    guided = Watched(denoiser, [Target(0.1, BEFORE)])
    run(sampler, Clamped(guided) if clamped else guided, levels)
    assert [index for index, _, _ in guided.entered] == list(range(STEPS))
    firsts = denoiser.asked[::2] if sampler == "heun" else denoiser.asked  # its last step has one evaluation
    assert [index for index, _ in firsts] == list(range(STEPS))
    assert len(denoiser.asked) == (2 * STEPS - 1 if sampler == "heun" else STEPS)
    for (_, x, moved), (_, asked) in zip(guided.entered, firsts, strict=True):
        rms = x.square().mean((1, 2, 3), keepdim=True).sqrt()
        g = 0.5 - x / rms.clamp_min(1)
        wanted = x + 0.1 * rms * g / g.square().mean((1, 2, 3), keepdim=True).sqrt()
        torch.testing.assert_close(moved, wanted, rtol=1e-9, atol=1e-12)
        assert torch.equal(asked, moved)
    assert all(x is moved for _, x, moved in guided.left), "at the end of a step nothing is left to do"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_before_shifts_no_estimate(sampler: str):
    denoiser = Smooth()
    guided = Guided(denoiser, [Target(0.1, BEFORE)])
    for level in list(PATHS["vp"]())[:STEPS]:
        plain, shift = guided.parts(normal(N, *SHAPE), level, CONDITION)
        assert shift is None
        assert torch.equal(plain, denoiser(normal(N, *SHAPE), level, CONDITION))


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_before_acts_on_the_steps_that_its_timing_says(sampler: str, every: int):
    guided = Watched(Smooth(), [Target(0.1, BEFORE, Timing(every=every))])
    run(sampler, guided, PATHS["vp"]())
    assert [x is not moved for _, x, moved in guided.entered] == [index % every == every - 1 for index in range(STEPS)]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_before_moves_it_at_each_repetition_of_a_step(sampler: str):
    guided = Watched(Smooth(), [Target(0.1, BEFORE)])
    run(sampler, guided, PATHS["vp"](), recurrence=2)
    assert [index for index, _, _ in guided.entered] == [index for index in range(STEPS) for _ in range(2)]
    assert all(x is not moved for _, x, moved in guided.entered)


# --- held and ancestral ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PATHS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_held_moves_what_a_step_arrived_at_by_the_estimates_shift(sampler: str, process: str):
    """x_s + alpha_s d, d = scale sigma_t^2 / alpha_t (0.5 - x0_hat): eps is the model's own."""
    denoiser, levels = Smooth(), PATHS[process]()
    guided = Watched(denoiser, [Target(0.2, HELD)])
    run(sampler, guided, levels)
    assert all(x is moved for _, x, moved in guided.entered)
    for (index, x, moved), (_, asked) in zip(guided.left, denoiser.asked, strict=True):
        t, s = levels[index], levels[index + 1]
        d = 0.2 * t.sigma**2 / t.alpha * (0.5 - Smooth()(asked, t, CONDITION))
        torch.testing.assert_close(moved, x + s.alpha * d, rtol=1e-9, atol=1e-12)


class Learned(Smooth):
    """Its variance, too: v = tanh(x_t), so a share of (v + 1) / 2 of the forward step's."""

    learns_variance = True

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        self.learned_variance = x_t.detach().tanh()
        return super().forward(x_t, level, condition)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("boost", [0.0, 0.3])
def test_ancestral_moves_the_mean_by_the_variance_that_is_sampled_with(boost: float, variance: str):
    """EluCD's rule on DDPM: (V_t + c sin(pi i / N) max V) scale g, g = 0.5 - x0_hat; V interpolated in logarithms."""
    denoiser, levels = Learned(), PATHS["vp"]()
    guided = Watched(denoiser, [Target(0.7, ANCESTRAL, Timing(boost=boost))])
    run("ddpm", guided, levels, variance=variance)
    small = torch.stack([posterior_deviation(t, s) ** 2 for t, s in levels.pairs()])
    large = torch.stack([t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2 for t, s in levels.pairs()]) * (levels.sigma[1:] > 0)
    for (index, x, moved), (_, asked) in zip(guided.left, denoiser.asked, strict=True):
        g = 0.5 - Smooth()(asked, levels[index], CONDITION)
        share = {"small": torch.zeros(1), "large": torch.ones(1), "learned": (asked.tanh() + 1) / 2}[variance].double()
        each = [a ** (1 - share) * b**share for a, b in zip(small, large, strict=True)]
        size = each[index] + boost * math.sin(math.pi * index / STEPS) * torch.stack(each).amax(0)
        torch.testing.assert_close(moved, x + size * 0.7 * g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_terms_of_every_rule_act_side_by_side(sampler: str):
    """Each moves what it moves alone: at the first step, where all still stand at the same x_t."""
    levels = PATHS["vp"]()
    pulls = {"before": BEFORE, "held": HELD, "shift": Pull("identity", "none")}

    def one(*rules: str) -> Watched:
        guided = Watched(Smooth(), [Target(0.1, pulls[rule]) for rule in rules])
        x, t = guided.enter(normal(N, *SHAPE), levels, 0, CONDITION), levels[0]
        guided.x0 = guided(x, t, CONDITION)  # pyright: ignore[reportAttributeAccessIssue]
        guided.leave(torch.zeros_like(x), levels, 0)
        return guided

    def numbers(guided: Any) -> tuple[Tensor, Tensor, Tensor]:
        return guided.entered[0][2], guided.x0, guided.left[0][2]

    together, before, rest = numbers(one("before", "held", "shift")), numbers(one("before")), one("held", "shift")
    assert torch.equal(together[0], before[0])
    x0 = Smooth()(before[0], levels[0], CONDITION)
    d = 0.1 * levels[0].sigma ** 2 / levels[0].alpha * (0.5 - x0)
    torch.testing.assert_close(together[1], x0 + d, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(together[2], levels[1].alpha * d, rtol=1e-9, atol=1e-12)
    assert not torch.equal(numbers(rest)[2], together[2]), "held looks at the estimate from where before has moved"


def test_a_move_is_made_once_though_a_step_is_left_twice():
    levels, guided = PATHS["vp"](), Guided(Smooth(), [Target(0.2, HELD)])
    x = normal(N, *SHAPE)
    guided(x, levels[0], CONDITION)
    first = guided.leave(x, levels, 0)
    assert not torch.equal(first, x)
    assert guided.leave(x, levels, 0) is x


def test_what_a_broken_off_path_would_have_moved_is_forgotten():
    levels, guided = PATHS["vp"](), Guided(Smooth(), [Target(0.2, HELD, Timing(interval=(0.0, 0.3)))])
    x = normal(N, *SHAPE)
    guided(x, levels[1], CONDITION)  # and the sampler stops here
    guided(x, levels[0], CONDITION)
    assert guided.leave(x, levels, 1) is x


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "sampler", "fits"),
    [
        *(("shift", sampler, True) for sampler in SAMPLERS),
        *(("before", sampler, True) for sampler in SAMPLERS),
        *(("held", sampler, sampler in ("ddim", "ddpm")) for sampler in SAMPLERS),
        *(("ancestral", sampler, sampler == "ddpm") for sampler in SAMPLERS),
    ],
)
def test_a_recipe_asks_a_rule_only_of_a_sampler_that_has_such_a_step(rule: Any, sampler: str, fits: bool):
    term = ClassifierRequest(
        classifier="digits-guide",
        rule=rule,
        jacobian="identity",
        normalize="none",
        every=1,
        input="x_t" if rule == "before" else "x0_hat",
    )
    if fits:
        check_terms([term], STEPS, sampler)
        return
    with pytest.raises(RequestError, match=rf"guidance\[0\].rule: '{rule}': the rule does not work with the sampler {sampler}"):
        check_terms([term], STEPS, sampler)


@pytest.mark.parametrize("pull", [HELD, BEFORE, ANCESTRAL], ids=["held", "before", "ancestral"])
def test_diffusers_pipelines_refuse_every_rule_but_shift(pull: Pull):
    pipeline = tiny_sdxl()
    terms = [Target(0.1, Pull()), Target(0.1, pull)]
    said = f"terms: 'target, rule {pull.rule}': it moves the sample itself.*rule shift"
    with pytest.raises(RequestError, match=said):
        GuidanceCallback(pipeline, terms, "a cat")
    with pytest.raises(RequestError, match=said):
        HandfulGuider(from_pipeline(pipeline), terms)
