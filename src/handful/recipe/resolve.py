"""Resolves what a recipe leaves open, by the model's outline: labels, prompts, levels, how guidance looks at images.

The outline is the denoiser without its weights (`handful.models.skeleton`), so that all this is decided, or refused, before
anything large is read; `handful cost` stops here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from handful.core.denoiser import Denoiser, NetworkDenoiser
from handful.core.noise import Levels
from handful.core.samplers import STOCHASTIC, Noise
from handful.errors import RequestError
from handful.guidance.method import PotentialRequest, check_terms, needing, potentials
from handful.models.latent import LatentDenoiser
from handful.models.options import ModelOptions
from handful.recipe.exemplar_source import has_images
from handful.recipe.inverting import Inverted, as_fitted
from handful.recipe.plan import Labels, assign_labels
from handful.recipe.prompting import prompts_of
from handful.recipe.schema import ModelRequest, Recipe, SamplerRequest, with_defaults


@dataclass(frozen=True)
class Resolved:
    """A recipe with nothing left open but the device.

    Attributes:
        recipe: Every automatic choice replaced by what it became.
    """

    recipe: Recipe
    labels: Labels
    levels: Levels


def complete(recipe: Recipe, inverted: Inverted | None = None) -> tuple[Recipe, list[str]]:
    """What needs no model: defaults filled in, and settings that contradict each other refused.

    Args:
        inverted: From `read_inversion`: its path replaces what the recipe leaves open.

    Returns:
        The recipe, and a sentence for each choice that was made.

    Raises:
        RequestError: Naming the dotted field.
    """
    if recipe.mix is not None:
        remedy = "Replace mix by guidance and start; handful generate makes mixtures."
        raise RequestError("mix", len(recipe.mix), "this command takes one setting at a time, not a mixture", remedy)
    if inverted is not None:
        recipe = as_fitted(recipe, inverted)
        if recipe.start is not None:
            problem = "guidance by inversion starts images from its own targets"
            raise RequestError("start", recipe.start.as_text(), problem, "Leave out start, or the guidance by inversion.")
    if recipe.start is not None and recipe.exemplars.path is None:
        remedy = "Give a folder with a folder of images per class (--exemplars DIR), or leave out start."
        raise RequestError("start", recipe.start.as_text(), "there are no exemplars to start from", remedy)
    if recipe.exemplars.k is not None and recipe.exemplars.path is None:
        remedy = "Give a folder with a folder of images per class (--exemplars DIR), or leave it out."
        raise RequestError("exemplars.k", recipe.exemplars.k, "there are no exemplars to draw (--k)", remedy)
    steps = inverted.levels.steps if inverted else recipe.steps_run
    recipe, notes = with_defaults(recipe, steps)
    notes += _unused(recipe)
    check_terms(recipe.guidance or (), steps, recipe.sampler.name)
    sampler = recipe.sampler
    for name, owner, given in (("eta", "ddim", sampler.eta), ("variance", "ddpm", sampler.variance)):
        if given and sampler.name != owner:
            problem = f"the sampler {sampler.name} has no {name}"
            raise RequestError(f"sampler.{name}", given, problem, f"Use the sampler {owner}, or leave {name} out.")
    if sampler.recurrence > 1 and sampler.name not in STOCHASTIC:
        remedy = f"Use {' or '.join(STOCHASTIC)}, or recurrence 1."
        raise RequestError("sampler.recurrence", sampler.recurrence, f"the sampler {sampler.name} can't repeat a step", remedy)
    return recipe, notes


def _unused(recipe: Recipe) -> list[str]:
    """What is asked for and has no effect, in words."""
    guidance, notes = recipe.guidance or (), []
    if recipe.exemplars.path is not None and not (needing(guidance, "exemplars") or recipe.start):
        notes.append("exemplars: no guidance uses them; they only name the classes, and fit the preview of latents")
    if recipe.model.negative_prompt and not needing(guidance, "null condition"):
        notes.append("model.negative_prompt: it has no effect without cfg (--guidance cfg)")
    return notes


def sampler_options(asked: SamplerRequest, noise: Noise) -> dict[str, Any]:
    """The sampler's arguments besides the path, without ddpm's variance; `noise` draws for the samplers that take it."""
    options: dict[str, Any] = {"noise": noise, "recurrence": asked.recurrence} if asked.name in STOCHASTIC else {}
    return options | ({"eta": asked.eta} if asked.name == "ddim" else {})


def model_options(recipe: Recipe) -> ModelOptions:
    """How the recipe asks for its model."""
    asked = recipe.model
    # the names of its classes are matched to the labels by `assign_labels`, which also says what it concluded
    given = {each.name: getattr(asked, each.name) for each in fields(ModelOptions) if each.name not in ("dtype", "classes")}
    return ModelOptions(**given, dtype=getattr(torch, asked.dtype))


def resolve(
    recipe: Recipe, outline: NetworkDenoiser, found: Sequence[str] | None, inverted: Inverted | None = None
) -> Resolved:
    """Decides what the model decides.

    Args:
        outline: The denoiser, with or without weights; its null class is set.
        found: The classes of the exemplars; None where there are none.
        inverted: As passed to `complete`. The model's condition is that of the fit, for every class name.

    Raises:
        RequestError: Naming the dotted field that this model can't do.
    """
    if inverted is not None:
        inverted.check(outline)
    elif outline.prompted and recipe.classes is None and found is None:
        problem = "this model takes prompts, and no classes are named"
        raise RequestError("classes", None, problem, "Name them (--classes cat,dog), or give exemplars: a folder per class.")
    _refuse_unread(recipe, outline)
    if recipe.model.labels and (inverted or not outline.label_count):
        problem = "this model takes prompts, not labels" if outline.prompted else "here the model gets no label"
        raise RequestError("model.labels", recipe.model.labels, problem, "Leave it out.")
    if outline.prompted and recipe.model.classes is not None:
        remedy = "Leave it out: each class name becomes a prompt."
        raise RequestError("model.classes", list(recipe.model.classes), "this model takes prompts, not labels", remedy)
    labels = assign_labels(
        recipe.classes,
        found,
        label_count=0 if inverted else outline.label_count,
        names=outline.classes if recipe.model.classes is None else recipe.model.classes,
        null_class=outline.null_class,
        may_have_null=outline.null_may_be_unstated,
        said=recipe.model.labels,
    )
    if inverted is not None:
        null = inverted.fitted.null_class if outline.null_class is None else outline.null_class
        labels = replace(labels, null_class=null, model_classes=recipe.model.classes)
    outline.null_class = labels.null_class
    guidance = list(recipe.guidance or ())
    for index, term in needing(guidance, "null condition"):
        if not outline.has_null:
            remedy = "Name its label with model.null_class (--null-class), or use chamfer, which needs none."
            raise RequestError(
                f"guidance[{index}]", term.method, "this model has no null class, which this guidance needs", remedy
            )
    for index, term in needing(guidance, "noisy condition"):
        if not outline.prompted:
            _refuse_noised_labels(recipe, index, term.method, outline)
    pixels = outline.pixels
    sampler = recipe.sampler
    if sampler.clamp and not pixels:
        raise RequestError("sampler.clamp", True, "this model works on latents, which have no fixed range", "Leave clamp out.")
    levels = inverted.levels if inverted else outline.levels.spacing(sampler.steps, sampler.spacing).last(recipe.steps_run)
    outline.check_path(levels)
    shown = has_images(recipe)
    for index, term in potentials(guidance):
        guidance[index] = _with_reduce(term, index, outline, shown)
    looking = [term for _, term in potentials(guidance)]
    if recipe.model.offload != "none" and any(term.jacobian == "exact" for term in looking):
        problem = "an exact jacobian needs the network and the decoder at once"
        raise RequestError("model.offload", recipe.model.offload, problem, "Use jacobian gaussian, or leave offload out.")
    reduces = [term.reduce or 1 for term in looking]
    tiny = recipe.model.preview_decoder
    if tiny and reduces and isinstance(outline, LatentDenoiser) and all(map(outline.is_linear, reduces)):
        problem = f"at reduce {reduces[0]} a linear map replaces the decoder"
        raise RequestError("model.preview_decoder", tiny, problem, "Leave it out, or use reduce 1.")
    model = {
        "null_class": labels.null_class,
        "classes": labels.model_classes,
        "prompts": _prompts(recipe, labels, inverted) if outline.prompted else {},
        "resolution": None if pixels else outline.image_shape[1:],
    }
    decided = {
        "spacing": sampler.spacing if inverted else sampler.spacing or outline.levels.spacings[0],
        "variance": _variance(recipe, outline),
        "clamp": pixels if sampler.clamp is None else sampler.clamp,
    }
    resolved = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "classes": tuple(labels.of),
            "guidance": tuple(guidance),
            "sampler": sampler.model_copy(update=decided),
        }
    )
    return Resolved(resolved, labels, levels)


def _prompts(recipe: Recipe, labels: Labels, inverted: Inverted | None) -> dict[str, Any]:
    if inverted is None:
        return prompts_of(labels.of, recipe.model)
    prompt = inverted.fitted.prompt or ""
    for name, given in recipe.model.prompts.items():
        if given != prompt:
            problem = f"the embeddings were fitted with the prompt {prompt!r}, and work only with it"
            raise RequestError("model.prompts", {name: given}, problem, "Leave prompts out, or fit again with --condition.")
    return dict.fromkeys(labels.of, prompt)


def _refuse_unread(recipe: Recipe, outline: Denoiser) -> None:
    """Refuses prompts for a model that takes labels, so that no setting is silently ignored."""
    if outline.prompted:
        return
    for name in ("template", "class_pattern", "prompts"):
        if (given := getattr(recipe.model, name)) != ModelRequest.model_fields[name].get_default(call_default_factory=True):
            raise RequestError(f"model.{name}", given, "this model takes no prompts", "Leave it out.")


def _refuse_noised_labels(recipe: Recipe, index: int, method: str, outline: Denoiser) -> None:
    """Refuses noise on the condition where noise can't be put on what the network makes of its labels."""
    if not outline.label_embeddings:
        problem = (
            "handful does not know where this model embeds its labels" if outline.label_count else "this model is unconditional"
        )
        remedy = "Use another guidance, or a diffusers model that takes labels or prompts."
        raise RequestError(f"guidance[{index}]", method, f"{problem}, so there is nothing to put noise on", remedy)
    if recipe.model.compile:
        problem = f"{method} changes the network's embedding of labels while it runs, which a compiled network would ignore"
        raise RequestError("model.compile", True, problem, "Leave compile out.")


