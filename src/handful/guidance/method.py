"""What a guidance method is to the rest of the program: what a recipe may say of it, what it needs, how its term is built.

A method's file holds a request that derives from one of these. The others ask what it needs, never which method it is.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field
from torch import Tensor

from handful.core.noise import Schedule
from handful.errors import RequestError, counted
from handful.features.extractor import FeatureExtractor
from handful.guidance.base import Guidance, Potential, Pull, Timing
from handful.guidance.settings import Part, Positive, Request, Weight

if TYPE_CHECKING:
    from handful.guidance.embeddings import Embeddings

# What a method may need of the recipe and the model: images to be guided by; a null condition to compare with; a condition
# that noise can be put on; the number of each class among a classifier's; embeddings fitted beforehand, which give the start.
Need = Literal["exemplars", "null condition", "noisy condition", "classes", "embeddings"]
View = tuple[str, int]  # what exemplars are looked at by: an extractor's key, and by how much they are shrunk

# The samplers whose steps a rule can move: those of one evaluation, which remember nothing of the step before.
_SAMPLERS_OF = {"held": ("ddim", "ddpm"), "ancestral": ("ddpm",)}
# Fields of these kinds hold a path, or an extractor that may be one: relative ones are relative to the recipe's file.
FILE, EXTRACTOR = "file", "extractor"
File = Annotated[str, Field(min_length=1), FILE]
Extractor = Annotated[str, Field(min_length=1), EXTRACTOR]
Asked = TypeVar("Asked", bound="TermRequest")


@dataclass(frozen=True)
class Looks:
    """The network that a potential looks with.

    Attributes:
        logits: Whether a classifier's logits are asked for, not features.
        noisy: Whether it looks at the noisy state and the time, not at images.
        softplus: Beta, in the place of its ReLUs; None leaves them.
        prompts, template: Of a classifier whose classes are prompts; None where it has none.
    """

    name: str
    field: str = "features"
    logits: bool = False
    noisy: bool = False
    softplus: float | None = None
    prompts: tuple[tuple[str, str], ...] = ()
    template: str | None = None

    @property
    def key(self) -> str:
        """In words: the same for two terms that can share it. The key of every table of extractors."""
        if self.noisy:
            return f"{self.name} noisy"
        prompts = ""
        if self.prompts or self.template is not None:
            text = json.dumps([self.template or PLAIN_TEMPLATE, [list(pair) for pair in self.prompts]])
            prompts = f" prompts {hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return self.name + prompts + ("" if self.softplus is None else f" softplus {self.softplus!r}".removesuffix(".0"))


PLAIN_TEMPLATE = "a photo of a {}"


@dataclass(frozen=True)
class Context:
    """What a run gives to the terms of one cohort.

    Attributes:
        extractors: By `Looks.key`, on the device to guide on.
        exemplars: Features of the class's exemplars by view, (k, D) each.
        seeds: Of the cohort's images, for what draws.
        targets: For classifiers, by the term's place: the number of the cohort's class.
        levels: The denoiser's schedule, for what looks at noisy states.
        embeddings: Fitted beforehand; None without.
        index: The place of the term that is built.
    """

    extractors: Mapping[str, FeatureExtractor] = field(default_factory=dict)
    exemplars: Mapping[View, Tensor] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    targets: Mapping[int, int] = field(default_factory=dict)
    levels: Schedule | None = None
    embeddings: Embeddings | None = None
    index: int = 0

    @property
    def target(self) -> int:
        return self.targets.get(self.index, 0)


def _taken(kind: type[Part], whole: Request, **decided: Any) -> Part:
    """The part of a request that a base class of it is."""
    return kind(**{name: getattr(whole, name) for name in kind.model_fields} | decided)


class TermRequest(Timing):
    """What a recipe may say of any method: how strongly it acts, and on which steps (`Timing`).

    Class attributes:
        alone: Whether a recipe may have one term of this method only.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    alone: ClassVar[bool] = False

    method: str
    scale: Weight = 1.0

    @abstractmethod
    def build(self, context: Context) -> Guidance:
        """The term, for one cohort."""

    @property
    def has_energy(self) -> bool:
        """Whether it says of a finished image how well it fits: a column of the manifest."""
        return False

    @property
    def embeddings_file(self) -> Path | None:
        """The file of the embeddings that it needs."""
        return None

    @property
    def advice(self) -> str:
        """A note on a setting that was left open and matters; empty for none."""
        return ""

    def timing(self) -> Timing:
        return _taken(Timing, self, every=self.every or 1)

    def check_run(self, steps: int, sampler: str) -> None:
        """Refuses what a run of so many steps of this sampler can't do."""
        if (self.every or 1) > steps:
            raise RequestError("every", self.every, f"it acts on none of {counted(steps, 'step')}", f"Use {steps} or less.")

    def of_few(self, fewest: int) -> str:
        """A note on what changes where a class has so few exemplars; empty for nothing."""
        return ""


