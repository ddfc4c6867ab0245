"""What terms look with: extractors and classifiers by what a recipe says, and which of a classifier's classes is meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from handful.errors import RequestError
from handful.features import FeatureExtractor, extractor_skeleton, load_extractor
from handful.generate.guidance_requests import (
    ClassifierRequest,
    FeaturesRequest,
    GuidanceRequest,
    NoisyClassifierRequest,
    PotentialRequest,
)
from handful.user_code import run_user_file


def extractor_key(request: PotentialRequest) -> str:
    """What a term looks with, in words: the same for two terms that can share it. The key of every table of extractors."""
    if isinstance(request, FeaturesRequest):
        return request.features
    if isinstance(request, ClassifierRequest):
        return request.classifier + (f" softplus {request.softplus:g}" if request.softplus else "")
    assert isinstance(request, NoisyClassifierRequest)
    return f"{request.classifier} noisy"


def extractors_wanted(requests: Sequence[GuidanceRequest]) -> dict[str, PotentialRequest]:
    """By its key, one of the terms that look with it."""
    return {extractor_key(each): each for each in reversed(requests) if isinstance(each, PotentialRequest)}


def load_for(request: PotentialRequest, classes: Sequence[str] = (), *, meta: bool = False) -> FeatureExtractor:
    """Loads what a term looks with.

    Args:
        request: The term.
        classes: The classes to generate: the prompts of a CLIP follow from them.
        meta: Without weights, on the meta device, to count its cost.

    Raises:
        RequestError: If there is no such extractor, or it is not what the term needs.
    """
    if isinstance(request, FeaturesRequest):
        return (extractor_skeleton if meta else load_extractor)(request.features)
    if isinstance(request, NoisyClassifierRequest):
        path, _, attribute = request.classifier.rpartition(":")
        network = run_user_file(Path(path), attribute, "classifier")
        if not isinstance(network, nn.Module):
            raise RequestError("classifier", request.classifier, "it gives no torch module",
                               "Return a module that takes (x_t / n, time) and gives logits.")  # fmt: skip
        extractor = FeatureExtractor(request.classifier, network, channels=None)
        return extractor.to("meta") if meta else extractor
    assert isinstance(request, ClassifierRequest)
    extractor = (extractor_skeleton if meta else load_extractor)(request.classifier)
    if not extractor.is_classifier:
        raise RequestError("classifier", request.classifier, "it has no logits", "Name an image classifier.")
    return extractor


def targets_of(
    request: ClassifierRequest | NoisyClassifierRequest, names: Sequence[str], count: int, labels: Mapping[str, int | None],
    model_classes: Sequence[str],
) -> dict[str, int]:  # fmt: skip
    """Which of the classifier's classes each class to generate is.

    Args:
        request: The term, with what it says of classes.
        names: The classifier's class names; empty where it has none.
        count: How many classes it has.
        labels: The classes to generate, with the model's labels.
        model_classes: The model's class names by label; empty where they are unknown.

    Raises:
        RequestError: If a class has no counterpart that is certain.
    """
    unknown = [name for name in request.classes if name not in labels]
    if unknown:
        raise RequestError("classes", unknown[0], "no such class is generated", f"Those are: {', '.join(labels)}.")
    places = {_plain(name): place for place, name in enumerate(names)}
    found: dict[str, int] = {}
    for name, label in labels.items():
        said = request.classes.get(name)
        if isinstance(said, int):
            if not 0 <= said < count:
                raise RequestError(f"classes.{name}", said, f"the classifier has {count} classes", f"Give 0 to {count - 1}.")
            found[name] = said
        elif said is not None or places:
            asked = name if said is None else said
            if _plain(asked) not in places:
                near = difflib.get_close_matches(asked, names, n=1)
                hint = f" '{near[0]}' is like it." if near else ""
                raise RequestError("classes", asked, f"the classifier has no class of this name among its {count}.{hint}",
                                   f"Say which it is: classes: {{{name}: NUMBER or NAME}}.")  # fmt: skip
            found[name] = places[_plain(asked)]
        elif label is not None and len(model_classes) == count:
            found[name] = label
        else:
            problem = f"the classifier's {count} classes have no names, and the model's are {len(model_classes) or 'unknown'}"
            raise RequestError("classes", name, problem, f"Say which it is: classes: {{{name}: NUMBER}}.")
    return found


def _plain(name: str) -> str:
    return name.strip().casefold().replace("_", " ")
