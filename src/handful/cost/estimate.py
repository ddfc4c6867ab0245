"""What a recipe costs before anything runs: operations an image, parameters and peak memory, beside plain sampling's and
classifier-free guidance's.

Nothing is derived twice: the recipe's own sampler says at which levels it asks its denoiser, and `Guided` itself, with the
recipe's own terms, is run once for every kind of step (which terms act there) on the meta device, where tensors have shapes
and no numbers. So no weights are read, no exemplar is opened and nothing is computed. What is counted is told in flops.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from handful.core.denoiser import Around, Condition, Denoiser, NetworkDenoiser
from handful.core.noise import Level, Levels
from handful.core.samplers import SAMPLERS
from handful.cost.operations import OTHER, Count
from handful.errors import HandfulError, RequestError, first_line
from handful.features.extractor import FeatureExtractor
from handful.guidance import Guidance, Guided
from handful.guidance.cfg import CFGRequest
from handful.guidance.method import Context, Requests, View, make_terms, views
from handful.models import skeleton
from handful.models.architectures import packaged_configs
from handful.models.latent import LatentDenoiser
from handful.models.prompts import ENCODERS
from handful.models.source import Source, find_source
from handful.recipe.extractors import extractors_wanted, load_for
from handful.recipe.inverting import Inverted, read_inversion
from handful.recipe.resolve import complete, model_options, sampler_options, settle
from handful.recipe.schema import Recipe

META = torch.device("meta")
UNKNOWN_EXEMPLARS = 32  # of each class, where the recipe takes all there are; it hardly matters
# Where operations go; a part that goes back is its gradient towards its input, as weights are frozen.
PARTS = ("denoiser", "denoiser backward", "preview", "preview backward", "features", "features backward", OTHER, "decode")
T5_TOKENS = {"StableDiffusion3Pipeline": 256, "FluxPipeline": 512}  # what these pipelines pad a prompt to


@dataclass(frozen=True)
class Way:
    """What one way of sampling costs.

    Attributes:
        flops_per_image: Floating-point operations; a multiply-add is 2.
        parts: The same by part; see `PARTS`.
        evaluations: How often an image goes forward through the denoiser.
        parameters: Of all networks that sampling needs.
        peak_bytes: Weights, and the most that tensors hold at once, for a whole cohort.
    """

    flops_per_image: float
    parts: dict[str, float]
    evaluations: float
    parameters: int
    peak_bytes: int


@dataclass(frozen=True)
class Cost:
    """What a recipe costs, and what its model would without guidance and with classifier-free guidance alone.

    Attributes:
        recipe, plain, cfg: The three ways, by the same sampler and steps.
        model, resolution, sampler, steps, cohort, chunk: What was counted; the cohort as `Recipe.cohort` says.
        null_condition: Whether the model has one; if not, cfg is what it would cost.
        guided: For each term its method, and the number of evaluations at which it acts.
        networks: Parameters by network, those of the text encoders too.
        once_per_class: Operations that come once a class, not once an image: prompts and exemplars.
        notes: What was concluded, in words for the user.
    """

    recipe: Way
    plain: Way
    cfg: Way
    model: str
    resolution: tuple[int, int]
    sampler: str
    steps: int
    cohort: int
    chunk: int | None
    null_condition: bool
    guided: list[tuple[str, int]]
    networks: dict[str, int]
    once_per_class: dict[str, float]
    notes: list[str]

    @property
    def ratio_to_cfg(self) -> float:
        """Operations of the recipe over classifier-free guidance's."""
        return self.recipe.flops_per_image / self.cfg.flops_per_image

    @property
    def ratio_to_plain(self) -> float:
        """Operations of the recipe over plain sampling's."""
        return self.recipe.flops_per_image / self.plain.flops_per_image

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the recipe's own figures on top, the others' below."""
        told = asdict(self)
        return {**told.pop("recipe"), "ratio_to_cfg": self.ratio_to_cfg, "ratio_to_plain": self.ratio_to_plain, **told}


def cost_of(recipe: Recipe) -> Cost:
    """Counts what a recipe costs, without weights and without computing.

    Raises:
        RequestError: If the recipe can't be run, or the model is not known here and its configs can't be read.
    """
    inverted = read_inversion(recipe.guidance or ())
    recipe, notes = complete(recipe, inverted)
    source = None if recipe.model.revision else packaged_configs(recipe.model.name)
    denoiser = skeleton(source or recipe.model.name, model_options(recipe))
    recipe = recipe if inverted else _for_any_class(recipe, denoiser)
    settled = settle(recipe, denoiser, None, inverted)
    recipe = settled.recipe
    guidance = recipe.guidance or ()
    denoiser.place(META, getattr(torch, recipe.model.dtype))
    for asked, method in ((recipe.model.vae_slicing, "enable_slicing"), (recipe.model.vae_tiling, "enable_tiling")):
        if asked and isinstance(denoiser, LatentDenoiser):
            getattr(denoiser.vae, method)()
    if isinstance(denoiser, LatentDenoiser):  # stands for the map that a run fits to its exemplars
        denoiser.linear_preview = torch.zeros(denoiser.image_shape[0], denoiser.shape[0] + 1, device=META)
    classes = list(settled.labels.of)
    extractors = {key: load_for(looks, classes, meta=True).to(META) for key, looks in extractors_wanted(guidance).items()}
    work = _Work(
        denoiser,
        extractors,
        _walked(settled.levels, recipe),
        min(recipe.cohort, recipe.per_class),
        recipe.chunk,
        recipe.exemplars.k or UNKNOWN_EXEMPLARS,
        inverted,
        recipe.start is not None,
    )
    told, encoders = text_encoders(source or find_source(recipe.model.name), recipe.model.without)
    networks = {name: _size(network) for name, network in denoiser.named_children()}
    networks |= {f"features: {name}": _size(extractor) for name, extractor in extractors.items() if _size(extractor)}
    return Cost(
        work.way(guidance),
        work.way(()),
        work.way((CFGRequest(),)),
        recipe.model.name,
        (denoiser.image_shape[1], denoiser.image_shape[2]),
        recipe.sampler.name,
        settled.levels.steps,
        work.cohort,
        recipe.chunk,
        denoiser.has_null,
        [(term.method, count) for term, count in zip(guidance, work.guided(guidance), strict=True)],
        networks | encoders,
        work.exemplar_flops(guidance) | told,
        notes,
    )


def evaluated(levels: Levels, recipe: Recipe) -> list[Level]:
    """Every level at which the recipe's sampler asks its denoiser, in order: the sampler is run on one number."""
    return [level for level, _ in _walked(levels, recipe)]


