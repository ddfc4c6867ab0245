"""Which sets a sweep generates, in which order, and the recipe of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handful.data.images import image_folder
from handful.data.shared_exemplars import ExemplarFeatures, features_file
from handful.errors import RequestError
from handful.guidance.method import named, needing
from handful.recipe.inverting import read_inversion
from handful.recipe.resolve import complete
from handful.recipe.schema import ExemplarsRequest, GuidanceRequest, Recipe, SamplerRequest, did_you_mean
from handful.sweep.request import MethodRequest, SweepRequest, check_request


@dataclass(frozen=True, order=True)
class Setting:
    """A method at a scale, with k exemplars of each class (0: none)."""

    method: str
    scale: float
    k: int

    def __str__(self) -> str:
        return self.method + (f" {self.scale:g}" if self.scale else "") + (f" k={self.k}" if self.k else "")

    @property
    def folder(self) -> str:
        return f"{self.method}/scale-{self.scale!r}" + (f"-k-{self.k}" if self.k else "")


@dataclass(frozen=True)
class PlannedSet:
    """One set to generate: a setting at a seed, as an ordinary recipe."""

    setting: Setting
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Its run directory, relative to the sweep's."""
        return f"sets/{self.setting.folder}/seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.setting}, seed {self.seed}"


def completed(request: SweepRequest) -> SweepRequest:
    """The request with all that is automatic replaced by what it becomes: classes by the exemplars', each term's defaults.

    Raises:
        RequestError: Naming the dotted field whose settings contradict each other.
    """
    check_request(request)
    asked = request.recipe.exemplars
    k = request.k or ((asked.k,) if asked.k else None)
    # what each set has of its own
    recipe = request.recipe.model_copy(update={"guidance": (), "seed": 0, "exemplars": ExemplarsRequest(path=asked.path)})
    if recipe.classes is None and asked.path is not None:
        file = features_file(asked.path)
        found = ExemplarFeatures.load(file).counts if file else image_folder(asked.path, field="recipe.exemplars.path")
        recipe = recipe.model_copy(update={"classes": tuple(found)})
    methods = {}
    for name, method in request.methods.items():
        asked = _with_exemplars(recipe, method, 1, 0).model_copy(
            update={"guidance": method.guidance, "sampler": _sampler(recipe, method)}
        )
        with named(f"methods.{name}"):
            done, _ = complete(asked, read_inversion(asked.guidance or ()))
        methods[name] = method.model_copy(update={"guidance": done.guidance, "sampler": asked.sampler})
    return request.model_copy(update={"recipe": recipe, "methods": methods, "k": k})


def planned_sets(request: SweepRequest) -> list[PlannedSet]:
    """All sets, seed by seed, the baseline first in each: so that a sweep has something to compare early.

    Args:
        request: From `completed`.
    """
    names = [request.baseline, *(name for name in request.methods if name != request.baseline)]
    sets = []
    for seed in request.seeds:
        for name in names:
            method = request.methods[name]
            for k in _numbers(request, name):
                for scale in method.scales or (_own_scale(method),):
                    recipe = _with_exemplars(request.recipe, method, k, seed).model_copy(
                        update={"seed": seed, "guidance": _scaled(method, scale), "sampler": _sampler(request.recipe, method)}
                    )
                    sets.append(PlannedSet(Setting(name, scale, k), seed, recipe))
    return sets


def chosen_methods(request: SweepRequest, only: Sequence[str] | None) -> set[str]:
    """Names of the methods to work on."""
    for name in only or ():
        if name not in request.methods:
            raise RequestError("--only", name, "there is no such method", did_you_mean(name, request.methods, "Methods"))
    return set(request.methods if only is None else only)


def _numbers(request: SweepRequest, name: str) -> tuple[int, ...]:
    """k of a method: 0 where no exemplars guide it."""
    method = request.methods[name]
    if method.k is not None:
        return method.k
    guided = needing(method.guidance, "exemplars")
    if not guided:
        return (0,)
    if request.recipe.exemplars.path is None:
        problem = f"{guided[0][1].method} guidance (methods.{name}) needs exemplars"
        raise RequestError("recipe.exemplars.path", None, problem, "Give a folder with a folder of images per class.")
    if request.k is None:
        raise RequestError(
            "k", None, f"methods.{name} is guided by exemplars, and their number is missing", "State k, such as k: [32]."
        )
    if name == request.baseline and len(request.k) > 1:
        raise RequestError(
            "baseline", name, "it has several k, but one setting is needed", f"State methods.{name}.k, or name another method."
        )
    return request.k


def _with_exemplars(recipe: Recipe, method: MethodRequest, k: int, seed: int) -> Recipe:
    """The recipe with k exemplars drawn by the seed; without any for a method that none guide."""
    path = recipe.exemplars.path
    if method.k is None and not needing(method.guidance, "exemplars"):
        drawn = ExemplarsRequest()
    elif path is not None and features_file(path) is not None:  # its draw was made with a seed of its own
        drawn = ExemplarsRequest(path=path, k=k)
    else:
        drawn = ExemplarsRequest(path=path, k=k, seed=seed)
    return recipe.model_copy(update={"exemplars": drawn})


def _own_scale(method: MethodRequest) -> float:
    return method.guidance[method.term].scale if method.guidance else 0.0


def _scaled(method: MethodRequest, scale: float) -> tuple[GuidanceRequest, ...]:
    return tuple(
        term.model_copy(update={"scale": scale}) if place == method.term else term for place, term in enumerate(method.guidance)
    )


def _sampler(recipe: Recipe, method: MethodRequest) -> SamplerRequest:
    """The recipe's sampler, with what the method says of its own over it."""
    if method.sampler is None:
        return recipe.sampler
    own = {name: getattr(method.sampler, name) for name in method.sampler.model_fields_set}
    return recipe.sampler.model_copy(update=own)
