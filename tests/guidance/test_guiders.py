"""diffusers' guiders as terms: against our own formulas, the APG paper's algorithm written out, and across cohorts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import guiders
from torch import Tensor, nn

from handful.core.denoiser import Condition, NetworkDenoiser, Prediction
from handful.core.noise import VP, Flow, Levels, Schedule, level
from handful.core.samplers import ddim, heun
from handful.errors import RequestError
from handful.guidance import CFG, Guidance, Guided, Timing
from handful.guidance.apg import adaptive_projected
from handful.guidance.guiders import Guider

NULL = 3


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.label = nn.Conv2d(2, 2, 3, padding=1), nn.Embedding(4, 2)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return torch.tanh(self.body(x) + self.label(labels)[:, :, None, None])


class Labelled(NetworkDenoiser):
    """A small network with labels 0 to 2 and a null label; it counts its evaluations."""

    def __init__(self, prediction: Prediction = "eps", levels: Schedule | None = None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = Network().double()
        super().__init__(network, prediction, (2, 4, 4), levels or VP.linear())
        self.evaluations = 0

    def condition(self, labels) -> Condition:
        return Condition(torch.as_tensor(labels), NULL)

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.evaluations += 1
        return self.network(scaled, condition.labels)


LABELS = [0, 1, 2]
MIXING: dict[str, dict[str, Any]] = {
    "ClassifierFreeGuidance": {},
    "AdaptiveProjectedGuidance": {"adaptive_projected_guidance_momentum": -0.5, "eta": 0.0},
    "AdaptiveProjectedMixGuidance": {"adaptive_projected_guidance_start_step": 1},
    "ClassifierFreeZeroStarGuidance": {},
    "TangentialClassifierFreeGuidance": {},
    "MagnitudeAwareGuidance": {},
}


def noise(seed: int = 1) -> Tensor:
    return torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("space", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize("w", [0.5, 2.0, 6.5])
def test_diffusers_classifier_free_guidance_is_ours_in_every_space(space, w):
    denoiser = Labelled()
    x, levels, condition = noise(), denoiser.levels.spacing(4), denoiser.condition(LABELS)
    theirs = Guider(guiders.ClassifierFreeGuidance(guidance_scale=w + 1), space=space)
    close(ddim(Guided(denoiser, [theirs]), x, levels, condition), ddim(Guided(denoiser, [CFG(w)]), x, levels, condition))


def test_it_holds_at_the_pure_noise_start_of_a_flow_where_there_is_no_eps():
    denoiser = Labelled("flow", Flow())
    x, levels, condition = noise(), denoiser.levels.spacing(4), denoiser.condition(LABELS)
    assert levels[0].alpha == 0
    wanted = ddim(Guided(denoiser, [CFG(2.0)]), x, levels, condition)
    for space in ("x0", "flow"):
        theirs = Guider(guiders.ClassifierFreeGuidance(guidance_scale=3.0), space=space)
        close(ddim(Guided(denoiser, [theirs]), x, levels, condition), wanted)
    in_eps = Guided(denoiser, [Guider(guiders.ClassifierFreeGuidance(), space="eps")])
    with pytest.raises(RequestError, match=r'pure noise .* Use space="flow"'):
        ddim(in_eps, x, levels, condition)


def papers_apg(
    denoiser: Labelled, w: float, eta: float, momentum: float | None, radius: float | None, steps: int = 5
) -> tuple[Tensor, int]:
    """Sadat et al. 2024, algorithm 1: momentum, then the norm's bound, then the projection; written out.

    Returns:
        The sample by DDIM, and how often the bound acted, of 3 images at each step.
    """
    levels, condition, null = denoiser.levels.spacing(steps), denoiser.condition(LABELS), denoiser.condition([NULL] * 3)
    x, kept, bounded = noise(), torch.zeros(3, 32, dtype=torch.float64), 0
    for t, s in levels.pairs():
        c = denoiser(x, t, condition)
        kept = (c - denoiser(x, t, null)).flatten(1) + (momentum or 0.0) * kept
        d = kept
        if radius is not None:
            bounded += int((kept.norm(dim=1) > radius).sum())
            d = kept * (radius / kept.norm(dim=1, keepdim=True)).clamp(max=1)
        along = c.flatten(1) / c.flatten(1).norm(dim=1, keepdim=True)
        parallel = (d * along).sum(1, keepdim=True) * along
        x0 = c + w * (d - parallel + eta * parallel).view_as(c)
        x = s.alpha * x0 + s.sigma * (x - t.alpha * x0) / t.sigma
    return x, bounded


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("momentum", [None, -0.5])
def test_apg_on_x0_is_its_papers_algorithm(eta, momentum):
    denoiser, w, radius = Labelled(), 4.0, 60.0
    levels, condition = denoiser.levels.spacing(5), denoiser.condition(LABELS)
    guider = guiders.AdaptiveProjectedGuidance(
        guidance_scale=w,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=radius,
        eta=eta,
        use_original_formulation=True,
    )
    found = ddim(Guided(denoiser, [Guider(guider)]), noise(), levels, condition)
    wanted, bounded = papers_apg(denoiser, w, eta, momentum, radius)
    assert 0 < bounded < 15, "the bound must act on some and not on all"
    close(found, wanted, 1e-9)


@pytest.mark.parametrize("radius", [None, 60.0])
@pytest.mark.parametrize("momentum", [0.0, -0.5])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("w", [1.0, 4.0])
def test_the_term_made_by_its_settings_is_the_papers_algorithm_too(w, eta, momentum, radius):
    """With w of the paper less 1; 1 is among them, which diffusers' own formulation takes for no guidance."""
    denoiser = Labelled()
    term = adaptive_projected(w, parallel=eta, momentum=momentum, norm=radius)
    found = ddim(Guided(denoiser, [term]), noise(), denoiser.levels.spacing(5), denoiser.condition(LABELS))
    close(found, papers_apg(denoiser, w, eta, momentum, radius)[0], 1e-9)