def _walked(levels: Levels, recipe: Recipe) -> list[tuple[Level, bool]]:
    """The levels of `evaluated`, each with whether the sampler entered a step there (Heun's second evaluation does not)."""
    recorder = _Recorder(levels)
    asked = recipe.sampler
    options = sampler_options(asked, lambda: torch.zeros(1, 1, 1, 1))
    SAMPLERS[asked.name](recorder, torch.zeros(1, 1, 1, 1), levels, Condition(), **options)
    return recorder.asked


@torch.no_grad()
def text_encoders(source: Source | None, without: Sequence[str] = ()) -> tuple[dict[str, float], dict[str, int]]:
    """Operations for one prompt, and parameters, of each of a pipeline's text encoders whose configs are known.

    Args:
        source: The pipeline's files; None knows nothing.
        without: Names of components that are left out.
    """
    import transformers

    flops: dict[str, float] = {}
    sizes: dict[str, int] = {}
    if source is None or source.file is not None or source.name.partition(":")[0].endswith(".py"):
        return flops, sizes
    index = source.read_json("model_index.json") or {}
    kind = str(index.get("_class_name"))
    for name in ENCODERS:
        config = source.read_json(f"{name}/config.json") if name in index and name not in without else None
        cls: Any = getattr(transformers, (config or {}).get("architectures", [""])[0], None)
        if config is None or cls is None:
            continue
        made = cls.config_class(**{key: value for key, value in config.items() if key not in ("architectures", "model_type")})
        with META:
            encoder = cls(made).eval()
            tokens = torch.zeros(1, T5_TOKENS.get(kind, 77) if config.get("model_type") == "t5" else 77, dtype=torch.int64)
        with Count() as count:
            encoder(tokens)
        flops[name], sizes[name] = float(count.total), _size(encoder)
    return flops, sizes


