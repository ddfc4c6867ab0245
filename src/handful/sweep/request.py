"""What is asked of a sweep: methods x scales x k x seeds, and how they are compared. Data alone, without torch.

Relative paths in a sweep's YAML file are relative to that file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from handful.errors import RequestError, did_you_mean
from handful.guidance.settings import Positive, Request, Text, Weight, checked
from handful.recipe.file import anchored, anchored_extractor, overridden, plain_mapping, read_mapping
from handful.recipe.schema import GuidanceRequest, Recipe, SamplerRequest
from handful.sweep.columns import numbers, robust

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # of a method; it names a folder
_REMEDY = "Give a sweep's YAML file (recipes/sweeps/digits.yaml is one)."

Share = Annotated[float, Field(gt=0, lt=1)]


class MethodRequest(Request):
    """One way to guide, at several scales and with several numbers of exemplars.

    Attributes:
        scales: Each replaces the scale of one term; None: that term's own scale, or its default.
        term: Which term's, counted from 0.
        k: Exemplars of each class; None: the sweep's, if a term is guided by exemplars, else none.
        sampler: What differs from the recipe's sampler.
    """

    guidance: tuple[GuidanceRequest, ...]
    scales: Annotated[tuple[Weight, ...], Field(min_length=1)] | None = None
    term: Annotated[int, Field(ge=0)] = 0
    k: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    sampler: SamplerRequest | None = None


class UtilityRequest(Request):
    """How downstream accuracy is measured; see `handful.judge.utility`.

    Attributes:
        test: Real images to test on, a folder per class; None: those of `real`.
        steps: Of the classifier's training.
        seeds: So many classifiers are trained on each set.
        augment, flip: Of its training images: shifted; mirrored.
    """

    test: Text | None = None
    steps: Annotated[int, Field(ge=10)] = 400
    seeds: Positive = 2
    augment: bool = True
    flip: bool = False


class SweepRequest(Request):
    """A sweep.

    Attributes:
        recipe: What all sets have in common. Its guidance, seeds and number of exemplars are the methods' own.
        k: Exemplars of each class, for methods that are guided by them; None: the recipe's `exemplars.k`.
        seeds: Of the noise and of the exemplars' draw alike.
        real: Real images to judge against, a folder per class: never the exemplars.
        judge: The extractor that judges; it should be unrelated to what guides.
        judge_class: By class, the judge's class (name or number), where neither name nor number says it.
        neighbours: Of precision, recall, density and coverage.
        audit: Judge again after mild transforms of real and generated images alike.
        utility: How downstream accuracy is measured; None: not at all.
        objective: The column by whose mean a setting is chosen.
        within: Highest mean of columns that a setting may have to be chosen, such as {cost_ratio: 1.15}.
        baseline: The method that gains and cost ratios are against.
        validation: Share of the real images, of each class, that settings are chosen by; the others are what is reported.
    """

    recipe: Recipe
    methods: Annotated[dict[str, MethodRequest], Field(min_length=1)]
    k: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    real: Text
    judge: Text
    judge_class: dict[str, str | int] = Field(default_factory=dict)
    neighbours: Positive = 5
    audit: bool = True
    utility: UtilityRequest | None = UtilityRequest()
    objective: str = "robust_f1"
    within: dict[str, float] = Field(default_factory=dict)
    baseline: str = "none"
    validation: Share = 0.5

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and texts, in the order of the fields."""
        return self.model_dump(mode="json")


def sweep_from(data: Mapping[str, Any], base: str | Path | None = None) -> SweepRequest:
    """The sweep's request of plain data; see `checked`.

    Args:
        data: `recipe` may name a recipe's file instead of holding one; that file's guidance and seeds are not used.
        base: What relative paths are relative to; None: the working directory.
    """
    plain = _anchored(dict(data), Path.cwd() if base is None else Path(base).expanduser().absolute())
    request = checked(SweepRequest, plain, "sweep")
    _check_recipe(request.recipe)
    check_request(request)
    return request


def read_sweep(path: str | Path, settings: Sequence[str] = ()) -> SweepRequest:
    """Reads and checks a sweep's YAML file; the sweep.yaml of a sweep's directory too.

    Args:
        settings: `dotted.key=value` texts laid over it, the value in YAML; their paths are relative to the working directory.

    Raises:
        RequestError: As `sweep_from`, or if the file is missing or no mapping.
    """
    path = Path(path).expanduser()
    data = plain_mapping(path, "sweep", _REMEDY, _REMEDY)
    return sweep_from(overridden(_anchored(data, path.absolute().parent), {}, settings=settings))