def test_apg_with_everything_kept_is_cfg_and_with_scale_zero_nothing_to_the_bit():
    denoiser = Labelled()
    levels, condition = denoiser.levels.spacing(4), denoiser.condition(LABELS)

    def sampled(*terms: Guidance) -> Tensor:
        return ddim(Guided(denoiser, terms), noise(), levels, condition)

    close(sampled(adaptive_projected(2.0, parallel=1.0, momentum=0.0)), sampled(CFG(2.0)), 1e-9)
    denoiser.evaluations = 0
    assert torch.equal(sampled(adaptive_projected(0.0)), ddim(denoiser, noise(), levels, condition))
    assert denoiser.evaluations == 2 * levels.steps
    half = sampled(adaptive_projected(2.0, momentum=0.0, timing=Timing(interval=(0.5, 1.0))))
    assert not torch.allclose(half, sampled(adaptive_projected(2.0, momentum=0.0)))


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("parallel", {"parallel": 1.5}),
        ("momentum", {"momentum": 0.5}),
        ("momentum", {"momentum": -1.0}),
        ("norm", {"norm": 0.0}),
        ("norm", {"norm": float("nan")}),
        ("scale", {"scale": -1.0}),
    ],
)
def test_settings_of_apg_that_make_no_sense_are_refused_by_name(field, words):
    with pytest.raises(RequestError, match=f"^{field}: "):
        adaptive_projected(**{"scale": 1.0, **words})


@pytest.mark.parametrize("kind", MIXING)
def test_cohorts_one_after_another_are_each_what_they_are_alone(kind):
    denoiser = Labelled()
    levels, condition = denoiser.levels.spacing(5), denoiser.condition(LABELS)
    guider = getattr(guiders, kind)(**MIXING[kind])
    alone = [ddim(Guided(denoiser, [Guider(guider)]), noise(i), levels, condition) for i in (1, 2)]
    guided = Guided(denoiser, [Guider(guider)])
    for index, wanted in zip((1, 2), alone, strict=True):
        assert torch.equal(ddim(guided, noise(index), levels, condition), wanted)
    assert not torch.equal(alone[0], ddim(denoiser, noise(1), levels, condition))


def test_a_cohort_that_broke_off_leaves_no_momentum_though_the_term_acts_late():
    denoiser = Labelled()
    levels, condition = denoiser.levels.spacing(6), denoiser.condition(LABELS)

    def guided() -> Guided:
        guider = guiders.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=0.9)
        return Guided(denoiser, [Guider(guider, timing=Timing(interval=(0.4, 1.0)))])

    used = guided()
    for at in list(levels)[:4]:  # its first level inside the interval is the third
        used(noise(5), at, condition)
    wanted = ddim(guided(), noise(), levels, condition)
    assert torch.equal(ddim(used, noise(), levels, condition), wanted)
    without = guiders.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=None)
    without = Guided(denoiser, [Guider(without, timing=Timing(interval=(0.4, 1.0)))])
    assert not torch.equal(ddim(without, noise(), levels, condition), wanted), "the momentum must matter here"


