"""From logits along the reverse process to numbers: how well each pre-conditioning is calibrated, step by step and in all.

Fitted temperatures are judged on images they were not fitted to: those of each class with even numbers by the temperatures of
the odd ones, and the other way round, so that every candidate is judged on all images. What is written for
use is fitted to all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handful.calibrate.candidates import PLAIN, Candidate
from handful.calibrate.watch import Recorded, Sees
from handful.core.noise import Levels
from handful.features.extractor import FeatureExtractor
from handful.guidance import Timing
from handful.guidance.classifier import temperature_at, tempered_energy
from handful.metrics.calibration import (
    Reliability,
    accuracy,
    calibration_error,
    chance_error,
    confidence_and_hits,
    fitted_temperature,
    negative_log_likelihood,
    posterior,
    reliability,
    resampled_errors,
    smoothed_temperatures,
)

GAINS = ("linear", "sine")  # by which the integral is weighted too
_DRAWS = 200  # of the standard errors
_MOST_PAIRS = 24  # temperatures written down
_MOST_FITTED = 4000  # images that decide one number
_AT_ONCE = 16

Temperatures = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class AtStep:
    """A candidate at a step: a row of calibration.parquet.

    Attributes:
        step, sigma_over_alpha: Where; the ratio is infinite at the start of a flow.
        ece, chance: Its calibration error, and that of a perfectly calibrated classifier as confident as it.
        accuracy: Share of images that it names as they were asked for.
        confidence, nll: Mean largest probability; mean -log p of the class asked for, in nats.
        roughness: See `roughness`; NaN at steps where it was not measured, or where no image has a gradient.
    """

    step: int
    sigma_over_alpha: float
    ece: float
    chance: float
    accuracy: float
    confidence: float
    nll: float
    temperature: float
    n: int
    roughness: float = math.nan


@dataclass(frozen=True)
class Found:
    """What was found of a candidate.

    Attributes:
        error: Standard error of the integral calibration error, by resampling images.
        gain, gain_error: How much lower it is than the plain classifier's, and that difference's standard error.
        weighted: The integral weighted by each of GAINS.
        temperatures: Fitted, (sigma / alpha, T), rising; empty for others.
        guides: Whether any image had a gradient.
    """

    candidate: Candidate
    steps: tuple[AtStep, ...]
    error: float
    gain: float
    gain_error: float
    weighted: Mapping[str, float]
    temperatures: Temperatures
    reliability: Mapping[int, Reliability]
    guides: bool = True

    @cached_property
    def integral(self) -> float:
        """The integral calibration error: the mean over the steps."""
        return _mean([at.ece for at in self.steps])

    @property
    def excess(self) -> float:
        """What the integral has beyond chance, 0 or more."""
        return max(0.0, self.integral - self.mean("chance"))

    def mean(self, name: str) -> float:
        """Of one of `AtStep`'s numbers, over the steps that have one; NaN where none has."""
        return _mean([value for at in self.steps if not math.isnan(value := getattr(at, name))])

    def as_dict(self) -> dict[str, Any]:
        """The numbers in all, for JSON."""
        told = {
            **self.candidate.facts,
            "integral_ece": self.integral,
            "integral_ece_error": self.error,
            "chance": self.mean("chance"),
            **{f"integral_ece_{name}": value for name, value in self.weighted.items()},
            "gain_over_plain": self.gain,
            "gain_error": self.gain_error,
            **{name: self.mean(name) for name in ("accuracy", "confidence", "nll", "roughness")},
            "guides": self.guides,
            "temperatures": [list(pair) for pair in self.temperatures],
        }
        return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in told.items()}


def drawn_steps(steps: int) -> list[int]:
    """An early, a middle and a late step."""
    return sorted({round(part * (steps - 1)) for part in (0.2, 0.5, 0.8)})


