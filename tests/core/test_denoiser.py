"""The table of denoiser.py: one posterior mean in closed form, told in every parametrization, at levels of every process."""

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from handful.core.denoiser import (
    Around,
    Clamped,
    Condition,
    Denoiser,
    NetworkDenoiser,
    Prediction,
    denoised_from,
    network_input,
    output_from,
)
from handful.core.noise import EDM, VP, Flow, Level, Schedule, level
from handful.errors import RequestError

SHAPE = (2, 3, 3)
PREDICTIONS = get_args(Prediction)
SCHEDULES: dict[str, Schedule] = {"eps": VP.linear(), "v": VP.cosine(), "x0": VP.linear(), "flow": Flow(), "edm": EDM()}


class Mixture:
    """A mixture of isotropic Gaussians over images, whose posterior mean is known; one component: a Gaussian."""

    def __init__(self, components: int) -> None:
        draw = torch.Generator().manual_seed(components)
        self.means = torch.randn(components, *SHAPE, dtype=torch.float64, generator=draw)
        self.deviations = torch.linspace(0.3, 0.9, components, dtype=torch.float64)
        self.shares = torch.full((components,), 1 / components, dtype=torch.float64)

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | alpha x0 + sigma eps = x]; alpha and sigma of shape ()."""
        variance = alpha**2 * self.deviations**2 + sigma**2
        off = x[:, None] - alpha * self.means  # (n, components, c, h, w)
        pixels = off[0, 0].numel()
        log_weight = self.shares.log() - off.square().sum((2, 3, 4)) / (2 * variance) - pixels / 2 * variance.log()
        gain = (alpha * self.deviations**2 / variance).view(1, -1, 1, 1, 1)
        means = self.means + gain * off
        return (log_weight.softmax(1).view(*log_weight.shape, 1, 1, 1) * means).sum(1)


def told(mixture: Mixture, prediction: Prediction, z: Tensor, ratio: Tensor) -> Tensor:
    """What a perfect network of its own process answers to z, at noise-to-signal `ratio`: by the definition of each.

    eps and v networks: z = a x0 + b eps with a^2 + b^2 = 1, v = a eps - b x0 (Salimans & Ho 2022). Flow: z = (1 - s) x0 +
    s eps, v = eps - x0. EDM: z = x0 + sigma eps, the denoised image itself.
    """
    one = torch.ones((), dtype=torch.float64)
    if prediction == "edm":
        return mixture.posterior_mean(z, one, ratio)
    if prediction == "flow":
        s = 1 / (1 + 1 / ratio)
        x0 = mixture.posterior_mean(z, 1 - s, s)
        return (z - (1 - s) * x0) / s - x0
    b = 1 / (1 + ratio**-2).sqrt()
    a = 1 / (1 + ratio**2).sqrt()
    x0 = mixture.posterior_mean(z, a, b)
    eps = (z - a * x0) / b
    return {"x0": x0, "eps": eps, "v": a * eps - b * x0}[prediction]


class Perfect(NetworkDenoiser):
    """A perfect network. The time it is told comes in float32, so it is checked and the exact ratio used."""

    def __init__(self, mixture: Mixture, prediction: Prediction) -> None:
        super().__init__(nn.Identity(), prediction, SHAPE, SCHEDULES.get(prediction, EDM()))
        self.mixture, self.ratio = mixture, torch.zeros(())

    def condition(self, labels) -> Condition:
        return Condition(None)

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        assert time.shape == (len(scaled),)
        assert time.dtype == torch.float32
        told_ratio = {
            "edm": lambda: time[0].double(),
            "flow": lambda: (time[0].double() / 1000) / (1 - time[0].double() / 1000),
        }.get(self.prediction, lambda: self._ratio_of_step(float(time[0])))()
        if self.ratio.isfinite() and not (
            self.ratio > 99 or self.ratio < 0.011
        ):  # beyond, VP networks are told their last step
            torch.testing.assert_close(told_ratio, self.ratio, rtol=2e-3, atol=0)
        return told(self.mixture, self.prediction, scaled, self.ratio)

    def _ratio_of_step(self, t: float) -> Tensor:
        levels = self.levels
        assert isinstance(levels, VP)
        log = (levels.sigma / levels.alpha).log()
        return torch.lerp(log[int(t)], log[min(int(t) + 1, len(log) - 1)], t - int(t)).exp()


def path(kind: str) -> list[Level]:
    if kind == "vp":
        return [VP.linear().at(t) for t in (5, 100, 400, 700, 990)]
    if kind == "edm":
        return [level(1.0, sigma) for sigma in (0.02, 0.3, 1.0, 5.0, 80.0)]
    return [level(1 - s, s) for s in (0.02, 0.3, 0.5, 0.9, 0.985)]


@pytest.mark.parametrize("components", [1, 4])
@pytest.mark.parametrize("kind", ["vp", "edm", "flow"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_row_of_the_table_gives_the_closed_form_posterior_mean(prediction, kind, components):
    mixture = Mixture(components)
    denoiser = Perfect(mixture, prediction)
    draw = torch.Generator().manual_seed(1)
    for at in path(kind):
        x0 = mixture.means[torch.arange(5) % components]
        x_t = at.alpha * x0 + at.sigma * torch.randn(5, *SHAPE, dtype=torch.float64, generator=draw)
        denoiser.ratio = at.ratio
        found = denoiser(x_t, at, Condition(None))
        torch.testing.assert_close(found, mixture.posterior_mean(x_t, at.alpha, at.sigma), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_at_alpha_zero_the_estimate_is_the_mean_of_the_data(prediction):
    mixture = Mixture(4)
    denoiser = Perfect(mixture, prediction)
    at = level(0.0, 1.0)
    denoiser.ratio = at.ratio
    x_t = torch.randn(5, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = mixture.means.mean(0).expand_as(x_t)
    torch.testing.assert_close(denoiser(x_t, at, Condition(None)), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_estimate_depends_on_the_ratio_and_not_on_the_scale_of_the_process(prediction):
    mixture = Mixture(3)
    denoiser = Perfect(mixture, prediction)
    denoiser.ratio = torch.tensor(0.75, dtype=torch.float64)
    x = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    first = denoiser(x, level(1.0, 0.75), Condition(None))
    for scale in (0.2, 3.0):
        same = denoiser(scale * x, level(scale, 0.75 * scale), Condition(None))
        torch.testing.assert_close(same, first, rtol=1e-12, atol=1e-12)


class Small(NetworkDenoiser):
    """A real network that reads its input, its time and its label."""

    def __init__(self, prediction: Prediction = "v", dtype: torch.dtype = torch.float32) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            body, label = nn.Conv2d(2, 2, 3, padding=1), nn.Embedding(4, 2)
        network = nn.ModuleList([body, label])
        super().__init__(network.to(dtype), prediction, SHAPE, SCHEDULES.get(prediction, EDM()))
        self.body, self.label = body, label

    def condition(self, labels) -> Condition:
        return Condition(torch.as_tensor(labels), null_label=3)

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        assert scaled.dtype == self.body.weight.dtype
        assert condition.labels is not None
        shift = self.label(condition.labels) + torch.sin(time / 50)[:, None].to(scaled)
        return torch.tanh(self.body(scaled) + shift[:, :, None, None])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_levels_of_each_image_give_what_one_by_one_gives(prediction):
    denoiser = Small(prediction, torch.float64)
    draw = torch.Generator().manual_seed(4)
    x_t = torch.randn(5, *SHAPE, dtype=torch.float64, generator=draw)
    alpha = torch.rand(5, dtype=torch.float64, generator=draw) + 0.1
    sigma = torch.rand(5, dtype=torch.float64, generator=draw) + 0.1
    condition = denoiser.condition([0, 1, 2, 3, 0])
    together = denoiser(x_t, Level(alpha, sigma), condition)
    for i in range(5):
        alone = denoiser(x_t[i : i + 1], Level(alpha[i], sigma[i]), condition[slice(i, i + 1)])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_bfloat16_network_keeps_the_callers_precision(prediction):
    half, full = Small(prediction, torch.bfloat16), Small(prediction, torch.float64)
    x_t = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    at = level(0.8, 0.6)
    wanted = full(x_t, at, full.condition([0, 1, 2]))
    for dtype in (torch.float32, torch.float64):
        found = half(x_t.to(dtype), at, half.condition([0, 1, 2]))
        assert found.dtype == dtype
        # bfloat16 holds 8 bits: the network's answer is right to about 1 %, and times sigma / alpha < 1
        torch.testing.assert_close(found.double(), wanted, atol=0.05, rtol=0)
        # x_t's own share is in the caller's precision: two states that bfloat16 cannot tell apart differ in x0_hat
        if prediction not in ("x0", "edm"):
            moved = half((x_t + 1e-5).to(dtype), at, half.condition([0, 1, 2]))
            assert 1e-6 < float((moved - found).abs().median()) < 1e-4


def test_weights_are_frozen_and_the_input_is_not():
    denoiser = Small()
    assert not any(p.requires_grad for p in denoiser.parameters())
    assert not denoiser.network.training
    x_t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(6)).requires_grad_()
    denoiser(x_t, level(0.8, 0.6), denoiser.condition([0, 1])).sum().backward()
    assert x_t.grad is not None
    assert float(x_t.grad.abs().min()) > 0
    assert all(p.grad is None for p in denoiser.parameters())


def test_the_null_condition_is_the_null_label_for_every_image():
    denoiser = Small(dtype=torch.float64)
    condition = denoiser.condition([0, 1, 2])
    null, part = condition.null().labels, condition[slice(1, None)].null().labels
    assert null is not None
    assert part is not None
    assert (null.tolist(), part.tolist()) == ([3, 3, 3], [3, 3])
    x_t = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    at = level(0.8, 0.6)
    torch.testing.assert_close(denoiser(x_t, at, condition.null()), denoiser(x_t, at, denoiser.condition([3, 3, 3])))
    assert not torch.allclose(denoiser(x_t, at, condition.null()), denoiser(x_t, at, condition))


@pytest.mark.parametrize("condition", [Condition(None), Condition(None, 3), Condition(torch.tensor([1]))])
def test_a_model_without_null_class_says_so(condition):
    with pytest.raises(RequestError, match="no null class"):
        condition.null()


def test_an_unknown_prediction_is_refused_by_name():
    with pytest.raises(RequestError, match=r"prediction: 'score': .*eps, v, x0, flow, edm"):
        Small("score")  # pyright: ignore[reportArgumentType]  # what a config file may hold


def test_pixel_models_decode_and_encode_to_the_same_bits():
    denoiser: Denoiser = Small()
    x0 = torch.rand(2, *SHAPE)
    assert denoiser.decode(x0) is x0
    assert denoiser.encode(x0) is x0


def test_network_input_of_unit_variance_data_has_unit_variance_or_the_flows_own():
    """10^5 draws: a variance is off by more than 5 % with a chance below 10^-25."""
    draw = torch.Generator().manual_seed(8)
    x0, eps = torch.randn(2, 100, 10, 10, 10, dtype=torch.float64, generator=draw)
    at = level(0.4, 2.5)
    x_t = 0.4 * x0 + 2.5 * eps
    for prediction in ("eps", "v", "x0"):
        assert float(network_input(prediction, x_t, at).var()) == pytest.approx(1, rel=0.05)
    s = 2.5 / 2.9
    torch.testing.assert_close(network_input("flow", x_t, at), (1 - s) * x0 + s * eps)
    torch.testing.assert_close(network_input("edm", x_t, at), x0 + 6.25 * eps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_true_answer_gives_back_the_true_image_and_the_image_the_answer(prediction):
    """With eps and x0 known, every prediction is an identity: no posterior, no schedule."""
    draw = torch.Generator().manual_seed(9)
    x0, eps = torch.randn(2, 4, *SHAPE, dtype=torch.float64, generator=draw)
    for at in (level(0.8, 0.6), level(1.0, 7.0), level(0.7, 0.3)):
        a, b = at.alpha / at.total, at.sigma / at.total
        answer = {"eps": eps, "v": a * eps - b * x0, "x0": x0, "flow": eps - x0, "edm": x0}[prediction]
        x_t = at.alpha * x0 + at.sigma * eps
        torch.testing.assert_close(denoised_from(prediction, x_t, answer, at), x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(output_from(prediction, x_t, x0, at), answer, rtol=1e-12, atol=1e-12)


class Peculiar(Denoiser):
    """Answers everything that a denoiser is asked otherwise than the base does."""

    shape, levels, classes, label_count, null_class, prompted = (2, 4, 4), VP.cosine(), ("a", "b"), 3, 2, True

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        self.learned_variance = x_t + 7
        return 3 * x_t

    def condition(self, labels) -> Condition:
        return Condition(torch.as_tensor(labels) + 1)

    def enter(self, x, levels, index, condition):
        return x + 1

    def leave(self, x, levels, index, share=0.0):
        return x + 2

    @property
    def image_shape(self):
        return (3, 8, 8)

    def decode(self, x0):
        return x0 + 3

    def encode(self, images):
        return images + 4

    def preview(self, x0, reduce=1):
        return x0 + 5 * reduce

    @property
    def preview_factor(self):
        return 8

    @property
    def learns_variance(self):
        return True

    @property
    def label_embeddings(self):
        return [self.embedding]


def test_a_wrapper_answers_as_what_it_wraps():
    inner = Peculiar()
    outer = Clamped(inner)
    for name in (
        "shape",
        "levels",
        "classes",
        "label_count",
        "null_class",
        "prompted",
        "image_shape",
        "preview_factor",
        "has_null",
        "learns_variance",
        "label_embeddings",
    ):
        assert getattr(outer, name) == getattr(inner, name), name
    x, levels, condition = torch.zeros(1, 2, 4, 4), inner.levels.spacing(3), inner.condition([0])
    assert torch.equal(outer.condition([0]).labels, condition.labels)
    asked = {"enter": (x, levels, 0, condition), "leave": (x, levels, 0), "decode": (x,), "encode": (x,), "preview": (x, 2)}
    for name, arguments in asked.items():
        assert torch.equal(getattr(outer, name)(*arguments), getattr(inner, name)(*arguments)), name
        assert not torch.equal(getattr(outer, name)(*arguments), x), name
    found = outer(x + 0.25, levels[0], condition)
    assert found.max() == 0.75
    assert torch.equal(outer.learned_variance, x + 7.25)
    public = {name for name in vars(Denoiser) if not name.startswith("_")}
    assert public <= {
        *vars(Around),
        *vars(outer),
        *asked,
        "forward",
        "has_null",
        "place",
        "components",
        "learned_variance",
        "code_sha256",
    }, "a new member of Denoiser must be handed on by Around"
