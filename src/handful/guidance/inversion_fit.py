"""CRDI: fitting the sample-wise guidance embeddings G of `inversion` (Cao & Gong, ECCV 2024, arXiv 2407.07249).

Segment by segment, the noisiest first. An epoch draws steps t over the segment, stratified, about 0.8 of its length, noises
the targets, x_t = alpha x0 + sigma eps, takes a guided DDIM step, and counts, in means over targets and pixels,

    loss = |x0_hat' - x0|^2 + |x_{t-1}' - (alpha_{t-1} x0 + sigma_{t-1} eps)|^2 + lambda |G_i - mean_i G_i|^2

A saving over the original, which goes back through all of the step: the model's estimate does not depend on G, since x_t is
noised afresh from the target. With r = x0 - x0_hat and f = s sigma^2 / alpha the first error is f G - r, and the second is the
first times k = alpha_{t-1} - sigma_{t-1} alpha / sigma (put x_t into eps' = (x_t - alpha x0_hat') / sigma). So a draw costs
one evaluation of the model and no backward pass, and with w = 1 + k^2 the loss is a parabola in each number of G:

    loss = mean(w r^2) - 2 mean(b G) + a mean(G^2) + lambda |G_i - mean_i G_i|^2,    a = mean_t(w f^2),  b = mean_t(w f r)

"adam" walks down it as the paper does, from N(0, 1), a step an epoch. "difference" takes the minimum of the mean of all
parabolas so far, in closed form: the mean over draws of the score's own difference to the target, r alpha / (s sigma^2), with
the targets drawn together by lambda. It has no learning rate. On the packaged digits 3 of its epochs (eta = 1) to 8 (eta = 15)
reach the loss that 120 of Adam's do; 10 are below it.

The original's default differs in two ways. Its noise is one fixed draw for everything; here every draw has its own. And it
clips x0_hat to [-1, 1] before the shift: give `Clamped(denoiser)` for that, here and in `Guided`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from handful.core.denoiser import Condition, Denoiser
from handful.core.noise import Level, Levels, noised
from handful.data.images import write_atomically
from handful.errors import RequestError, RunError, counted
from handful.files.digests import tensors_digest
from handful.files.sealed import seal, unseal
from handful.guidance.draws import normal, random_at
from handful.guidance.embeddings import Embeddings, check_interval, segment_steps
from handful.guidance.guided import Guided
from handful.guidance.inversion import no_condition, score_factor, target_keys

Method = Literal["adam", "difference"]
Progress = Callable[[int, int, float], None]

STEPS = 25  # of the paper's path
EPOCHS: dict[str, int] = {"adam": 120, "difference": 10}
SAVE_SECONDS = 10.0  # between two writings of an unfinished segment
_KIND, _VERSION = "unfinished fit of embeddings", 1
_BETAS, _EPS = (0.9, 0.999), 1e-8  # Adam's own


@dataclass(frozen=True)
class Parabola:
    """An epoch's estimate of a segment's loss, without its spread: c - 2 mean(b G) + a mean(G^2)."""

    a: float
    b: Tensor  # (N, c, h, w)
    c: float

    def loss(self, G: Tensor, spread_weight: float) -> float:
        """The loss of G (N, c, h, w)."""
        fit = self.c - 2 * (self.b * G).mean() + self.a * G.square().mean()
        return float(fit + spread_weight * _deviation(G).square().mean())

    def gradient(self, G: Tensor, spread_weight: float) -> Tensor:
        """Its gradient (N, c, h, w); the mean of the targets' embeddings takes no part, as their deviations add up to 0."""
        return 2 / G.numel() * (self.a * G - self.b + spread_weight * _deviation(G))

    def minimum(self, spread_weight: float) -> Tensor:
        """The G (N, c, h, w) of the least loss: its mean is b's over a, its deviations b's over a + lambda."""
        return self.b.mean(0) / self.a + _deviation(self.b) / (self.a + spread_weight)


