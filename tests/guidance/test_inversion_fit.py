"""CRDI's fit: against the paper's update written out in eps and taken by autograd, and everything that must not change it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.inversion import INTERVAL, SHAPE, STEPS, Network, Tiny, path, randn, targets
from support.killed import killed
from support.pipelines import tiny_vae
from torch import Tensor

import handful
from handful.core.denoiser import Condition
from handful.core.noise import VP, Level, Levels
from handful.errors import RequestError, RunError
from handful.guidance import inversion_fit
from handful.guidance.inversion import Embeddings, normal, random_at, reconstruct, target_keys
from handful.guidance.inversion_fit import fit
from handful.models.latent import LatentDenoiser
from handful.zoo.digits import load_digits_split

Loss = Callable[[Tensor], Tensor]


def short(x0: Tensor | None = None, denoiser: Any = None, levels: Levels | None = None, **words: Any) -> Embeddings:
    told: dict[str, Any] = {"segments": 2, "interval": INTERVAL, "epochs": 6, "seed": 4, **words}
    return fit(denoiser or Tiny(), targets() if x0 is None else x0, levels or path(), **told)


def segment_steps_by_hand(segments: int) -> list[list[int]]:
    lo, hi = INTERVAL
    assert (hi - lo) % segments == 0
    length = (hi - lo) // segments
    return [list(range(lo + e * length, lo + (e + 1) * length)) for e in range(segments)]


def losses_by_hand(x0: Tensor, segment: int, segments: int, epoch: int, seed: int, spread: float) -> Loss:
    """The paper's loss of one epoch as a function of a segment's G, of eps and alphabar, with the fit's own draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Network().double().requires_grad_(False)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    told = [round(999 / (STEPS - 1) * i) for i in range(STEPS)]
    run = segment_steps_by_hand(segments)[segment]
    count = max(int(0.8 * len(run)), 1)
    offsets = random_at(seed, 0, epoch + 1, segment + 1).random_sample(count)
    drawn = [run[int((j + offsets[j]) * len(run) / count)] for j in range(count)]
    keys = target_keys(seed, len(x0))

    def loss(G: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for draw, i in enumerate(drawn):
            before = abar[told[i - 1]]
            noise = normal(keys, SHAPE, draw, epoch + 1, segment + 1).double()
            now = abar[told[i]]
            x_t = now.sqrt() * x0 + (1 - now).sqrt() * noise
            eps = net(x_t, torch.full((len(x0),), told[i], dtype=torch.float64)) - (1 - now).sqrt() * 2.0 * G
            x0_hat = (x_t - (1 - now).sqrt() * eps) / now.sqrt()
            x_before = before.sqrt() * x0_hat + (1 - before).sqrt() * eps
            wanted = before.sqrt() * x0 + (1 - before).sqrt() * noise
            mse = torch.nn.functional.mse_loss
            total = total + mse(x0_hat, x0) + mse(x_before, wanted) + spread * mse(G, G.mean(0).expand_as(G))
        return total / count

    return loss


@pytest.mark.parametrize(("segments", "spread"), [(1, 1.0), (2, 0.3), (6, 0.0)])
def test_adam_is_the_papers_fit(segments: int, spread: float):
    """Through the whole DDIM step, the network too, by autograd, with torch's own Adam."""
    told: list[tuple[int, int, float]] = []
    found = short(
        segments=segments, method="adam", epochs=25, spread_weight=spread, lr=0.05, progress=lambda *what: told.append(what)
    )
    x0, expected = targets().double(), []
    for segment in reversed(range(segments)):
        G = normal(target_keys(4, 3), SHAPE, 0, 0, segment + 1).double().requires_grad_()
        optimizer = torch.optim.Adam([G], lr=0.05)
        for epoch in range(25):
            loss = losses_by_hand(x0, segment, segments, epoch, 4, spread)(G)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append((segment, epoch, pytest.approx(float(loss.detach()), rel=1e-5)))
        assert torch.allclose(found.G[:, segment].double(), G.detach(), atol=1e-5)
    assert told == expected  # the noisiest segment first
    assert found.fitted["losses"] == [loss for _, epoch, loss in told if epoch == 24][::-1]


@pytest.mark.parametrize(("segments", "spread"), [(1, 1.0), (2, 0.3), (6, 0.0)])
def test_difference_is_the_least_mean_loss_of_all_its_draws(segments: int, spread: float):
    found = short(segments=segments, epochs=5, spread_weight=spread)
    x0 = targets().double()
    for segment in range(segments):
        G = found.G[:, segment].double().requires_grad_()

        def mean_loss(G: Tensor, segment: int = segment) -> Tensor:
            each = [losses_by_hand(x0, segment, segments, epoch, 4, spread)(G) for epoch in range(5)]
            return torch.stack(each).mean()

        least = mean_loss(G)
        (gradient,) = torch.autograd.grad(least, G)
        start = torch.zeros_like(G, requires_grad=True)
        (elsewhere,) = torch.autograd.grad(mean_loss(start), start)
        assert gradient.abs().max() < 1e-5 * elsewhere.abs().max()
        for seed in range(3):
            assert mean_loss(G.detach() + 0.1 * randn(*G.shape, seed=seed)) > least


def test_difference_tells_the_loss_of_the_embeddings_before_the_epoch():
    told: list[tuple[int, int, float]] = []
    short(segments=2, epochs=2, progress=lambda *what: told.append(what))
    x0 = targets().double()
    unguided = losses_by_hand(x0, 1, 2, 0, 4, 1.0)(torch.zeros(3, *SHAPE, dtype=torch.float64))
    assert told[0] == (1, 0, pytest.approx(float(unguided), rel=1e-5))
    after_one = short(segments=2, epochs=1).G[:, 1].double()
    assert told[1][2] == pytest.approx(float(losses_by_hand(x0, 1, 2, 1, 4, 1.0)(after_one)), rel=1e-5)


def test_defaults_are_the_papers():
    found = fit(Tiny(), targets(2))
    assert (found.segments, found.interval, found.scale, found.perturbation, found.levels.steps) == (15, (5, 20), 2.0, 0.05, 25)
    assert {name: found.fitted[name] for name in ("lr", "spread_weight", "epochs")} == {
        "lr": 0.05,
        "spread_weight": 1.0,
        "epochs": 10,
    }
    assert fit(Tiny(), targets(1), segments=1, method="adam").fitted["epochs"] == 120


@pytest.mark.parametrize("method", ["adam", "difference"])
def test_a_draw_is_one_evaluation_and_no_backward_pass(method: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.autograd, "grad", None)
    monkeypatch.setattr(Tensor, "backward", None)
    model = Tiny()
    short(denoiser=model, segments=2, epochs=5, method=method)  # 3 steps a segment: 2 draws an epoch
    assert model.batches == [3] * (2 * 5 * 2)


@pytest.mark.parametrize("method", ["adam", "difference"])
def test_chunks_change_nothing(method: Any):
    whole, model = short(targets(5), method=method), Tiny()
    parts = short(targets(5), model, method=method, chunk=2)
    assert set(model.batches) == {2, 1}
    assert torch.allclose(parts.G, whole.G, atol=1e-5)


def test_the_same_model_on_another_process_has_the_same_embeddings():
    vp = path()
    m = vp.alpha + vp.sigma
    for levels in (Levels(vp.alpha / m, vp.sigma / m), Levels(torch.ones_like(m), vp.sigma / vp.alpha)):
        assert torch.allclose(short(levels=levels).G, short().G, atol=1e-5)


@pytest.mark.parametrize("method", ["adam", "difference"])
def test_of_one_target_the_spread_has_no_say(method: Any):
    one = [short(targets(1), method=method, spread_weight=weight).G for weight in (0.0, 1.0, 100.0)]
    assert torch.equal(one[0], one[1])
    assert torch.equal(one[0], one[2])
    assert one[0].isfinite().all()


def test_the_spread_draws_targets_together_and_leaves_their_mean():
    free, held = (short(targets(4), spread_weight=weight).G for weight in (0.0, 1e6))
    assert (held - held.mean(0)).abs().max() < 1e-3 * (free - free.mean(0)).abs().max()
    assert torch.allclose(held.mean(0), free.mean(0), atol=1e-3)


def test_duplicated_targets_are_each_fitted():
    x0 = 30 * targets(2)[[0, 0, 1]]
    found = short(x0, epochs=60)
    first, again, other = (found.G[place] for place in range(3))
    assert (first - again).square().mean() < 0.1 * (first - other).square().mean()  # they differ by their draws alone
    assert torch.allclose(short(x0[:1], epochs=60, spread_weight=0.0).G[0], short(x0, epochs=60, spread_weight=0.0).G[0])


def test_a_condition_is_told_with_every_chunk():
    digits = handful.load("digits")
    x0 = load_digits_split().test_images[:3]
    words: dict[str, Any] = {"levels": digits.levels.spacing(10), "interval": (2, 8), "segments": 1, "epochs": 1}
    seen: list[list[int]] = []
    digits.network.register_forward_pre_hook(
        lambda module, args, told: seen.append(told["class_labels"].tolist()), with_kwargs=True
    )
    fit(digits, x0, **words)
    fit(digits, x0, **words, condition=digits.condition([7, 8, 9]), chunk=2)
    assert seen == [[10, 10, 10]] * 4 + [[7, 8], [9]] * 4


class Stopped(Exception):
    pass


def stop_at(segment: int, epoch: int) -> Callable[[int, int, float], None]:
    def told(now: int, then: int, loss: float) -> None:
        if (now, then) == (segment, epoch):
            raise Stopped

    return told


@pytest.mark.parametrize("method", ["adam", "difference"])
@pytest.mark.parametrize("place", [(1, 0), (1, 5), (0, 3)])
def test_a_stopped_fit_goes_on_to_the_same_bytes(
    method: Any, place: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inversion_fit, "SAVE_SECONDS", 0.0)
    whole, state, model = short(method=method), tmp_path / "state", Tiny()
    with pytest.raises(Stopped):
        short(method=method, state=state, progress=stop_at(*place))
    resumed = short(denoiser=model, method=method, state=state)
    assert torch.equal(resumed.G, whole.G)
    assert resumed.fitted == whole.fitted
    done = (1 - place[0]) * 6 + place[1]  # the epoch that was stopped in its report is done again
    assert len(model.batches) == 2 * (12 - done)
    again = Tiny()
    assert torch.equal(short(denoiser=again, method=method, state=state).G, whole.G)
    assert again.batches == []  # it was finished


def test_without_a_pause_only_whole_segments_are_kept(tmp_path: Path):
    state, model = tmp_path / "state", Tiny()
    with pytest.raises(Stopped):
        short(state=state, progress=stop_at(0, 3))
    assert torch.equal(short(denoiser=model, state=state).G, short().G)
    assert len(model.batches) == 2 * 6


def test_a_killed_fit_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state, reached = tmp_path / "state", tmp_path / "reached"

    def wait(segment: int, epoch: int, loss: float) -> None:
        if (segment, epoch) == (0, 2):
            reached.touch()
            time.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(inversion_fit, "SAVE_SECONDS", 0.0)
        killed(lambda: short(method="adam", state=state, progress=wait), reached.exists)
    model = Tiny()
    short(denoiser=model, method="adam", state=state).save(tmp_path / "resumed.safetensors")
    assert len(model.batches) == 2 * 4
    short(method="adam").save(tmp_path / "whole.safetensors")
    assert (tmp_path / "resumed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_checkpoint_of_another_fit_or_a_damaged_one_is_refused_by_name(tmp_path: Path):
    state = tmp_path / "state"
    short(state=state)
    others: list[dict[str, Any]] = [
        {"seed": 5},
        {"epochs": 7},
        {"scale": 1.0},
        {"method": "adam"},
        {"model": "x"},
        {"x0": targets() + 1},
        {"levels": path(11)},
        {"spread_weight": 0.5},
    ]
    for other in others:
        with pytest.raises(RequestError, match=r"^state: .* other targets, settings or model\. Delete the file"):
            short(state=state, **other)
    state.write_bytes(state.read_bytes()[:-3])
    with pytest.raises(RequestError, match=r"^state: .*damaged.* Delete the file"):
        short(state=state)
    short().save(state)
    with pytest.raises(RequestError, match=r"^state: .*it holds no unfinished fit"):
        short(state=state)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"method": "sgd"}, "method: 'sgd'"),
        ({"epochs": 0}, "epochs: 0"),
        ({"lr": 0.0}, "lr: 0.0"),
        ({"scale": 0.0}, "scale"),
        ({"spread_weight": -1.0}, "spread_weight"),
        ({"perturbation": float("inf")}, "perturbation"),
        ({"seed": -1}, "seed: -1"),
        ({"segments": 7}, "segments: 7: 6 guided steps"),
        ({"interval": (8, 8)}, "interval"),
        ({"interval": (8, 2)}, "interval"),
        ({"interval": (2, 11)}, "interval"),
        ({"hashes": ["a"]}, "hashes: 1: there are 3 targets"),
        (
            {"x0": torch.zeros(3, 1, 4, 4)},
            r"targets: \(1, 4, 4\): they have 1 channel, and the model takes 2\. Read them with 2 chann",
        ),
        ({"x0": torch.zeros(3, 2, 8, 4)}, r"targets: \(2, 8, 4\): the model takes 2 x 4 x 4\. Resize them to 4 x 4\."),
        ({"x0": torch.zeros(0, 2, 4, 4)}, "targets: .*N >= 1"),
        ({"x0": torch.zeros(2, 4, 4)}, "targets: .*N >= 1"),
        ({"x0": torch.full((3, *SHAPE), float("nan"))}, "targets: .*NaN"),
        ({"condition": Condition(torch.zeros(2, dtype=torch.int64))}, r"condition: \[2\]: there are 3 targets"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_the_model_is_asked(words: dict[str, Any], told: str):
    model = Tiny()
    with pytest.raises(RequestError, match=f"^{told}"):
        short(denoiser=model, **words)
    assert model.batches == []


def test_images_for_a_model_of_latents_are_refused_until_they_are_encoded():
    class Latent(LatentDenoiser):
        def condition(self, labels: Any) -> Condition:
            return Condition()

        def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
            return torch.tanh(scaled)

    model = Latent(torch.nn.Identity(), tiny_vae(), "eps", VP.linear(), (64, 64))
    images = torch.zeros(2, 3, 64, 64)
    with pytest.raises(RequestError, match=r"^targets: .*images, and the model works on latents of 4 x 8 x 8\. Encode them"):
        short(images, model)
    with torch.no_grad():
        found = short(model.encode(images), model)
    assert found.G.shape == (2, 2, 4, 8, 8)


def test_a_model_of_labels_without_a_null_class_must_be_told_one():
    model = Tiny()
    model.label_count = 3
    with pytest.raises(RequestError, match=r"^condition: this model takes labels, and has no null class"):
        short(denoiser=model)


def test_an_overflowing_model_is_told_of_and_not_fitted():
    class Broken(Tiny):
        def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
            return super().forward(x_t, level, condition) * float("inf")

    with pytest.raises(RunError, match="segment 1, epoch 0: the loss is not finite"):
        short(denoiser=Broken())


@pytest.fixture(scope="module")
def inverted() -> tuple[Any, Tensor, Levels]:
    """Digits as the model never saw them: ink on paper turned into paper on ink, ten held-out ones."""
    digits = handful.load("digits")
    return digits, -load_digits_split().test_images[:10], digits.levels.spacing(25, "linspace")


def test_more_segments_reconstruct_better_on_real_digits(inverted: tuple[Any, Tensor, Levels]):
    digits, x0, levels = inverted
    errors = []
    for segments in (1, 3, 15):
        found = fit(digits, x0, levels, segments=segments, epochs=3)
        errors.append(torch.stack([(reconstruct(digits, found, seed) - x0).square().mean() for seed in range(2)]).mean())
    # measured 1.2, 0.6, 0.5; without embeddings 2
    assert errors[0] > 1.2 * errors[1]
    assert errors[1] > errors[2]


def held_out_loss(digits: Any, found: Embeddings, x0: Tensor, levels: Levels) -> float:
    """The mean loss of embeddings at draws that no fit has seen."""
    losses = []
    for segment, run in enumerate(inversion_fit.segment_steps(found.interval, found.segments)):
        at = inversion_fit._parabola(
            inversion_fit.Guided(digits, ()),
            x0,
            levels,
            [*run] * 4,
            2.0,
            inversion_fit.no_condition(digits, len(x0)),
            target_keys(99, len(x0)),
            (1, 1),
        )
        losses.append(at.loss(found.G[:, segment], 1.0))
    return sum(losses) / len(losses)


@pytest.mark.slow
def test_ten_epochs_of_difference_reach_the_loss_of_120_of_adam(inverted: tuple[Any, Tensor, Levels]):
    digits, x0, levels = inverted
    adam = fit(digits, x0, levels, segments=1, interval=(10, 15), method="adam")
    difference = fit(digits, x0, levels, segments=1, interval=(10, 15))
    assert held_out_loss(digits, difference, x0, levels) < 1.01 * held_out_loss(digits, adam, x0, levels)
