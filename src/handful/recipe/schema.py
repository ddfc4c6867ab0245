"""What is asked for: the recipe of a data set, with every default written out.

A recipe is data: it loads no model and opens no file (`recipe_file.py` reads and writes it as YAML, `job.py` checks it
against the world). Together with the device it decides every byte of a run directory.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union

from pydantic import BeforeValidator, Field, JsonValue, SerializeAsAny, TypeAdapter, WrapValidator, model_validator
from typing_extensions import Self

from handful.errors import RequestError
from handful.errors import did_you_mean as did_you_mean
from handful.guidance import METHODS, request_of
from handful.guidance.base import Smoothing
from handful.guidance.method import FeaturesRequest, PotentialRequest, TermRequest, potentials
from handful.guidance.settings import Positive, Request, Text, Weight, checked
from handful.guidance.settings import dotted as dotted
from handful.zoo import EXEMPLARS


def _names(value: object) -> object:
    """Class names: `classes: [0, 1]` in YAML are numbers, and mean the folders "0" and "1"."""
    if isinstance(value, (list, tuple)):
        return tuple(str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in value)
    return value


ClassNames = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_names)]


@cache
def _methods(requests: tuple[type[TermRequest], ...]) -> TypeAdapter[TermRequest]:
    either: Any = Union[requests]  # noqa: UP007  # pyright: ignore[reportInvalidTypeArguments, reportInvalidTypeForm]
    union: Any = Annotated[either, Field(discriminator="method")]  # pyright: ignore[reportInvalidTypeForm]
    return TypeAdapter(union)


def _term(value: object, _: object) -> TermRequest:
    """A term of one of the methods that are listed now."""
    if isinstance(value, TermRequest):
        return value
    return _methods(tuple(map(request_of, METHODS))).validate_json(json.dumps(value), strict=True)


GuidanceRequest = Annotated[SerializeAsAny[TermRequest], WrapValidator(_term)]
Sampler = Literal["dpmpp_2m", "ddim", "ddpm", "heun", "lcm"]

# What `every` left open makes of a run: so many guided steps, or up to three more (docs/findings.md, section 6).
GUIDED_STEPS = 4
# What `features: auto` becomes, by model.
FEATURES_BY_MODEL = {"digits": "pixels", "mnist": "pixels", "cifar10": "cifar10-guide"}
# Chamfer by the small classifier's features turns images of small cohorts into patterns (docs/findings.md, section 11).
FEATURES_BY_METHOD = {("cifar10", "chamfer"): "pixels"}
AUTO_FEATURES = "dinov2"  # for every other model
# Only what differs from the defaults below; what a user states himself always wins. In pixels, which no gradient can fool,
# the cheap jacobian on every step is as good as the exact one (docs/findings.md).
_IN_PIXELS = {"jacobian": "gaussian", "every": 1}
# In a small network's features the smooth, cheap gradient is the one whose gain is real (section 9).
_SMOOTH = {"softplus": 3.0, "jacobian": "gaussian", "smoothing": Smoothing(shift=2)}
DEFAULTS_BY_FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "cifar10-guide": {
        "chamfer": {**_SMOOTH, "scale": 0.3, "normalize": "rms-image"},
        "energy": {**_SMOOTH, "scale": 0.3},
        "auto": {**_SMOOTH, "scale": 0.5},
    },
    "pixels": {
        # Without a margin images land on the exemplars; at 1 they copy no more than plain ones (docs/findings.md, section 2).
        "chamfer": {**_IN_PIXELS, "scale": 0.2, "margin": 1.0},
        "energy": {**_IN_PIXELS, "scale": 0.05},
        "auto": {**_IN_PIXELS, "scale": 0.1},
    },
}


_NAME_IT = "Name a model of the zoo, such as digits, or a model's directory (--model)."
_IMAGE: dict[str, JsonValue] = {
    "problem": "there is no such image format",
    "remedy": "Choose png, jpeg:QUALITY (1 to 100), webp:QUALITY or webp-lossless.",
}
_DEVICE: dict[str, JsonValue] = {"problem": "there is no such device", "remedy": "Choose auto, cpu, cuda, cuda:N or mps."}


Prompts = Annotated[tuple[Text, ...], Field(min_length=1)]


class LoraRequest(Request):
    """An addition to a model's networks, merged into them.

    Attributes:
        path: FILE.safetensors, or the directory that a training wrote it to.
        weight: Its strength; 1 adds it as trained.
    """

    path: Text
    weight: float = 1.0


class ModelRequest(Request):
    """Which pretrained model, its condition, and how it runs.

    Attributes:
        name: A name of the zoo (`digits`), a directory, a hub name, a single file, or `FILE.py:FUNCTION`.
        null_class: The label for "no class"; None takes the model's.
        classes: Names of the model's classes, by label; None takes the model's.
        labels: The model's label of a class: a number, the model's name of it, or an ImageNet synset (n02123045); or a file.
        resolution: [height, width] of the images; None takes the model's own.
        template: How a class name becomes a prompt, for models that take prompts: `a photo of a {}`, or with fields
            that class_pattern finds in the name, `{object} in {region}`.
        class_pattern: How a class name holds the template's fields, such as `{region}--{object}`.
        prompts: Prompts of single classes, over the template; a list of several is drawn from, for each image by its seed.
        negative_prompt: The prompt that cfg steers away from; empty for none.
        embedded_guidance: The scale that a guidance-distilled model (Flux) takes as input.
        without: Components of a pipeline not to load, such as text_encoder_3.
        preview_decoder: A tiny autoencoder that guidance decodes with where `reduce` is below the latents' factor.
        lora: Additions to the networks, by file and weight.
        embeddings: Textual inversion: words, and the file of each one's embedding.
        vae, scheduler: Another autoencoder, and another scheduler's levels, by directory or hub name.
        config: For a single file: the directory or hub name with the pipeline's configs.
        revision, variant: Of a hub name; of the weight files.
        trust_pickle: Run the code in a pickled network.
        device: `auto` (a CUDA device where there is one), `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: The precision of the networks. The sample itself is kept in float32.
        attention: An attention back end of diffusers (`set_attention_backend`); None takes its default.
        compile: Compile the denoising network by torch.compile.
        offload: Keep the parts of a pipeline on the CPU until they are needed: whole (`model`) or in pieces (`sequential`).
        vae_slicing, vae_tiling: Decode image by image, or tile by tile.
    """

    name: Annotated[str, Field(min_length=1, json_schema_extra={"missing": _NAME_IT})]
    null_class: Annotated[int, Field(ge=0)] | None = None
    classes: ClassNames | None = None
    labels: dict[str, int | str] = Field(default_factory=dict)
    resolution: tuple[Positive, Positive] | None = None
    template: Text = "a photo of a {}"
    class_pattern: Text | None = None
    prompts: dict[str, str | Prompts] = Field(default_factory=dict)
    negative_prompt: str = ""
    embedded_guidance: Weight = 3.5
    without: tuple[str, ...] = ()
    preview_decoder: Text | None = None
    lora: tuple[LoraRequest, ...] = ()
    embeddings: dict[str, str] | None = None
    vae: Text | None = None
    scheduler: Text | None = None
    config: Text | None = None
    revision: str | None = None
    variant: str | None = None
    trust_pickle: bool = False
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", json_schema_extra=_DEVICE)] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str | None = None
    compile: bool = False
    offload: Literal["none", "model", "sequential"] = "none"
    vae_slicing: bool = False
    vae_tiling: bool = False


class ExemplarsRequest(Request):
    """Which real images guide.

    Attributes:
        path: A folder with a folder of images per class; None guides without exemplars.
        k: How many exemplars of each class are drawn; None takes all.
        seed: The seed of the draw.
    """

    path: Text | None = None
    k: Positive | None = None
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, data: Any) -> Any:
        """Until the next release `per_class` is accepted for k."""
        if not isinstance(data, Mapping) or "per_class" not in data:
            return data
        if data.get("k") is not None:
            raise RequestError(
                "per_class", data["per_class"], "it is the former name of k, and k is given too", "Leave per_class out."
            )
        warnings.warn("exemplars.per_class is now called exemplars.k", FutureWarning, stacklevel=2)
        return {("k" if key == "per_class" else key): value for key, value in data.items() if key != "k"}

    @property
    def per_class(self) -> int | None:
        """The former name of k."""
        return self.k


class StartRequest(Request):
    """Where images start from, instead of noise: noised exemplars (SDEdit: Meng et al. 2022, arXiv 2108.01073).

    Attributes:
        from: The exemplars, as images; the images of a class are spread evenly over them.
        of: Whose exemplars: those of the image's own class, or of all others. From others' an image keeps the look (the
            pen, the proportions), and the model makes another class of it: more varied than its own few can be.
        depth: The share of the sampler's steps that is run: 1 is all of them, from nearly pure noise; near 0 the exemplars
            themselves come out. The steps, progress and `every` of guidance count on the part that is run.
    """

    source: Annotated[Literal["exemplars"], Field(alias="from")] = "exemplars"
    of: Literal["class", "others"] = "class"
    depth: Annotated[float, Field(gt=0, le=1)] = 0.5

    def as_text(self) -> str:
        return f"from {self.source}{' of other classes' if self.of == 'others' else ''}, depth {self.depth:g}"

    def steps_of(self, steps: int) -> int:
        """How many of the sampler's steps are run; at least one."""
        return max(1, round(self.depth * steps))


class MixRequest(Request):
    """One setting of a mixture: whole cohorts of each class are made by it.

    Attributes:
        share: Its part of the cohorts, relative to the other settings' shares.
        guidance, start: As in a recipe; by default no guidance, and noise.
    """

    share: Annotated[float, Field(gt=0)]
    guidance: tuple[GuidanceRequest, ...] = ()
    start: StartRequest | None = None


class SamplerRequest(Request):
    """How noise becomes images.

    Attributes:
        name: See `handful.core.samplers`.
        steps: Denoiser steps.
        spacing: How the levels are spaced; None takes the schedule's default.
        eta: Share of the ancestral noise, 0 to 1, ddim only.
        variance: Of the reverse steps, ddpm only: small, large or learned; None: learned where the model learned it.
        recurrence: How many times each step is made, ddim and ddpm only.
        clamp: Keep every denoised estimate inside the images' range [-1, 1]; None: where the model works on pixels.
    """

    name: Sampler = "dpmpp_2m"
    steps: Positive = 18
    spacing: str | None = None
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    variance: Literal["small", "large", "learned"] | None = None
    recurrence: Positive = 1
    clamp: bool | None = None


class OutputRequest(Request):
    """How the images are written.

    Attributes:
        format: `imagefolder`, `webdataset` or `parquet`; see `handful.runs.writers`.
        image: `png`, `jpeg:QUALITY`, `webp:QUALITY` or `webp-lossless`.
    """

    format: Literal["imagefolder", "webdataset", "parquet"] = "imagefolder"
    image: Annotated[str, Field(pattern=r"^(png|webp-lossless|(jpeg|webp):([1-9][0-9]?|100))$", json_schema_extra=_IMAGE)] = (
        "png"
    )


class Recipe(Request):
    """A data set to generate.

    Attributes:
        format: The version of the recipe's format.
        model: Which pretrained model.
        exemplars: Which real images guide.
        classes: Names of the classes to generate; None: those of the exemplars, else all that the model knows.
        per_class: Images to generate of each class; or by class, such as {cat: 500, dog: 200}, which names the classes too.
        counts: Images of single classes, instead of per_class; a mapping for per_class is stored here.
        cohort: How many images are guided together; a class's last cohort may be smaller.
        seed: The seed of all noise.
        sampler: How noise becomes images.
        start: Where images start from; None: noise.
        guidance: The terms; their shifts add up. None: chamfer where there are exemplars, else no guidance.
        mix: Two or more settings, each with its share of every class's cohorts, instead of guidance and start.
        chunk: At most this many images at once through the networks; None: the whole cohort, halved when memory is short.
        output: How the images are written.
    """

    format: Literal[1] = 1
    model: Annotated[ModelRequest, Field(json_schema_extra={"missing": _NAME_IT})]
    exemplars: ExemplarsRequest = ExemplarsRequest()
    classes: ClassNames | None = None
    per_class: Positive = 64
    counts: dict[str, Positive] = Field(default_factory=dict)
    cohort: Positive = 64
    seed: int = 0
    sampler: SamplerRequest = SamplerRequest()
    start: StartRequest | None = None
    guidance: tuple[GuidanceRequest, ...] | None = None
    mix: Annotated[tuple[MixRequest, ...], Field(min_length=2)] | None = None
    chunk: Positive | None = None
    output: OutputRequest = OutputRequest()

    def images_of(self, class_name: str) -> int:
        """How many images of a class are asked for."""
        return self.counts.get(class_name, self.per_class)

    def require_equal_counts(self, doing: str) -> None:
        """Refuses counts by class where sets of one size are made."""
        if self.counts:
            told = ", ".join(f"{name}={count}" for name, count in list(self.counts.items())[:5])
            problem = f"{doing} makes as many images of each class"
            raise RequestError("per_class", told, problem, "Give one number for all classes, such as per_class: 64.")

    @model_validator(mode="after")
    def _one_or_mixed(self) -> Self:
        for name in ("guidance", "start") if self.mix else ():
            if getattr(self, name):
                raise RequestError(
                    "mix", len(self.mix or ()), f"{name} is given outside mix too", f"Give {name} only inside mix."
                )
        return self

    @property
    def parts(self) -> list[Recipe]:
        """The recipe of each setting of a mixture; the recipe itself where there is none."""
        ways = [{"guidance": each.guidance, "start": each.start, "mix": None} for each in self.mix or ()]
        return [self.model_copy(update=way) for way in ways] or [self]

    @property
    def steps_run(self) -> int:
        """The steps that a run makes."""
        return self.start.steps_of(self.sampler.steps) if self.start else self.sampler.steps

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and texts, in the order of the fields."""
        return self.model_dump(mode="json")


def classes_counted(counts: Mapping[str, Any], classes: Sequence[str] | None) -> Sequence[str]:
    """The classes of counts by class: those that are stated, or else those that are counted.

    Raises:
        RequestError: If a class is counted that is not among the stated ones.
    """
    for name in counts if classes else ():
        if name not in (classes or ()):
            problem = f"{name} is not among the classes to generate"
            raise RequestError("per_class", f"{name}={counts[name]}", problem, f"Add {name} to classes, or leave it out.")
    return classes or list(counts)


def recipe_from(data: Mapping[str, Any]) -> Recipe:
    """The recipe of plain data; see `checked`."""
    if isinstance(counts := data.get("per_class"), Mapping):
        data = {**data, "counts": counts, "classes": classes_counted(counts, data.get("classes"))}
        del data["per_class"]
    return checked(Recipe, data, "recipe")


def with_new_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """Stored recipe data as this version writes it: keys of before renamed, newer fields at their defaults."""
    try:
        return recipe_from(data).as_dict()
    except RequestError:  # of a version that knew other fields: it is compared unchanged
        return dict(data)


def with_defaults(recipe: Recipe, steps: int | None = None) -> tuple[Recipe, list[str]]:
    """Replaces what is automatic and needs no model to decide: guidance, and each term's `features: auto`.

    Args:
        steps: Of the run, where they are not the recipe's own (`steps_run`).

    Returns:
        The recipe, and a sentence for each choice that was made.
    """
    notes: list[str] = []
    guidance = recipe.guidance
    if guidance is None:
        guidance = (_term({"method": "chamfer"}, None),) if recipe.exemplars.path else ()
        chamfer = "chamfer (images are pulled towards the exemplars), as none is named"
        notes.append(f"guidance: {chamfer if guidance else 'none, as there are no exemplars'}")
    chosen = list(guidance)
    for index, term in potentials(guidance):
        chosen[index] = done = for_model(term, recipe.model.name, steps or recipe.steps_run, _are_features(recipe))
        if done.advice:
            notes.append(f"guidance[{index}].{done.advice}")
        if isinstance(done, FeaturesRequest) and done.features != getattr(term, "features", None):
            notes.append(
                f"guidance[{index}].features: {done.features}, as none are named; they compare images with the exemplars"
            )
        margin = getattr(done, "margin", 0)
        if margin and "margin" not in term.model_fields_set:
            notes.append(f"guidance[{index}].margin: {margin:g}, against copies of the exemplars; 0 is the paper's")
    return recipe.model_copy(update={"guidance": tuple(chosen)}), notes


Term = TypeVar("Term", bound=PotentialRequest)


def _are_features(recipe: Recipe) -> bool:
    """Whether the exemplars are given as features alone: pixels can't compare them."""
    path = recipe.exemplars.path or ""
    return path.endswith(".safetensors") or path in EXEMPLARS


def for_model(term: Term, model: str, steps: int, without_images: bool = False) -> Term:
    """Fills in what the term leaves open but `reduce`: features by the model, the rest by the features and the steps.

    Args:
        without_images: The exemplars are given as features alone.
    """
    if isinstance(term, FeaturesRequest):
        features = term.features
        if features == "auto":
            features = FEATURES_BY_MODEL.get(model, AUTO_FEATURES)
            features = features if without_images else FEATURES_BY_METHOD.get((model, term.method), features)
        own = DEFAULTS_BY_FEATURES.get(features, {}).get(term.method, {})
        update = {key: value for key, value in own.items() if key not in term.model_fields_set}
        term = term.model_copy(update={**update, "features": features})
    every = term.every or max(1, steps // GUIDED_STEPS)
    can_hold = term.rule == "shift" and term.normalize in ("rms", "rms-image")
    hold = (every > 1 and can_hold) if term.hold is None else term.hold
    return term.model_copy(update={"every": every, "hold": hold})