class PotentialRequest(TermRequest, Pull):
    """What a recipe may say of guidance by a potential; see `Pull`."""

    scale: Weight = 0.4
    every: Positive | None = None
    hold: bool | None = None
    reduce: Positive | None = None

    @property
    def has_energy(self) -> bool:
        return not self.looks.noisy  # a classifier of noisy states has nothing to say of a finished image

    @property
    @abstractmethod
    def looks(self) -> Looks:
        """The network that it looks with."""

    @property
    def key(self) -> str:
        return self.looks.key

    @property
    def view(self) -> View:
        return self.key, self.reduce or 1

    def pull(self) -> Pull:
        return _taken(Pull, self, hold=bool(self.hold), reduce=self.reduce or 1)

    def when(self) -> dict[str, Any]:
        """What every potential's constructor takes."""
        return {"timing": self.timing(), "pull": self.pull()}

    def check_run(self, steps: int, sampler: str) -> None:
        super().check_run(steps, sampler)
        self.pull()  # what is decided since the recipe was read must agree, too
        fitting = _SAMPLERS_OF.get(self.rule, (sampler,))
        if sampler not in fitting:
            problem = f"the rule does not work with the sampler {sampler}"
            raise RequestError("rule", self.rule, problem, f"Use the sampler {' or '.join(fitting)}, or the rule shift.")


class FeaturesRequest(PotentialRequest):
    """A potential of features.

    Attributes:
        features: The extractor; `auto` becomes what suits the model.
        softplus: Beta; every ReLU of the network becomes softplus(beta x) / beta, for the exemplars too. None leaves them.
    """

    features: Extractor = "auto"
    softplus: Annotated[float, Field(gt=0)] | None = None

    @property
    def looks(self) -> Looks:
        return Looks(self.features, softplus=self.softplus)

    def extractor(self, context: Context) -> FeatureExtractor:
        return context.extractors[self.key]


class ByExemplarsRequest(FeaturesRequest):
    """A potential that the exemplars' features are part of."""

    needs = frozenset({"exemplars"})

    def seen(self, context: Context) -> tuple[FeatureExtractor, Tensor, float]:
        """What the constructor of such a potential begins with: the extractor, the exemplars' features, and the scale."""
        return self.extractor(context), context.exemplars[self.view], self.scale


Requests = Sequence[TermRequest]


def potentials(requests: Requests) -> list[tuple[int, PotentialRequest]]:
    """The terms that look at images, each with its place."""
    return [(index, each) for index, each in enumerate(requests) if isinstance(each, PotentialRequest)]


def first_of(requests: Requests, kind: type[Asked]) -> Asked | None:
    """The first term of a kind; None where there is none."""
    return next((each for each in requests if isinstance(each, kind)), None)


def needing(requests: Requests, need: Need) -> list[tuple[int, TermRequest]]:
    """The terms that need something, each with its place."""
    return [(index, each) for index, each in enumerate(requests) if need in each.needs]


def views(requests: Requests) -> list[View]:
    """What exemplars are looked at by, each once, in the terms' order."""
    return list(dict.fromkeys(each.view for _, each in potentials(requests) if "exemplars" in each.needs))


def energy_columns(requests: Requests) -> list[str | None]:
    """For each term the manifest's column of its energy; None for a term that has none."""
    columns: list[str | None] = []
    for request in requests:
        name = f"energy_{request.method}" if request.has_energy else None
        taken = sum(column is not None and column.startswith(name) for column in columns) if name else 0
        columns.append(f"{name}_{taken + 1}" if taken else name)
    return columns


def check_terms(requests: Requests, steps: int, sampler: str) -> None:
    """Refuses settings that contradict each other or the run, before anything is loaded."""
    for index, request in enumerate(requests):
        with named(index):
            request.check_run(steps, sampler)
            if request.alone and any(before.method == request.method for before in requests[:index]):
                raise RequestError("method", request.method, "there are two of them", "Leave one out.")


def make_terms(requests: Requests, context: Context) -> list[Guidance]:
    """The terms for one cohort."""
    terms = [request.build(replace(context, index=index)) for index, request in enumerate(requests)]
    for term in terms:
        if isinstance(term, Potential) and context.seeds:
            term.seed = context.seeds[0]
    return terms


@contextmanager
def named(place: int | str) -> Iterator[None]:
    """Puts a place, or that of the term of this number, before the field that an error names."""
    prefix = f"guidance[{place}]" if isinstance(place, int) else place
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{prefix}.{error.field}", error.value, error.problem, error.remedy) from None
