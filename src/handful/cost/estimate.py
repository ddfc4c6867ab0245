"""What a recipe costs before anything runs: operations an image, parameters and peak memory, beside plain sampling's and
classifier-free guidance's.

Nothing is derived twice: the recipe's own sampler says at which levels it asks its denoiser, and `Guided` itself, with the
recipe's own terms, is run once for every kind of step (which terms act there) on the meta device, where tensors have shapes
and no numbers. So no weights are read, no exemplar is opened and nothing is computed. operations.py says what is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from handful.core.denoiser import NetworkDenoiser
from handful.core.noise import Levels
from handful.cost.operations import Count
from handful.cost.peak import peak_of
from handful.cost.workload import META, Way, Work, mean_way, size_of, walked_by
from handful.cost.workload import evaluated as evaluated
from handful.errors import counted
from handful.guidance.cfg import CFGRequest
from handful.guidance.method import Requests
from handful.models import skeleton
from handful.models.architectures import packaged_configs
from handful.models.latent import LatentDenoiser
from handful.models.prompts import ENCODERS
from handful.models.source import Source, find_source
from handful.recipe.extractors import extractors_wanted, load_for
from handful.recipe.inverting import read_inversion
from handful.recipe.resolve import complete, model_options, resolve
from handful.recipe.schema import Recipe

UNKNOWN_EXEMPLARS = 32  # of each class, where the recipe takes all there are; it hardly matters
T5_TOKENS = {"StableDiffusion3Pipeline": 256, "FluxPipeline": 512}  # what these pipelines pad a prompt to


@dataclass(frozen=True)
class Outlined:
    """A recipe and its model without weights, on the meta device.

    Attributes:
        recipe: With every automatic choice replaced by what it became.
        prompt_flops, encoders: Operations for one prompt, and parameters, of the text encoders.
        notes: What was concluded, in words for the user.
    """

    recipe: Recipe
    work: Work
    levels: Levels
    prompt_flops: dict[str, float]
    encoders: dict[str, int]
    notes: list[str]

    def way(self, guidance: Requests) -> Way:
        """What sampling with these terms costs."""
        return self.work.way(guidance, lambda live: peak_of(live, self.work, guidance, self.recipe.model, self.encoders))


@dataclass(frozen=True)
class Cost:
    """What a recipe costs, and what its model would without guidance and with classifier-free guidance alone.

    Attributes:
        recipe, plain, cfg: The three ways, by the same sampler and steps; a start from exemplars runs fewer of them.
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
    """Counts what a recipe costs, without weights and without computing; of a mixture the mean over its settings by share.

    Plain sampling and classifier-free guidance start from noise, also where the recipe starts from exemplars.

    Raises:
        RequestError: If the recipe can't be run, or the model is not known here and its configs can't be read.
    """
    each = [outline(part) for part in recipe.parts]
    shares = [part.share for part in recipe.mix or ()] or [1.0]
    first = each[0]
    notes = [f"mix[{place}].{note}" if recipe.mix else note for place, part in enumerate(each) for note in part.notes]
    unstarted = first
    if any(part.start for part in recipe.parts):
        unstarted = outline(from_noise(recipe))
        notes.append(f"plain sampling and CFG are counted from noise, with all {counted(recipe.sampler.steps, 'step')}")
    denoiser = first.work.denoiser
    networks = {name: size_of(network) for name, network in denoiser.named_children()}
    once, guided = dict(first.prompt_flops), list[tuple[str, int]]()
    for part in each:
        work, guidance = part.work, part.recipe.guidance or ()
        networks |= {f"features: {name}": size_of(looks) for name, looks in work.extractors.items() if size_of(looks)}
        once = work.exemplar_flops(guidance) | once
        guided += [(term.method, count) for term, count in zip(guidance, work.guided(guidance), strict=True)]
    return Cost(
        mean_way([part.way(part.recipe.guidance or ()) for part in each], shares),
        unstarted.way(()),
        unstarted.way((CFGRequest(),)),
        first.recipe.model.name,
        (denoiser.image_shape[1], denoiser.image_shape[2]),
        first.recipe.sampler.name,
        unstarted.levels.steps,
        first.work.cohort,
        recipe.chunk,
        denoiser.has_null,
        guided,
        networks | first.encoders,
        once,
        notes,
    )


def from_noise(recipe: Recipe) -> Recipe:
    """The recipe without guidance, from noise."""
    return recipe.model_copy(update={"guidance": (), "start": None, "mix": None})


def outline(recipe: Recipe) -> Outlined:
    """A recipe's work without weights, exemplars and computing.

    Raises:
        RequestError: As `cost_of`.
    """
    inverted = read_inversion(recipe.guidance or ())
    recipe, notes = complete(recipe, inverted)
    source = None if recipe.model.revision else packaged_configs(recipe.model.name)
    denoiser = skeleton(source or recipe.model.name, model_options(recipe))
    recipe = recipe if inverted else _for_any_class(recipe, denoiser)
    resolved = resolve(recipe, denoiser, None, inverted)
    recipe = resolved.recipe
    guidance = recipe.guidance or ()
    denoiser.place(META, getattr(torch, recipe.model.dtype))
    if isinstance(denoiser, LatentDenoiser):
        vae: Any = denoiser.vae
        for asked, method in ((recipe.model.vae_slicing, "enable_slicing"), (recipe.model.vae_tiling, "enable_tiling")):
            if asked:
                getattr(vae, method)()
        # stands for the map that a run fits to its exemplars
        denoiser.linear_preview = torch.zeros(denoiser.image_shape[0], denoiser.shape[0] + 1, device=META)
    classes = list(resolved.labels.of)
    extractors = {key: load_for(looks, classes, meta=True).to(META) for key, looks in extractors_wanted(guidance).items()}
    work = Work(
        denoiser,
        extractors,
        walked_by(resolved.levels, recipe),
        min(recipe.cohort, recipe.per_class),
        recipe.chunk,
        recipe.exemplars.k or UNKNOWN_EXEMPLARS,
        inverted,
        recipe.start is not None,
    )
    told, encoders = text_encoders(source or find_source(recipe.model.name), recipe.model.without)
    return Outlined(recipe, work, resolved.levels, told, encoders, notes)


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
        flops[name], sizes[name] = float(count.total), size_of(encoder)
    return flops, sizes


def _for_any_class(recipe: Recipe, denoiser: NetworkDenoiser) -> Recipe:
    """The recipe with classes of any name: only the exemplars' folder knows them, and all cost the same."""
    if denoiser.prompted:
        model = {"prompts": {"image": "image"}, "classes": None}
        return recipe.model_copy(update={"classes": ("image",), "model": recipe.model.model_copy(update=model)})
    if not (denoiser.classes or recipe.model.classes):
        if denoiser.null_class is None and denoiser.label_count:
            denoiser.null_class = denoiser.label_count - 1  # as `assign_labels` concludes from the folders
        return recipe.model_copy(update={"classes": None})
    return recipe