def analyse(recorded: Recorded, candidates: Sequence[Candidate], labels: Tensor, levels: Levels, seed: int) -> dict[str, Found]:
    """Every candidate's calibration, by its name, in their order; all but `roughness`.

    Args:
        labels: The classifier's class that each image was asked to be, int64 (n,).
    """
    draw = np.random.RandomState(np.random.Philox(key=seed % 2**64))
    weights = draw.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), _DRAWS).astype(float)
    halves = torch.tensor([index % 2 for _, index in recorded.places()])
    of_sees: dict[Sees, _Fitted] = {}
    known: dict[tuple[Any, ...], _Integral] = {}
    for candidate in candidates:
        sees = candidate.sees
        if candidate.fitted and sees not in of_sees:
            of_sees[sees] = _fit(recorded, sees, labels, halves, levels)
        if candidate.probabilities not in known:
            fitted = of_sees[sees] if candidate.fitted else None
            known[candidate.probabilities] = _integral(recorded, candidate, labels, levels, weights, fitted)
    plain = known[PLAIN.probabilities].draws
    gains = {gain: np.array([Timing(gain=gain).strength(levels[i]) for i in range(levels.steps)]) for gain in GAINS}
    found: dict[str, Found] = {}
    for candidate in candidates:
        all_ = known[candidate.probabilities]
        eces = np.array([at.ece for at in all_.steps])
        found[candidate.name] = Found(
            candidate,
            tuple(all_.steps),
            float(np.std(all_.draws, ddof=1)),
            _mean([at.ece for at in known[PLAIN.probabilities].steps]) - float(eces.mean()),
            float(np.std(plain - all_.draws, ddof=1)),
            {gain: float(eces @ of / of.sum()) if of.sum() > 0 else math.nan for gain, of in gains.items()},
            of_sees[candidate.sees].pairs if candidate.fitted else (),
            all_.reliability,
        )
    return found


@dataclass(frozen=True)
class _Fitted:
    """Temperatures of one view: (2, steps) fitted to each half, and the pairs to write."""

    of_halves: np.ndarray
    pairs: Temperatures


@dataclass(frozen=True)
class _Integral:
    steps: list[AtStep]
    draws: np.ndarray  # of the integral, (draws,)
    reliability: dict[int, Reliability]


