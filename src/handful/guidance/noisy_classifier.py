"""Guidance by a classifier that was trained on noisy images, f(x_t, t) (Dhariwal & Nichol 2021, arXiv 2105.05233).

U(x_t; y) = -(tau1 f_y(x_t, t) - log sum_j exp(tau2 f_j(x_t, t)))
"""

from __future__ import annotations

import copy
from typing import Annotated, Literal

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn

from handful.core.noise import Level, Schedule
from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor
from handful.guidance.base import Potential, Pull, Timing
from handful.guidance.classifier import ClassRequest, Target, tempered_energy
from handful.guidance.method import EXTRACTOR, Context, Looks

_OWN: dict[str, JsonValue] = {
    "missing": "Name a function that returns it (--classifier FILE.py:FUNCTION).",
    "problem": "it is not of the form FILE.py:FUNCTION",
    "remedy": "Name a function that returns a module of noisy states and the time.",
}


class NoisyClassifierRequest(ClassRequest):
    """Guidance by a classifier of noisy images.

    Attributes:
        classifier: `FILE.py:FUNCTION` that returns a torch module; called with x_t / n and the model's own time, (n,).
    """

    method: Literal["noisy-classifier"] = "noisy-classifier"
    classifier: Annotated[str, Field(pattern=r"\.py:\w+$", json_schema_extra=_OWN), EXTRACTOR]
    classes: dict[str, int] = Field(default_factory=dict)
    input: Literal["state"] = "state"

    @property
    def looks(self) -> Looks:
        return Looks(self.classifier, "classifier", logits=True, noisy=True)

    def build(self, context: Context) -> NoisyClassifier:
        assert context.levels is not None, "schedule: a classifier of noisy states needs it"
        network = context.extractors[self.key].network
        taus = {"tau1": self.tau1, "tau2": self.tau2}
        return NoisyClassifier(network, context.levels, context.target, self.scale, **taus, **self.when())


class NoisyClassifier(Potential):
    """Guidance by a classifier that was trained on noisy images, f(x_t, t) (Dhariwal & Nichol 2021, arXiv 2105.05233).

    It looks at x_t / n, not at an image, so no gradient goes through the denoiser: `pull.input` must be "state".

    Args:
        classifier: A module, called with (n, c, h, w) and the denoiser's time (n,); gives logits.
            Its weights are frozen.
        levels: The denoiser's schedule, which knows that time.
        target, scale, tau1, tau2, timing, pull: As for `Classifier`.

    Raises:
        RequestError: If the pull looks at something else.
    """

    name = "noisy-classifier"
    per = "image"

    def __init__(
        self,
        classifier: nn.Module,
        levels: Schedule,
        target: Target,
        scale: float,
        *,
        tau1: float = 1.0,
        tau2: float = 1.0,
        timing: Timing | None = None,
        pull: Pull | None = None,
    ) -> None:
        super().__init__(FeatureExtractor(self.name, classifier, channels=None), scale, timing, pull or Pull(input="state"))
        if self.pull.input != "state":
            raise RequestError(
                "input", self.pull.input, "a classifier of noisy images looks at the noisy state itself", "Use state."
            )
        NoisyClassifierRequest(classifier="it.py:it", tau1=tau1, tau2=tau2)
        self.levels, self.target, self.tau1, self.tau2 = levels, target, tau1, tau2
        self.time = torch.zeros(())

    def at(self, level: Level) -> NoisyClassifier:
        here = copy.copy(self)
        here.time = self.levels.time(level)
        return here

    def view(self, images: Tensor) -> Tensor:
        return self.extractor.network(images, self.time.to(images.device, torch.float32).expand(len(images)))

    def energy(self, features: Tensor) -> Tensor:
        return tempered_energy(features, self.target, self.tau1, self.tau2)