def _anchored(data: dict[str, Any], base: Path) -> dict[str, Any]:
    """The data with a recipe's file read, and all paths absolute."""
    if isinstance(data.get("recipe"), str):
        recipe = read_mapping(base / Path(data["recipe"]).expanduser())
        data["recipe"] = {key: value for key, value in recipe.items() if key not in ("guidance", "seed")}
        if isinstance(recipe.get("exemplars"), dict):
            data["recipe"]["exemplars"] = {key: value for key, value in recipe["exemplars"].items() if key != "seed"}
    elif isinstance(data.get("recipe"), dict):
        data["recipe"] = anchored(data["recipe"], base)
    if isinstance(methods := data.get("methods"), dict):
        data["methods"] = {
            str(name): anchored(method, base) if isinstance(method, dict) else method for name, method in methods.items()
        }
    if isinstance(data.get("real"), str) and data["real"]:
        data["real"] = str((base / Path(data["real"]).expanduser()).resolve())
    if isinstance(data.get("judge"), str):
        data["judge"] = anchored_extractor(data["judge"], base)
    utility = data.get("utility")
    if isinstance(utility, dict) and isinstance(utility.get("test"), str) and utility["test"]:
        data["utility"] = {**utility, "test": str((base / Path(utility["test"]).expanduser()).resolve())}
    return data


def check_request(request: SweepRequest) -> None:
    """Refuses contradictions that the fields' types do not exclude."""
    _check_methods(request)
    _check_choice(request)


def _check_recipe(recipe: Recipe) -> None:
    instead = {
        "guidance": (recipe.guidance or (), "Write it under methods.NAME.guidance."),
        "seed": (recipe.seed, "Write it under seeds."),
        "exemplars.seed": (recipe.exemplars.seed, "Write it under seeds."),
    }
    for field, (given, remedy) in instead.items():
        if given:
            shown = [term.method for term in given] if isinstance(given, tuple) else given
            raise RequestError(f"recipe.{field}", shown, "a sweep sets it for each run itself", remedy)


def _check_methods(request: SweepRequest) -> None:
    for name, method in request.methods.items():
        field = f"methods.{name}"
        if not _NAME.fullmatch(name):
            problem = "a method's name becomes the name of a folder"
            raise RequestError("methods", name, problem, "Use letters, digits, and . _ + - within the name.")
        if (method.scales or method.term) and method.term >= len(method.guidance):
            shown, problem = (
                (method.scales, "there is no term to scale")
                if not method.guidance
                else (method.term, f"it has {len(method.guidance)} terms, counted from 0")
            )
            raise RequestError(f"{field}.{'term' if method.guidance else 'scales'}", shown, problem, "Correct it.")
        _refuse_twice(f"{field}.scales", method.scales)
        _refuse_twice(f"{field}.k", method.k)
        if method.k and request.recipe.exemplars.path is None:
            raise RequestError(f"{field}.k", list(method.k), "there are no exemplars", "State recipe.exemplars.path.")
    _refuse_twice("k", request.k)
    _refuse_twice("seeds", request.seeds)
    if request.baseline not in request.methods:
        raise RequestError(
            "baseline", request.baseline, "there is no such method", did_you_mean(request.baseline, request.methods, "Methods")
        )
    baseline = request.methods[request.baseline]
    if len(baseline.scales or ()) > 1 or len(baseline.k or ()) > 1:
        remedy = "Give it one, or name another method: `none: {guidance: []}` is usual."
        raise RequestError("baseline", request.baseline, "it has several scales or k, but one setting is needed", remedy)


def _refuse_twice(field: str, values: tuple[Any, ...] | None) -> None:
    twice = [value for place, value in enumerate(values or ()) if value in (values or ())[:place]]
    if twice:
        raise RequestError(field, twice[0], "it is listed twice", "List it once.")


def _check_choice(request: SweepRequest) -> None:
    columns = {"objective": [request.objective], "within": list(request.within)}
    for field, names in columns.items():
        for name in names:
            if name not in numbers():
                raise RequestError(field, name, "there is no such column", did_you_mean(name, numbers(), "Columns"))
            if not request.audit and name.removeprefix("gain_") in robust():
                raise RequestError(
                    field, name, "it is not measured without the audit", "Set audit: true, or choose another column."
                )
            if request.utility is None and "utility" in name:
                raise RequestError(field, name, "it is not measured: utility is null", "Add utility, or choose another column.")