def test_a_level_that_heun_sees_twice_counts_once_in_the_momentum():
    denoiser = Labelled()
    levels: Levels = denoiser.levels.spacing(4)
    condition = denoiser.condition(LABELS)
    guider = guiders.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=0.5)
    twice, once = (Guided(denoiser, [Guider(guider)]) for _ in range(2))
    seen = []
    for at in list(levels)[:3]:
        twice(noise(), at, condition)
        seen.append((twice(noise(), at, condition), once(noise(), at, condition)))
    for a, b in seen:
        assert torch.equal(a, b)
    assert heun(twice, noise(), levels, condition).isfinite().all()


def test_scale_multiplies_the_guiders_own_shift_and_zero_is_the_conditional_model_to_the_bit():
    denoiser, x, at = Labelled(), noise(), VP.linear().at(500)
    condition = denoiser.condition(LABELS)
    plain = denoiser(x, at, condition)
    guider = guiders.ClassifierFreeGuidance(guidance_scale=3.0)
    own, double, none = (Guided(denoiser, [Guider(guider, scale)])(x, at, condition) for scale in (1.0, 2.0, 0.0))
    close(double - plain, 2 * (own - plain), 1e-12)
    assert torch.equal(none, plain)


def test_a_guider_that_is_off_costs_no_second_evaluation():
    denoiser = Labelled()
    one = Guided(denoiser, [Guider(guiders.ClassifierFreeGuidance(guidance_scale=1.0))])
    one(noise(), VP.linear().at(500), denoiser.condition(LABELS))
    assert denoiser.evaluations == 1


def test_in_float32_it_shifts_nothing_where_the_guider_changes_nothing():
    denoiser = Labelled().float()
    x, condition = noise().float(), denoiser.condition([NULL] * 3)
    guided = Guided(denoiser, [Guider(guiders.ClassifierFreeGuidance(guidance_scale=9.0), space="eps")])
    for at in denoiser.levels.spacing(4):
        if at.sigma > 0:
            assert torch.equal(guided(x, at, condition), denoiser(x, at, condition))


REFUSED = {
    "PerturbedAttentionGuidance": {"perturbed_guidance_layers": 0},
    "SkipLayerGuidance": {"skip_layer_guidance_layers": 0},
    "SmoothedEnergyGuidance": {"seg_guidance_layers": 0},
    "AutoGuidance": {"auto_guidance_layers": 0, "dropout": 0.1},
    "LTX2Guidance": {},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_guiders_that_need_other_predictions_or_hooks_are_refused_by_name(kind):
    with pytest.raises(RequestError, match=f"guider: '{kind}': it needs more than"):
        Guider(getattr(guiders, kind)(**REFUSED[kind]))


def test_what_is_no_guider_and_what_no_network_predicts_are_refused():
    with pytest.raises(RequestError, match="guider: 'CFG': it is not a guider of diffusers"):
        Guider(CFG(1.0))
    with pytest.raises(RequestError, match="space: 'noise'"):
        Guider(guiders.ClassifierFreeGuidance(), space="noise")  # type: ignore[arg-type]


@pytest.mark.parametrize(("field", "value"), [("start", 0.2), ("stop", 0.8)])
def test_a_start_or_stop_of_its_own_is_refused_with_the_way_to_say_it(field, value):
    with pytest.raises(RequestError, match=rf"{field}: {value}: .*timing=Timing\(interval"):
        Guider(guiders.ClassifierFreeGuidance(**{field: value}))


def test_magnitude_aware_guidance_falls_with_the_share_of_the_difference():
    """w exp(-a |c - u| / |u|), the norms over an image; diffusers' own code can't take (n, c, h, w) with torch 2.13."""
    denoiser, x, at = Labelled(), noise(), VP.linear().at(500)
    c, u = (denoiser(x, at, denoiser.condition(labels)) for labels in (LABELS, [NULL] * 3))
    share = ((c - u).flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1))[:, None, None, None]
    guider = guiders.MagnitudeAwareGuidance(guidance_scale=10.0, alpha=8.0)
    found = Guided(denoiser, [Guider(guider)])(x, at, denoiser.condition(LABELS))
    close(found, c + 9.0 * (-8.0 * share).exp() * (c - u), 1e-9)


def test_zero_star_in_a_flow_starts_from_a_velocity_of_zero():
    """CFG-Zero*'s zero-init: the first step's guided prediction is 0, so x0_hat = x_t / m."""
    denoiser, x, at = Labelled("flow", Flow()), noise(), level(0.0, 1.0)
    guided = Guided(denoiser, [Guider(guiders.ClassifierFreeZeroStarGuidance(), space="flow")])
    close(guided(x, at, denoiser.condition(LABELS)), x, 1e-12)