def _fit(recorded: Recorded, sees: Sees, labels: Tensor, halves: Tensor, levels: Levels) -> _Fitted:
    rough: list[list[float]] = [[], [], []]
    for step in range(levels.steps):
        logits = recorded.logits(sees, step)
        for of, chosen in zip(rough, (halves == 0, halves == 1, halves >= 0), strict=True):
            places = chosen.nonzero()[:, 0]
            places = places[:: -(-len(places) // _MOST_FITTED)]
            of.append(fitted_temperature(logits[places], labels[places]))
    even, odd, all_ = (smoothed_temperatures(np.array(of)) for of in rough)
    return _Fitted(np.stack([even, odd]), _pairs(levels, all_))


def _pairs(levels: Levels, temperatures: np.ndarray) -> Temperatures:
    """(sigma / alpha, T), rising in the first, at most _MOST_PAIRS of them; beyond the ends the guide keeps T constant."""
    steps = [step for step in range(levels.steps) if math.isfinite(float(levels[step].ratio))]
    if len(steps) > _MOST_PAIRS:
        steps = [steps[round(i * (len(steps) - 1) / (_MOST_PAIRS - 1))] for i in range(_MOST_PAIRS)]
    return tuple((_rounded(float(levels[step].ratio)), _rounded(float(temperatures[step]))) for step in reversed(steps))


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _integral(
    recorded: Recorded, candidate: Candidate, labels: Tensor, levels: Levels, weights: np.ndarray, fitted: _Fitted | None
) -> _Integral:
    parities = np.array([index % 2 for _, index in recorded.places()])
    steps: list[AtStep] = []
    draws = np.zeros((levels.steps, len(weights)))
    drawn: dict[int, Reliability] = {}
    for step in range(levels.steps):
        logits, temperature = recorded.logits(candidate.sees, step), 1.0
        if fitted is not None:  # each half by the other's
            of_images = fitted.of_halves[1 - parities, step]
            logits = logits.double() / torch.from_numpy(of_images)[:, None]
            temperature = float(np.exp(np.log(fitted.of_halves[:, step]).mean()))
        probabilities = posterior(logits, candidate.tau1)
        confidence, hits = confidence_and_hits(probabilities, labels)
        draws[step] = resampled_errors(confidence, hits, weights)
        if step in drawn_steps(levels.steps):
            drawn[step] = reliability(confidence, hits)
        steps.append(
            AtStep(
                step,
                float(levels[step].ratio),
                calibration_error(probabilities, labels),
                chance_error(confidence),
                accuracy(probabilities, labels),
                float(confidence.mean(dtype=np.float64)),
                negative_log_likelihood(probabilities, labels),
                temperature,
                len(labels),
            )
        )
    return _Integral(steps, draws.mean(0), drawn)


def with_roughness(
    found: Mapping[str, Found],
    recorded: Recorded,
    classifiers: Mapping[float | None, FeatureExtractor],
    targets: Mapping[str, int],
    device: torch.device,
) -> dict[str, Found]:
    """The same, with each candidate's roughness at the steps whose images were kept, and whether it has any gradient."""
    measured: dict[str, dict[int, float]] = {name: {} for name in found}
    for sees in dict.fromkeys(each.candidate.sees for each in found.values()):
        softplus, looks = sees
        of_view = [each for each in found.values() if each.candidate.sees == sees]
        for step, images, names in recorded.images(looks):
            target = torch.tensor([targets[name] for name in names], device=device)
            shares: dict[str, list[Tensor]] = {each.candidate.name: [] for each in of_view}
            for part, wanted in zip(images.to(device).split(_AT_ONCE), target.split(_AT_ONCE), strict=True):
                leaf = part.requires_grad_()
                with torch.enable_grad():
                    logits = classifiers[softplus].logits(leaf)
                    for each in of_view:
                        energy = _energy(each, step, logits, wanted).sum()
                        (gradient,) = torch.autograd.grad(energy, leaf, retain_graph=True)
                        shares[each.candidate.name].append(roughness(gradient))
            for name, parts in shares.items():
                values = torch.cat(parts)
                measured[name][step] = float(values[~values.isnan()].mean())
    return {
        name: replace(
            each,
            steps=tuple(replace(at, roughness=measured[name].get(at.step, math.nan)) for at in each.steps),
            guides=any(not math.isnan(value) for value in measured[name].values()),
        )
        for name, each in found.items()
    }


def _energy(found: Found, step: int, logits: Tensor, target: Tensor) -> Tensor:
    candidate, temperature = found.candidate, 1.0
    if found.temperatures:
        temperature = temperature_at(found.temperatures, found.steps[step].sigma_over_alpha)
    return tempered_energy(logits / temperature, target, candidate.tau1, candidate.tau2)


def roughness(gradient: Tensor) -> Tensor:
    """Share of a gradient's energy in the upper half of the spatial frequencies, along either axis.

    What changes an image as a person sees it is mostly smooth; a gradient that is mostly rough is nearer to the noise that
    fools a network. White noise has about 3/4.

    Args:
        gradient: (n, c, h, w).

    Returns:
        (n,), 0 to 1; NaN where the gradient is 0.
    """
    peak = gradient.abs().amax((1, 2, 3), keepdim=True)  # taken out: the square of a small gradient underflows
    power = torch.fft.fft2(gradient.double() / peak.double()).abs().square().sum(1)
    rows, columns = (torch.fft.fftfreq(side, device=gradient.device).abs() for side in gradient.shape[-2:])
    high = (rows[:, None] >= 0.25) | (columns[None, :] >= 0.25)  # cycles a pixel; the highest is 0.5
    return (power * high).sum((1, 2)) / power.sum((1, 2))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