def _variance(recipe: Recipe, outline: Denoiser) -> str | None:
    asked = recipe.sampler
    if asked.name != "ddpm":
        return None
    if asked.variance == "learned" and not outline.learns_variance:
        raise RequestError("sampler.variance", "learned", "this model has not learned its variance", "Use small or large.")
    return asked.variance or ("learned" if outline.learns_variance else "small")


def _with_reduce(term: PotentialRequest, index: int, outline: Denoiser, exemplars: bool) -> PotentialRequest:
    """The term with its `reduce` decided, and refused where the images or latents do not divide by it."""
    reduce = term.reduce or (outline.preview_factor if exemplars else 1)
    if not exemplars and isinstance(outline, LatentDenoiser) and outline.is_linear(reduce):
        problem = "the linear map that replaces the decoder there is fitted to exemplars, and there are no images of them"
        remedy = "Give a folder of some (--exemplars DIR), or use reduce 1."
        raise RequestError(f"guidance[{index}].reduce", reduce, problem, remedy)
    averaged = outline.averaged(reduce) if isinstance(outline, LatentDenoiser) else reduce
    if any(side % averaged for side in outline.shape[1:]) or any(side % reduce for side in outline.image_shape[1:]):
        size = f"{outline.image_shape[1]} x {outline.image_shape[2]}"
        remedy = "Use a divisor of their sides, and of their latents', or leave it out."
        raise RequestError(f"guidance[{index}].reduce", reduce, f"images of {size} can't be shrunk by it", remedy)
    return term.model_copy(update={"reduce": reduce})