@dataclass(frozen=True)
class _Work:
    """What the ways of sampling share.

    Attributes:
        denoiser: On the meta device.
        extractors: By name, there too.
        walked: Every level at which the sampler asks, and whether it entered a step there.
        cohort, chunk: As in the recipe.
        exemplars: Of one class.
        inverted: For guidance by inversion.
        started: Whether images start from exemplars.
    """

    denoiser: NetworkDenoiser
    extractors: Mapping[str, FeatureExtractor]
    walked: list[tuple[Level, bool]]
    cohort: int
    chunk: int | None
    exemplars: int
    inverted: Inverted | None = None
    started: bool = False

    @torch.no_grad()
    def way(self, guidance: Requests) -> Way:
        """What sampling a cohort with these terms costs."""
        count = Count()
        counted, terms = _Counted(self.denoiser, count), self._terms(guidance, count)
        kinds: dict[tuple[bool, ...], list[Level]] = {}
        for level, entered in self.walked:
            kinds.setdefault((entered, *(term.strength(level) > 0 for term in terms)), []).append(level)
        flops, evaluations = Counter[str](), 0
        for (entered, *_), levels in kinds.items():
            count.flops.clear()
            counted.images = 0
            with count:
                guided, x = Guided(counted, terms, self.chunk), self._empty(self.denoiser.shape)
                if entered:
                    guided.moved_before(x, levels[0], self._condition)
                guided(x, levels[0], self._condition)
            flops.update({part: each * len(levels) for part, each in count.flops.items()})
            evaluations += counted.images * len(levels)
        count.flops.clear()
        with count:
            torch.cat([counted.decode(part) for part in self._empty(self.denoiser.shape).split(self.chunk or self.cohort)])
        flops.update(count.flops)
        networks = [self.denoiser, *(self.extractors[name] for name in extractors_wanted(guidance))]
        return Way(
            flops.total() / self.cohort,
            {part: flops[part] / self.cohort for part in PARTS if flops[part]},
            evaluations / self.cohort,
            sum(map(_size, networks)),
            sum(map(_bytes, networks)) + count.peak,
        )

    def guided(self, guidance: Requests) -> list[int]:
        """For each term the number of evaluations at which it acts."""
        return [sum(term.strength(level) > 0 for level, _ in self.walked) for term in self._terms(guidance, Count())]

    @torch.no_grad()
    def exemplar_flops(self, guidance: Requests) -> dict[str, float]:
        """Operations for one class's exemplars: their features, and their latents where the linear preview is fitted."""
        told: dict[str, float] = {}
        for name, reduce in views(guidance):
            with Count() as count:
                self._features(name, reduce)
            if count.total:
                told[f"features: {name}, 1/{reduce} size" if reduce > 1 else f"features: {name}"] = float(
                    self.exemplars * count.total
                )
        denoiser = self.denoiser
        if isinstance(denoiser, LatentDenoiser) and (
            self.started or any(denoiser.is_linear(reduce) for _, reduce in views(guidance))
        ):
            with Count() as count:
                self.denoiser.encode(self._empty(self.denoiser.image_shape, 1))
            if count.total:
                told["encoding exemplars"] = float(self.exemplars * count.total)
        return told

    def _terms(self, guidance: Requests, count: Count) -> list[Guidance]:
        """The terms, whose extractors' work is counted apart."""
        features: dict[View, Tensor] = {}
        with torch.no_grad():
            for name, reduce in views(guidance):
                features[name, reduce] = self._features(name, reduce).expand(self.exemplars, -1)
        counted: Any = {name: _CountedExtractor(extractor, count) for name, extractor in self.extractors.items()}
        embeddings = self.inverted and self.inverted.embeddings
        context = Context(counted, features, range(self.cohort), levels=self.denoiser.levels, embeddings=embeddings or None)
        return make_terms(guidance, context)

    def _features(self, name: str, reduce: int) -> Tensor:
        """Features (1, D) of an image as guidance looks at it."""
        channels, height, width = self.denoiser.image_shape
        try:
            return self.extractors[name](self._empty((channels, height // reduce, width // reduce), 1))
        except HandfulError:
            raise
        except Exception as error:  # a network of the user's own may raise anything
            raise RequestError(
                "features",
                name,
                f"it can't be counted on images of {self.denoiser.image_shape} without computing ({first_line(error)})",
                "Use another extractor.",
            ) from error

    @cached_property
    def _condition(self) -> Condition:
        """What the network is told: of any class, as none costs more than another."""
        asked: Any = [""] * self.cohort if self.denoiser.prompted else [0] * self.cohort
        condition = self.denoiser.condition(asked)
        if self.denoiser.has_null:
            return condition
        return _Alone(condition.labels, condition.null_label, condition.embeddings, condition.null_embeddings)

    def _empty(self, shape: tuple[int, int, int], n: int | None = None) -> Tensor:
        return torch.empty(n or self.cohort, *shape, device=META)


class _Alone(Condition):
    """A condition that stands for the null condition too, where there is none: to count what one would cost."""

    def null(self) -> Condition:
        return self


class _Recorder(Denoiser):
    """Notes at which levels it is asked, and whether a step was entered before."""

    def __init__(self, levels: Levels) -> None:
        super().__init__()
        self.shape = (1, 1, 1)
        self.asked: list[tuple[Level, bool]] = []
        self._entered = False

    def enter(self, x: Tensor, levels: Levels, index: int, condition: Condition) -> Tensor:
        self._entered = True
        return x

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        self.asked.append((level, self._entered))
        self._entered = False
        return x_t


class _Counted(Around):
    """A denoiser whose parts are counted apart.

    Attributes:
        images: How many have gone forward through it.
    """

    def __init__(self, denoiser: Denoiser, count: Count) -> None:
        super().__init__(denoiser)
        self.count, self.images = count, 0

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        self.images += len(x_t)
        return self.count.through("denoiser", lambda x: self.denoiser(x, level, condition), x_t)

    def preview(self, x0: Tensor, reduce: int = 1) -> Tensor:
        return self.count.through("preview", lambda x: self.denoiser.preview(x, reduce), x0)

    def decode(self, x0: Tensor) -> Tensor:
        return self.count.through("decode", self.denoiser.decode, x0)


class _CountedExtractor(nn.Module):
    """An extractor whose work is counted apart."""

    def __init__(self, extractor: FeatureExtractor, count: Count) -> None:
        super().__init__()
        self.extractor, self.count, self.name = extractor, count, extractor.name
        self.is_classifier, self.network = extractor.is_classifier, _CountedNetwork(extractor.network, count)

    def forward(self, images: Tensor) -> Tensor:
        return self.count.through("features", self.extractor, images)

    def logits(self, images: Tensor) -> Tensor:
        return self.count.through("features", self.extractor.logits, images)


class _CountedNetwork(nn.Module):
    """A classifier of noisy images, counted as features."""

    def __init__(self, network: nn.Module, count: Count) -> None:
        super().__init__()
        self.network, self.count = network, count

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.count.through("features", lambda images: self.network(images, time), x)


def _for_any_class(recipe: Recipe, denoiser: NetworkDenoiser) -> Recipe:
    """The recipe without what only its exemplars' folder could tell of classes: none costs more than another."""
    if denoiser.prompted:
        model = {"prompts": {"image": "image"}, "classes": None}
        return recipe.model_copy(update={"classes": ("image",), "model": recipe.model.model_copy(update=model)})
    if not (denoiser.classes or recipe.model.classes):
        if denoiser.null_class is None and denoiser.label_count:
            denoiser.null_class = denoiser.label_count - 1  # as `assign_labels` concludes from the folders
        return recipe.model_copy(update={"classes": None})
    return recipe


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _bytes(network: nn.Module) -> int:
    held = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