@dataclass
class _State:
    """How far a fit is: what a checkpoint holds.

    Attributes:
        G: (N, eta, c, h, w) on the CPU: the segments that are done.
        losses: Of the last epoch of each of those, the noisiest first.
        epoch: How many the present segment has had.
        current: Its G (N, c, h, w).
        first, second: As current: Adam's moments, or in `first` the sum of b.
    """

    G: Tensor
    current: Tensor
    first: Tensor
    second: Tensor
    losses: tuple[float, ...] = ()
    epoch: int = 0
    curvature: float = 0.0
    loss: float = 0.0

    @property
    def segment(self) -> int:
        """The present one; -1 when all are done."""
        return self.G.shape[1] - 1 - len(self.losses)


def fit(
    denoiser: Denoiser,
    targets: Tensor,
    levels: Levels | None = None,
    *,
    segments: int = 15,
    interval: tuple[int, int] = (5, 20),
    scale: float = 2.0,
    spread_weight: float = 1.0,
    method: Method = "difference",
    epochs: int | None = None,
    lr: float = 0.05,
    seed: int = 0,
    condition: Condition | None = None,
    chunk: int | None = None,
    progress: Progress | None = None,
    state: str | Path | None = None,
    model: str = "",
    hashes: Sequence[str] = (),
    perturbation: float = 0.05,
) -> Embeddings:
    """Fits embeddings to targets. The defaults are the paper's, but for the method.

    Every random number is a function of the seed, the target's place, segment and epoch: chunks change nothing but the
    rounding, and a fit that was killed goes on from its checkpoint to the same bytes.

    Args:
        denoiser: Any; its weights are not changed.
        targets: x0 of the N targets as the denoiser has them (`denoiser.encode(images)`), (N, c, h, w), on its device.
        levels: The path; None: 25 steps of the model's default spacing.
        segments: eta, 1 (the same at all steps) to the number of guided steps (strict).
        interval: (lo, hi): the guided steps lo <= i < hi, counted from the clean end.
        scale: s.
        spread_weight: lambda, what draws the targets' embeddings together.
        method: "difference", the closed form, or "adam", the paper's.
        epochs: Of a segment; None: 10 for "difference", 120 for "adam" (the paper's).
        lr: Adam's.
        seed: Of all draws.
        condition: The model's condition for N images; None: no class (`no_condition`).
        chunk: At most this many targets at once through the network, whose memory is that of a chunk. None: all of them, and
            half as many for as long as the device is out of memory.
        progress: Called after every epoch: segment, epoch, and at its draws the loss of the G before it.
        state: A checkpoint, written at every segment's end and every few seconds; where it is there, the fit goes on from
            it. It is left there: delete it when the embeddings are saved.
        model: The digest of the model's weights, for `Embeddings.check`.
        hashes: The targets' content hashes, to be kept with the embeddings.
        perturbation: What sampling uses by default.

    Raises:
        RequestError: If targets or settings don't fit the model or each other, or `state` is another fit's.
        RunError: If the model's estimate is not finite.
    """
    if method not in get_args(Method):
        raise RequestError("method", method, "no such way to fit", f"Choose one of: {', '.join(get_args(Method))}.")
    levels, epochs = levels or denoiser.levels.spacing(STEPS), EPOCHS[method] if epochs is None else epochs
    check_numbers(epochs=epochs, lr=lr, scale=scale, spread_weight=spread_weight, perturbation=perturbation, seed=seed)
    check_interval(interval, segments, levels)
    _check_targets(denoiser, targets, hashes)
    condition = condition or no_condition(denoiser, len(targets))
    given = _tensors_of(condition)
    if any(len(each) != len(targets) for each in given.values()):
        lengths = sorted({len(each) for each in given.values()})
        raise RequestError("condition", lengths, f"there are {counted(len(targets), 'target')}", "Give one condition for each.")

    x0 = targets.detach().float()
    how = {"method": method, "epochs": epochs, "lr": lr, "spread_weight": spread_weight, "seed": seed, "segments": segments}
    request = json.dumps([how, interval, scale, model]) + tensors_digest(
        {"x0": x0, "alpha": levels.alpha, "sigma": levels.sigma, **given}
    )
    guided, keys = Guided(denoiser, (), chunk), target_keys(seed, len(x0))  # guided by nothing: for its chunks
    runs = segment_steps(interval, segments)
    at = _resumed(state, request, x0) or _begun(torch.zeros(len(x0), segments, *x0.shape[1:]), keys, method, x0)
    saved = time.monotonic()
    while at.segment >= 0:
        if at.epoch == epochs:
            at.G[:, at.segment] = at.current.cpu()
            at = _begun(at.G, keys, method, x0, (*at.losses, at.loss))
        else:
            place = (at.epoch + 1, at.segment + 1)
            steps = _drawn_steps(runs[at.segment], random_at(seed, 0, *place))
            draws = _parabola(guided, x0, levels, steps, scale, condition, keys, place)
            at.loss = draws.loss(at.current, spread_weight)
            if not math.isfinite(at.loss):
                raise RunError(
                    f"segment {at.segment}, epoch {at.epoch}: the loss is not finite, as the model's estimate "
                    "overflows. Use float32."
                )
            at.epoch += 1
            if method == "adam":
                _adam(at, draws.gradient(at.current, spread_weight), lr)
            else:
                at.curvature, at.first = at.curvature + draws.a, at.first + draws.b
                at.current = Parabola(at.curvature / at.epoch, at.first / at.epoch, 0.0).minimum(spread_weight)
            if progress:
                progress(at.segment, at.epoch - 1, at.loss)
        if state is not None and (at.epoch == 0 or time.monotonic() - saved >= SAVE_SECONDS):
            _write(Path(state), request, at)
            saved = time.monotonic()
    fitted = {**how, "losses": list(reversed(at.losses))}
    return Embeddings(at.G, x0.cpu(), levels, interval, scale, perturbation, model, tuple(hashes), fitted)


