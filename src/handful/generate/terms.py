"""Guidance terms from what a recipe says of them: the one place that knows both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from handful.errors import RequestError
from handful.features import FeatureExtractor
from handful.generate.recipe import CFGRequest, ChamferRequest, GuidanceRequest, InversionRequest, PotentialRequest
from handful.guidance import CFG, Chamfer, Energy, Guidance, Pull, Timing
from handful.guidance.inversion import Embeddings, Inversion

Requests = Sequence[GuidanceRequest]
View = tuple[str, int]


def check_terms(requests: Requests, steps: int) -> None:
    """Refuses settings that contradict each other, before anything is loaded.

    Args:
        requests: What the recipe says.
        steps: Of the sampler.

    Raises:
        RequestError: Naming the dotted field.
    """
    for index, request in enumerate(requests):
        with named(index):
            if _timing(request).every > steps:
                raise RequestError("every", request.every, f"of {steps} steps none has its turn", f"Use {steps} or less.")
            if isinstance(request, PotentialRequest):
                _pull(request)
            if isinstance(request, ChamferRequest) and not (request.coverage_weight or request.fidelity_weight):
                raise RequestError("coverage_weight", 0.0, "both weights are 0", "Make one of them positive.")


def needs_exemplars(requests: Requests) -> str | None:
    """The method of the first term that is guided by exemplars; None where there is none."""
    return next((request.method for request in requests if isinstance(request, PotentialRequest)), None)


def views(requests: Requests) -> list[View]:
    """What the terms look at, each once, in the terms' order: an extractor's name, and by how much images are shrunk."""
    return list(dict.fromkeys(view_of(request) for request in requests if isinstance(request, PotentialRequest)))


def view_of(request: PotentialRequest) -> View:
    return request.features, request.reduce or 1


def make_terms(
    requests: Requests, extractors: Mapping[str, FeatureExtractor], features: Mapping[View, Tensor],
    embeddings: Embeddings | None = None, seeds: Sequence[int] = (),
) -> list[Guidance]:  # fmt: skip
    """The terms for one cohort.

    Args:
        requests: What the recipe says.
        extractors: By name, on the device to guide on.
        features: The class's exemplars by view, (k, D) each.
        embeddings: For inversion; None where no request asks for it.
        seeds: Of the cohort's images, for inversion.
    """
    terms: list[Guidance] = []
    for request in requests:
        timing = _timing(request)
        if isinstance(request, CFGRequest):
            terms.append(CFG(request.scale, timing))
            continue
        if isinstance(request, InversionRequest):
            assert embeddings is not None, "a recipe with inversion has its embeddings read (inverting.py)"
            terms.append(Inversion(embeddings, seeds, request.scale, exchange=request.exchange,
                                   perturbation=request.perturbation, timing=timing))  # fmt: skip
            continue
        common = extractors[request.features], features[view_of(request)], request.scale
        if isinstance(request, ChamferRequest):
            weights = {name: getattr(request, name) for name in ("coverage_weight", "fidelity_weight", "margin")}
            terms.append(Chamfer(*common, timing=timing, pull=_pull(request), **weights))
        else:
            terms.append(Energy(*common, timing=timing, pull=_pull(request)))
    return terms


def energy_columns(requests: Requests) -> list[str | None]:
    """For each term the manifest's column of its energy; None for a term that has none."""
    columns: list[str | None] = []
    for request in requests:
        name = f"energy_{request.method}" if isinstance(request, PotentialRequest) else None
        taken = sum(column is not None and column.startswith(name) for column in columns) if name else 0
        columns.append(f"{name}_{taken + 1}" if taken else name)
    return columns


def _timing(request: GuidanceRequest) -> Timing:
    low, high = request.noise
    return Timing(request.every or 1, request.interval, (low, math.inf if high is None else high), request.gain)


def _pull(request: PotentialRequest) -> Pull:
    return Pull(request.jacobian, request.normalize, bool(request.hold), request.reduce or 1)


@contextmanager
def named(index: int) -> Iterator[None]:
    """Puts the term's place before the field that an error names."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"guidance[{index}].{error.field}", error.value, error.problem, error.remedy) from None
