"""Off-the-shelf classifier guidance, EluCD (Ma et al., ICLR 2024, arXiv 2310.11311).

A classifier f of clean images, with logits f_j, and two inverse temperatures:

    U(x0_hat; y) = -(tau1 f_y(x0_hat) - log sum_j exp(tau2 f_j(x0_hat)))      tau2 = tau1: log p(y | x); 0: the joint's logit

Its pre-conditioning is Softplus in place of ReLU (`handful.features.softplus`), the temperatures, and a gain over time
(`Timing`). Beyond the paper, logits can be divided by a temperature fitted for each level of noise (`handful calibrate`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor
from typing_extensions import Self

from handful.core.noise import Level
from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor
from handful.guidance.base import Jacobian, Potential, Pull, Timing
from handful.guidance.method import PLAIN_TEMPLATE, Context, Extractor, Looks, PotentialRequest, TermRequest
from handful.guidance.settings import Text, Weight

Target = int | Sequence[int] | Tensor


def tempered_energy(logits: Tensor, target: Target, tau1: float = 1.0, tau2: float = 1.0) -> Tensor:
    """U, above.

    Args:
        logits: (n, classes), of any size that is finite.
        target: y, the class of all images or of each, (n,).
        tau1, tau2: Inverse temperatures, 0 or more.

    Returns:
        (n,), in float32 or the logits' float64.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    wanted = torch.as_tensor(target, device=logits.device).expand(len(logits))[:, None]
    # log sum exp(tau2 f) is tau2 f_y - log softmax(tau2 f)_y, which keeps its gradient where logits are huge and alike
    of_target, log_softmax = logits.gather(1, wanted)[:, 0], (tau2 * logits).log_softmax(1).gather(1, wanted)[:, 0]
    return (tau2 - tau1) * of_target - log_softmax


def _name_or_number(value: object) -> object:
    """One message, where pydantic would give one for each member of the union."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PydanticCustomError("name_or_number", "it is neither a name nor a whole number")
    return value


Above0 = Annotated[float, Field(gt=0)]
NAME_IT = "Name a classifier (--classifier NAME): a directory or hub name of transformers, FILE.py:FUNCTION, clip."


class ClassRequest(PotentialRequest):
    """Guidance to a class, by a classifier.

    Attributes:
        classes: Which of the classifier's classes (name or number) each class to generate is; those that are not named
            here are matched by name, or, where the classifier's classes have no names, by the model's labels.
        by_label: The classifier's class numbers are the model's labels; their names are not compared.
        tau1, tau2: The inverse temperatures: -(tau1 f_y - logsumexp(tau2 f)).
    """

    needs = frozenset({"classes"})

    classifier: Extractor
    classes: dict[str, Annotated[str | int, BeforeValidator(_name_or_number)]] = Field(default_factory=dict)
    by_label: bool = False
    tau1: Weight = 1.0
    tau2: Weight = 1.0

    @model_validator(mode="after")
    def _tempered(self) -> Self:
        if not (self.tau1 or self.tau2):
            raise RequestError("tau1, tau2", (0.0, 0.0), "both inverse temperatures are 0", "Use 1 and 1 for log p(y | x).")
        return self


def class_request(request: TermRequest) -> ClassRequest | None:
    """The request, if it must match the classes to a classifier's; else None."""
    return request if isinstance(request, ClassRequest) else None


class ClassifierRequest(ClassRequest):
    """Guidance by a classifier of clean images (EluCD).

    The gaussian jacobian is the default: with Softplus 3 more of its gain survived than of the exact one's, at half the price
    (docs/findings.md, section 8).

    Attributes:
        classifier: A name that `handful.features.load_extractor` knows and that has logits, or `clip` or another CLIP of
            transformers, whose classes are prompts.
        softplus: Beta; every ReLU of the network becomes softplus(beta x) / beta. None leaves them.
        prompts: For CLIP, the prompts of single classes, over the template.
        template: For CLIP, how a class becomes a prompt.
        temperatures: [sigma / alpha, T] pairs, rising in the first: at a level the logits are divided by T, interpolated in
            the logarithms of both and constant beyond the ends.
    """

    method: Literal["classifier"] = "classifier"
    scale: Weight = 0.3
    jacobian: Jacobian = "gaussian"
    classifier: Annotated[Extractor, Field(json_schema_extra={"missing": NAME_IT})]
    softplus: Above0 | None = None
    prompts: dict[str, str] = Field(default_factory=dict)
    template: Text = PLAIN_TEMPLATE
    temperatures: tuple[tuple[Above0, Above0], ...] = ()

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if any(low[0] >= high[0] for low, high in pairwise(self.temperatures)):
            raise RequestError("temperatures", list(self.temperatures), "sigma / alpha must rise", "Sort the pairs.")
        return self

    @property
    def looks(self) -> Looks:
        prompts = tuple(sorted(self.prompts.items()))
        template = self.template if self.template != PLAIN_TEMPLATE else None
        return Looks(self.classifier, "classifier", True, softplus=self.softplus, prompts=prompts, template=template)

    @property
    def advice(self) -> str:
        if self.softplus is not None or not self.scale:
            return ""
        return (
            "softplus: none; a classifier with ReLUs guides better with one, 3 is a good first try, and handful calibrate "
            "finds the best"
        )

    def build(self, context: Context) -> Classifier:
        taus = {"tau1": self.tau1, "tau2": self.tau2, "temperatures": self.temperatures}
        return Classifier(context.extractors[self.key], context.target, self.scale, **taus, **self.when())


class Classifier(Potential):
    """Guidance by a classifier of clean images.

    Args:
        classifier: An extractor with logits.
        target: The class to guide to: the number of a class of the classifier's, one for all images or one for each.
        scale, timing, pull: See `Potential`.
        tau1, tau2, temperatures: See `ClassifierRequest`.

    Raises:
        RequestError: If the extractor is no classifier, or a temperature makes no sense.
    """

    name = "classifier"
    per = "image"

    def __init__(
        self,
        classifier: FeatureExtractor,
        target: Target,
        scale: float,
        *,
        tau1: float = 1.0,
        tau2: float = 1.0,
        temperatures: Sequence[tuple[float, float]] = (),
        timing: Timing | None = None,
        pull: Pull | None = None,
    ) -> None:
        super().__init__(classifier, scale, timing, pull)
        if not classifier.is_classifier:
            raise RequestError("classifier", classifier.name, "this network has no logits", "Name an image classifier.")
        ClassifierRequest(classifier="it", tau1=tau1, tau2=tau2, temperatures=tuple(temperatures))
        self.target, self.tau1, self.tau2, self.temperatures = target, tau1, tau2, tuple(temperatures)
        self.temperature = 1.0  # of finished images

    def at(self, level: Level) -> Classifier:
        if not self.temperatures:
            return self
        here = copy.copy(self)
        here.temperature = temperature_at(self.temperatures, float(level.ratio))
        return here

    def view(self, images: Tensor) -> Tensor:
        return self.extractor.logits(images)

    def energy(self, features: Tensor) -> Tensor:
        return tempered_energy(features / self.temperature, self.target, self.tau1, self.tau2)


def temperature_at(temperatures: Sequence[tuple[float, float]], ratio: float) -> float:
    """T at a noise-to-signal ratio: linear between the pairs in the logarithms of both, constant beyond them."""
    if ratio <= temperatures[0][0]:
        return temperatures[0][1]
    for (low, before), (high, after) in pairwise(temperatures):
        if ratio <= high:
            part = math.log(ratio / low) / math.log(high / low)
            return math.exp((1 - part) * math.log(before) + part * math.log(after))
    return temperatures[-1][1]