def check_numbers(**given: float) -> None:
    """Refuses numbers of a fit, by name, that are out of their range."""
    for name, value in given.items():
        least = {"epochs": 1, "spread_weight": 0, "perturbation": 0, "seed": 0}.get(name)
        if least is not None and not (math.isfinite(value) and value >= least):
            raise RequestError(name, value, f"it must be a finite number, {least} or more", f"Use {least} or more.")
        if least is None and not (math.isfinite(value) and value > 0):
            raise RequestError(name, value, "it must be a finite number above 0", "Leave it out for the paper's value.")


def _check_targets(denoiser: Denoiser, targets: Tensor, hashes: Sequence[str]) -> None:
    if targets.ndim != 4 or not len(targets):
        raise RequestError(
            "targets", tuple(targets.shape), "targets have the shape (N, c, h, w), N >= 1", "Give one image or more."
        )
    have, want = tuple(targets.shape[1:]), tuple(denoiser.shape)
    if have != want:
        shown = " x ".join(map(str, want))
        if have == tuple(denoiser.image_shape):
            problem, remedy = (
                f"these are images, and the model works on latents of {shown}",
                "Encode them first (denoiser.encode).",
            )
        elif have[0] != want[0]:
            problem = f"they have {have[0]} channel{'s' * (have[0] != 1)}, and the model takes {want[0]}"
            remedy = f"Read them with {want[0]} channel{'s' * (want[0] != 1)}."
        else:
            problem, remedy = f"the model takes {shown}", f"Resize them to {want[1]} x {want[2]}."
        raise RequestError("targets", have, problem, remedy)
    if not bool(targets.isfinite().all()):
        raise RequestError("targets", have, "they hold NaN or infinite values", "Read the images again.")
    if hashes and len(hashes) != len(targets):
        raise RequestError("hashes", len(hashes), f"there are {counted(len(targets), 'target')}", "Give one hash for each.")


