"""The work of sampling a cohort, run on the meta device: what it computes and what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from handful.guidance.method import Context, Requests, View, make_terms, views
from handful.models.latent import LatentDenoiser
from handful.recipe.extractors import extractors_wanted
from handful.recipe.inverting import Inverted
from handful.recipe.resolve import sampler_options
from handful.recipe.schema import Recipe

META = torch.device("meta")
# Where operations go; a part that goes back is its gradient towards its input, as weights are frozen.
PARTS = ("denoiser", "denoiser backward", "preview", "preview backward", "features", "features backward", OTHER, "decode")
ENCODING = "encoding exemplars"
AT_ONCE = 16  # images through the decoder where no chunk is stated, as a run has it
ENCODED = 4  # exemplars through the encoder, where the linear preview is fitted


Live = dict[str, int]  # bytes that tensors hold at most, by the part that runs then


@dataclass(frozen=True)
class Way:
    """What one way of sampling costs.

    Attributes:
        flops_per_image: Floating-point operations; a multiply-add is 2.
        parts: The same by part; see `PARTS`.
        evaluations: How often an image goes forward through the denoiser.
        parameters: Of all networks that sampling needs.
        peak_bytes: The most that weights and tensors hold at once, for a whole cohort; see `handful.cost.peak`.
    """

    flops_per_image: float
    parts: dict[str, float]
    evaluations: float
    parameters: int
    peak_bytes: int


def mean_way(ways: Sequence[Way], shares: Sequence[float]) -> Way:
    """What ways cost on average, by their shares; networks and memory are those of the largest."""
    weights = [share / sum(shares) for share in shares]
    parts = Counter[str]()
    for way, weight in zip(ways, weights, strict=True):
        parts.update({part: flops * weight for part, flops in way.parts.items()})
    return Way(
        sum(way.flops_per_image * weight for way, weight in zip(ways, weights, strict=True)),
        {part: parts[part] for part in PARTS if parts[part]},
        sum(way.evaluations * weight for way, weight in zip(ways, weights, strict=True)),
        max(way.parameters for way in ways),
        max(way.peak_bytes for way in ways),
    )


def evaluated(levels: Levels, recipe: Recipe) -> list[Level]:
    """Every level at which the recipe's sampler asks its denoiser, in order: the sampler is run on one number."""
    return [level for level, _ in walked_by(levels, recipe)]


def walked_by(levels: Levels, recipe: Recipe) -> list[tuple[Level, bool]]:
    """The levels of `evaluated`, each with whether the sampler entered a step there (Heun's second evaluation does not)."""
    recorder = _Recorder(levels)
    asked = recipe.sampler
    options = sampler_options(asked, lambda: torch.zeros(1, 1, 1, 1))
    SAMPLERS[asked.name](recorder, torch.zeros(1, 1, 1, 1), levels, Condition(), **options)
    return recorder.asked


@dataclass(frozen=True)
class Work:
    """What the ways of sampling share.

    Attributes:
        walked: Every level at which the sampler asks, and whether it entered a step there.
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
    def way(self, guidance: Requests, peak: Callable[[Live], int]) -> Way:
        """What sampling a cohort with these terms costs; `peak` makes bytes of what is held."""
        flops, live, evaluations = self._sampled(guidance)
        flops.update(self._decoded.flops)
        live |= self.decoding()
        live[ENCODING] = self.encoding(guidance)[1]
        networks = [self.denoiser, *(self.extractors[name] for name in extractors_wanted(guidance))]
        return Way(
            flops.total() / self.cohort,
            {part: flops[part] / self.cohort for part in PARTS if flops[part]},
            evaluations / self.cohort,
            sum(map(size_of, networks)),
            peak(live),
        )

    @torch.no_grad()
    def live(self, guidance: Requests, cohort: int, chunk: int | None) -> Live:
        """The most that tensors hold while a cohort is sampled, in bytes by part; without decoding it."""
        return replace(self, cohort=cohort, chunk=chunk)._sampled(guidance)[1]

    def decoding(self) -> Live:
        """What decoding the cohort holds."""
        return {"decode": self._decoded.peak}

    @cached_property  # the same for every way; `replace` makes a new one
    @torch.no_grad()
    def _decoded(self) -> Count:
        count = Count()
        counted, size = _Counted(self.denoiser, count), self.chunk or AT_ONCE
        with count:
            torch.cat([counted.decode(part) for part in self._empty(self.denoiser.shape).split(size)])
        return count

    def _sampled(self, guidance: Requests) -> tuple[Counter[str], Live, int]:
        """Operations and held bytes by part, and images through the denoiser, of a cohort's way from noise to x0."""
        count = Count()
        counted, terms = _Counted(self.denoiser, count), self._terms(guidance, count)
        kinds: dict[tuple[bool, ...], list[Level]] = {}
        for level, entered in self.walked:
            kinds.setdefault((entered, *(term.strength(level) > 0 for term in terms)), []).append(level)
        flops, evaluations = Counter[str](), 0
        count.peaks.clear()
        for (entered, *_), levels in kinds.items():
            count.flops.clear()
            counted.images = 0
            with count:
                guided, x = Guided(counted, terms, self.chunk), self._empty(self.denoiser.shape)
                if entered:
                    guided.moved_before(x, levels[0], self._condition)
                guided(x, levels[0], self._condition)
                del guided, x
            flops.update({part: each * len(levels) for part, each in count.flops.items()})
            evaluations += counted.images * len(levels)
        return flops, dict(count.peaks), evaluations

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
        if flops := self.encoding(guidance)[0]:
            told[ENCODING] = float(self.exemplars * flops)
        return told

    @torch.no_grad()
    def encoding(self, guidance: Requests) -> tuple[int, int]:
        """Operations for an exemplar's latents, and bytes for as many as are encoded at once; 0 where none is."""
        denoiser = self.denoiser
        linear = isinstance(denoiser, LatentDenoiser) and any(denoiser.is_linear(reduce) for _, reduce in views(guidance))
        if not isinstance(denoiser, LatentDenoiser) or not (linear or self.started):
            return 0, 0
        at_once = min(AT_ONCE if self.started else ENCODED, self.exemplars, self.chunk or AT_ONCE)
        with Count() as count:
            denoiser.encode(self._empty(denoiser.image_shape, at_once))
        return count.total // at_once, count.peak

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
            problem = (
                f"its operations on images of {self.denoiser.image_shape} can't be counted without running it "
                f"({first_line(error)})"
            )
            raise RequestError("features", name, problem, "Use another extractor.") from error

    @cached_property  # of each cohort's size: `replace` makes a new one
    def _condition(self) -> Condition:
        """The network's condition: of any class, since all cost the same."""
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


def size_of(network: nn.Module) -> int:
    """How many parameters it has."""
    return sum(parameter.numel() for parameter in network.parameters())


def bytes_of(network: nn.Module) -> int:
    """Of its parameters and buffers."""
    held = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
