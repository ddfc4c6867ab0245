"""What terms look with: extractors and classifiers by what a recipe says, and which of a classifier's classes is meant."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from handful.errors import RequestError, counted, some_of
from handful.features.class_numbers import number_of, places_of
from handful.features.clip import clip_classifier, clip_skeleton, is_clip
from handful.features.registry import FeatureExtractor, extractor_skeleton, load_extractor
from handful.features.softplus import softened
from handful.guidance.classifier import ClassRequest
from handful.guidance.method import PLAIN_TEMPLATE, Looks, Requests, potentials
from handful.models.user_code import run_user_file


def extractors_wanted(requests: Requests) -> dict[str, Looks]:
    """By its key, each network that the terms look with."""
    return {term.key: term.looks for _, term in potentials(requests)}


def load_for(looks: Looks, classes: Sequence[str] = (), *, meta: bool = False) -> FeatureExtractor:
    """Loads what a term looks with.

    Args:
        classes: The classes to generate: those of a CLIP are these.
        meta: Without weights, on the meta device, to count its cost.

    Raises:
        RequestError: If there is no such extractor, or it is not what the term needs.
    """
    if looks.noisy:
        extractor = _noisy(looks.name)
        return extractor.to("meta") if meta else extractor
    prompted = looks.logits and is_clip(looks.name)
    with _called(looks.field):
        if prompted:
            prompts = class_prompts(looks, classes, refuse_others=not meta)
            extractor = (clip_skeleton if meta else clip_classifier)(looks.name, prompts)
        else:
            for name, given in (("prompts", dict(looks.prompts)), ("template", looks.template)):
                if given:
                    raise RequestError(name, given, f"'{looks.name}' takes no prompts; only CLIP does", "Leave it out.")
            extractor = (extractor_skeleton if meta else load_extractor)(looks.name)
    if looks.logits and not extractor.is_classifier:
        raise RequestError(
            looks.field,
            looks.name,
            "this network has no logits",
            "Name an image classifier. In FILE.py:FUNCTION, pass FeatureExtractor(classify=...) a function that gives logits.",
        )
    return extractor if looks.softplus is None else softened(extractor, looks.softplus)


def answer(looks: Looks, extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """What an extractor gives of images (n, c, h, w), or of noisy states at time 0: (n, D)."""
    if looks.noisy:
        return extractor.network(images, torch.zeros(len(images), device=images.device))
    return extractor.logits(images) if looks.logits else extractor(images)


def class_prompts(looks: Looks, classes: Sequence[str], *, refuse_others: bool = True) -> dict[str, str]:
    """CLIP's prompt for each class to generate; underscores in class names become spaces.

    Args:
        refuse_others: Refuse prompts of other classes, unless each of these has one of its own.

    Raises:
        RequestError: If a prompt can't be made, is empty, or says the same of two classes.
    """
    template, given = looks.template or PLAIN_TEMPLATE, dict(looks.prompts)
    around = template.replace("{}", "")
    if around == template or "{" in around or "}" in around:
        problem = "it does not say where the class name goes"
        raise RequestError("template", template, problem, 'Write {} and no other braces, as in "a photo of a {}".')
    others = [name for name in given if name not in classes]
    if refuse_others and others and not set(classes) <= set(given):
        raise RequestError("prompts", others[0], "no such class is generated", f"The classes are: {some_of(classes, 10)}.")
    prompts = {name: given.get(name, template.replace("{}", name.replace("_", " "))) for name in classes}
    said: dict[str, str] = {}
    for name, prompt in prompts.items():
        if not prompt.strip():
            raise RequestError(f"prompts.{name}", prompt, "it is empty", "Describe what an image of this class shows.")
        if prompt in said:
            problem = f"'{said[prompt]}' has the same prompt, and CLIP can't tell the two apart"
            raise RequestError(f"prompts.{name}", prompt, problem, "Give each class another prompt.")
        said[prompt] = name
    return prompts


def targets_of(
    request: ClassRequest, names: Sequence[str], count: int, labels: Mapping[str, int | None], model_classes: Sequence[str]
) -> dict[str, int]:
    """Which of the classifier's classes each class to generate is.

    Args:
        request: The term, with what it says of classes. It may say more than is generated, if it says all that is.
        names: The classifier's class names; empty where it has none. Synonyms stand between commas, as ImageNet's do.
        labels: The classes to generate, with the model's labels.
        model_classes: The model's class names by label; empty where they are unknown.

    Raises:
        RequestError: If a class has no counterpart that is certain, or the classifier has no gradient.
    """
    if names and len(names) != count:
        problem = f"it has names of {counted(len(names), 'class')}, but {counted(count, 'logit')}"
        raise RequestError("classifier", request.classifier, problem, "Name each of its classes, or none.")
    if count == 1 and request.tau1 == request.tau2:
        problem = "with a single class log p(y | x) is always 0, so there is no gradient"
        remedy = "Use tau2 0 (the logit alone), or a classifier with more classes. CLIP's classes are those you generate."
        raise RequestError("tau2", request.tau2, problem, remedy)
    unknown = [name for name in request.classes if name not in labels]
    if unknown and not set(labels) <= set(request.classes):
        raise RequestError("classes", unknown[0], "no such class is generated", f"The classes are: {some_of(labels, 10)}.")
    places = places_of(names)
    found: dict[str, int] = {}
    for name, label in labels.items():
        said = request.classes.get(name)
        if isinstance(said, int):
            found[name] = _within(f"classes.{name}", said, count)
        elif said is None and request.by_label:
            if label is None:
                raise RequestError("by_label", True, "this model takes no class labels", "Leave by_label out.")
            found[name] = _within(f"by_label, class '{name}'", label, count)
        elif said is not None or names:
            found[name] = number_of(name, name if said is None else said, names, places)
        elif label is not None and len(model_classes) == count:
            found[name] = label
        else:
            problem = f"its {count} classes have no names, and the model has {len(model_classes) or 'unknown ones'}"
            remedy = f"Write its number: classes: {{{name}: NUMBER}}. Or by_label: true, if its numbers are the model's labels."
            raise RequestError("classes", name, problem, remedy)
    return found


def _noisy(name: str) -> FeatureExtractor:
    """A classifier of noisy states; the file's content counts into its digest."""
    file, _, attribute = name.rpartition(":")
    network = run_user_file(Path(file), attribute, "classifier")
    if not isinstance(network, nn.Module) or isinstance(network, FeatureExtractor):
        problem = "the function does not return a torch module of noisy states"
        raise RequestError("classifier", name, problem, "Return a module that takes (x_t / n, time) and gives logits.")
    extractor = FeatureExtractor(name, network, channels=None)
    extractor.digest = hashlib.sha256(extractor.digest.encode() + Path(file).read_bytes()).hexdigest()
    return extractor


@contextmanager
def _called(name: str) -> Iterator[None]:
    """Loading reports the field as `features`; this reports it as the recipe calls it."""
    try:
        yield
    except RequestError as error:
        field = name if error.field == "features" else error.field
        raise RequestError(field, error.value, error.problem, error.remedy) from error


def _within(field: str, number: int, count: int) -> int:
    if not 0 <= number < count:
        problem = f"the classifier has {counted(count, 'class')}"
        raise RequestError(field, number, problem, f"Write a number from 0 to {count - 1} under classes.")
    return number