def _tensors_of(condition: Condition) -> dict[str, Tensor]:
    """The tensors of a condition by name, n rows each."""
    return {**({} if condition.labels is None else {"labels": condition.labels}), **condition.embeddings}


def _begun(G: Tensor, keys: list[int], method: Method, x0: Tensor, losses: tuple[float, ...] = ()) -> _State:
    """The state at the start of a segment, the first or the next."""
    at = _State(G, torch.zeros_like(x0), torch.zeros_like(x0), torch.zeros_like(x0), losses)
    if method == "adam" and at.segment >= 0:
        at.current = normal(keys, tuple(x0.shape[1:]), 0, 0, at.segment + 1).to(x0)
    return at


def _drawn_steps(run: range, random: np.random.RandomState) -> list[int]:
    """One step from each of about 0.8 as many equal parts of a segment as it has steps: each as likely as any other."""
    draws = max(1, int(0.8 * len(run)))
    places = (np.arange(draws) + random.random_sample(draws)) * (len(run) / draws)
    return [run[min(int(place), len(run) - 1)] for place in places]


@torch.no_grad()
def _parabola(
    guided: Guided,
    x0: Tensor,
    levels: Levels,
    steps: Sequence[int],
    scale: float,
    condition: Condition,
    keys: Sequence[int],
    place: tuple[int, int],
) -> Parabola:
    """One guided DDIM step from each of the drawn steps, as an estimate of the loss."""
    a, b, c = 0.0, torch.zeros_like(x0), 0.0
    for draw, step in enumerate(steps):
        index = levels.steps - 1 - step
        t, next_ = levels[index], levels[index + 1]
        eps = normal(keys, tuple(x0.shape[1:]), draw, *place).to(x0)
        residual = x0 - guided(noised(x0, eps, t), t, condition)
        f, w = scale * score_factor(t), 1 + _carried(t, next_) ** 2
        a, b, c = a + w * f**2, b + w * f * residual, c + w * float(residual.square().mean())
    return Parabola(a / len(steps), b / len(steps), c / len(steps))


def _carried(t: Level, s: Level) -> float:
    """k: how much of an error of x0_hat a DDIM step from t leaves in x_s, at unit variance."""
    return float((s.alpha - s.sigma * t.alpha / t.sigma) / s.total)


def _adam(at: _State, gradient: Tensor, lr: float) -> None:
    """A step of Adam (Kingma & Ba 2015, algorithm 1)."""
    (beta1, beta2), count = _BETAS, at.epoch
    at.first = beta1 * at.first + (1 - beta1) * gradient
    at.second = beta2 * at.second + (1 - beta2) * gradient.square()
    at.current = at.current - lr * (at.first / (1 - beta1**count)) / ((at.second / (1 - beta2**count)).sqrt() + _EPS)


def _deviation(G: Tensor) -> Tensor:
    return G - G.mean(0)


def _write(path: Path, request: str, at: _State) -> None:
    tensors = {"G": at.G, "current": at.current, "first": at.first, "second": at.second}
    settings = {"request": request, "losses": at.losses, "epoch": at.epoch, "curvature": at.curvature, "loss": at.loss}
    write_atomically(path, seal(_KIND, _VERSION, settings, tensors))


def _resumed(path: str | Path | None, request: str, x0: Tensor) -> _State | None:
    """What a checkpoint holds; None where there is none."""
    if path is None or not Path(path).exists():
        return None
    remedy = "Delete the file to start again, or name another one."
    settings, tensors = unseal(path, _KIND, _VERSION, field="state", remedy=remedy)
    if settings.pop("request") != request:
        raise RequestError("state", Path(path), "it belongs to a fit with other targets, settings or model", remedy)
    settings["losses"] = tuple(settings["losses"])
    G = tensors.pop("G")
    return _State(G, **{name: tensor.to(x0) for name, tensor in tensors.items()}, **settings)
