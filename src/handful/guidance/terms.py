"""Guidance terms from what a recipe says of them: the one place that knows both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from handful.core.noise import Schedule
from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor
from handful.guidance import (
    CADS,
    CFG,
    CVSG,
    Chamfer,
    Classifier,
    Energy,
    Guidance,
    NoisyClassifier,
    Potential,
    Pull,
    Smoothing,
    Timing,
    Vendi,
)
from handful.guidance.cads import check_annealing
from handful.guidance.classifier import check_temperatures
from handful.guidance.guiders import adaptive_projected
from handful.guidance.inversion import Embeddings, Inversion
from handful.guidance.requests import (
    APGRequest,
    ByExemplarsRequest,
    CADSRequest,
    CFGRequest,
    ChamferRequest,
    ClassifierRequest,
    CVSGRequest,
    GuidanceRequest,
    InversionRequest,
    NoisyClassifierRequest,
    PotentialRequest,
    VendiRequest,
)
from handful.recipe.extractors import extractor_key

Requests = Sequence[GuidanceRequest]
View = tuple[str, int]

# The samplers whose steps a rule can move: those of one evaluation, which remember nothing of the step before.
_SAMPLERS_OF = {"held": ("ddim", "ddpm"), "ancestral": ("ddpm",)}


def check_terms(requests: Requests, steps: int, sampler: str) -> None:
    """Refuses settings that contradict each other, before anything is loaded.

    Args:
        requests: What the recipe says.
        steps: Of the sampler.
        sampler: Its name.

    Raises:
        RequestError: Naming the dotted field.
    """
    for index, request in enumerate(requests):
        with named(index):
            if _timing(request).every > steps:
                raise RequestError("every", request.every, f"of {steps} steps none has its turn", f"Use {steps} or less.")
            if isinstance(request, PotentialRequest):
                _pull(request)
                fitting = _SAMPLERS_OF.get(request.rule, (sampler,))
                if sampler not in fitting:
                    raise RequestError(
                        "rule",
                        request.rule,
                        f"the sampler {sampler} has no step that it could move",
                        f"Use the sampler {' or '.join(fitting)}, or the rule shift.",
                    )
            if isinstance(request, ClassifierRequest | NoisyClassifierRequest):
                check_temperatures(request.tau1, request.tau2, getattr(request, "temperatures", ()))
            if isinstance(request, CADSRequest):
                check_annealing(request.tau1, request.tau2)
            if isinstance(request, CADSRequest) and any(isinstance(before, CADSRequest) for before in requests[:index]):
                raise RequestError("method", "cads", "there are two of them", "Leave one out.")
            if isinstance(request, ChamferRequest) and not (request.coverage_weight or request.fidelity_weight):
                raise RequestError("coverage_weight", 0.0, "both weights are 0", "Make one of them positive.")


def needs_exemplars(requests: Requests) -> str | None:
    """The method of the first term that is guided by exemplars; None where there is none."""
    return next((request.method for request in requests if isinstance(request, ByExemplarsRequest)), None)


def views(requests: Requests) -> list[View]:
    """What exemplars are looked at by, each once, in the terms' order: an extractor's name, and by how much they are shrunk."""
    return list(dict.fromkeys(view_of(request) for request in requests if isinstance(request, ByExemplarsRequest)))


def view_of(request: ByExemplarsRequest) -> View:
    return extractor_key(request), request.reduce or 1


def make_terms(
    requests: Requests,
    extractors: Mapping[str, FeatureExtractor],
    features: Mapping[View, Tensor],
    embeddings: Embeddings | None = None,
    seeds: Sequence[int] = (),
    targets: Mapping[int, int] | None = None,
    levels: Schedule | None = None,
) -> list[Guidance]:
    """The terms for one cohort.

    Args:
        requests: What the recipe says.
        extractors: By `extractor_key`, on the device to guide on.
        features: The class's exemplars by view, (k, D) each.
        embeddings: For inversion; None where no request asks for it.
        seeds: Of the cohort's images, for what draws.
        targets: For classifiers, by the term's place: the number of the cohort's class.
        levels: The denoiser's schedule, for classifiers of noisy images.
    """
    terms: list[Guidance] = []
    for index, request in enumerate(requests):
        timing = _timing(request)
        if isinstance(request, CFGRequest):
            terms.append(CFG(request.scale, timing))
        elif isinstance(request, APGRequest):
            terms.append(
                adaptive_projected(
                    request.scale, parallel=request.parallel, momentum=request.momentum, norm=request.norm, timing=timing
                )
            )
        elif isinstance(request, CADSRequest):
            terms.append(CADS(seeds, request.scale, tau1=request.tau1, tau2=request.tau2, mix=request.mix, timing=timing))
        elif isinstance(request, InversionRequest):
            assert embeddings is not None, "a recipe with inversion has its embeddings read (inverting.py)"
            terms.append(
                Inversion(
                    embeddings,
                    seeds,
                    request.scale,
                    exchange=request.exchange,
                    perturbation=request.perturbation,
                    timing=timing,
                )
            )
        else:
            target = (targets or {}).get(index, 0)
            pull = _pull(request, seeds[0] if seeds else 0)
            terms.append(_potential(request, extractors[extractor_key(request)], features, target, levels, timing, pull))
    return terms


def _potential(
    request: PotentialRequest,
    extractor: FeatureExtractor,
    features: Mapping[View, Tensor],
    target: int,
    levels: Schedule | None,
    timing: Timing,
    pull: Pull,
) -> Potential:
    when: dict[str, Any] = {"timing": timing, "pull": pull}
    if isinstance(request, ClassifierRequest):
        return Classifier(
            extractor, target, request.scale, tau1=request.tau1, tau2=request.tau2, temperatures=request.temperatures, **when
        )
    if isinstance(request, NoisyClassifierRequest):
        assert levels is not None, "whoever makes terms of noisy states says of which schedule"
        return NoisyClassifier(extractor.network, levels, target, request.scale, tau1=request.tau1, tau2=request.tau2, **when)
    if isinstance(request, VendiRequest):
        return Vendi(extractor, request.scale, order=request.order, **when)
    assert isinstance(request, ByExemplarsRequest)
    exemplars = features[view_of(request)]
    if isinstance(request, ChamferRequest):
        weights = {name: getattr(request, name) for name in ("coverage_weight", "fidelity_weight", "margin")}
        return Chamfer(extractor, exemplars, request.scale, **weights, **when)
    if isinstance(request, CVSGRequest):
        return CVSG(extractor, exemplars, request.scale, beta=request.beta, **when)
    return Energy(extractor, exemplars, request.scale, **when)


def energy_columns(requests: Requests) -> list[str | None]:
    """For each term the manifest's column of its energy; None for a term that has none."""
    columns: list[str | None] = []
    for request in requests:
        # a classifier of noisy states has nothing to say of a finished image
        finished = isinstance(request, PotentialRequest) and not isinstance(request, NoisyClassifierRequest)
        name = f"energy_{request.method}" if finished else None
        taken = sum(column is not None and column.startswith(name) for column in columns) if name else 0
        columns.append(f"{name}_{taken + 1}" if taken else name)
    return columns


def _timing(request: GuidanceRequest | PotentialRequest) -> Timing:
    low, high = request.noise
    return Timing(
        request.every or 1,
        request.interval,
        (low, math.inf if high is None else high),
        request.gain,
        getattr(request, "boost", 0.0),
    )


def _pull(request: PotentialRequest, seed: int = 0) -> Pull:
    asked = request.smoothing
    smoothing = Smoothing(asked.samples, asked.noise, asked.shift, asked.flip, seed)
    return Pull(
        request.jacobian,
        request.normalize,
        bool(request.hold),
        request.reduce or 1,
        request.input,
        request.rule,
        request.inner,
        smoothing,
    )


@contextmanager
def named(index: int) -> Iterator[None]:
    """Puts the term's place before the field that an error names."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"guidance[{index}].{error.field}", error.value, error.problem, error.remedy) from None
