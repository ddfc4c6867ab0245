"""The pre-conditionings of a classifier that `handful calibrate` compares, and what the command line says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

from handful.errors import RequestError
from handful.guidance.classifier import ClassifierRequest

Looks = Literal["x0_hat", "x_t"]
BETAS = (None, 3.0, 5.0, 8.0)  # EluCD took 3 and 5
TAUS = ((1.0, 1.0), (1.0, 0.5), (1.0, 0.0), (0.5, 0.5))
_NONE = "none"


@dataclass(frozen=True)
class Candidate:
    """One way to pre-condition a classifier.

    Attributes:
        softplus: Beta; None leaves its ReLUs.
        looks: What it is shown: the estimate x0_hat, or x_t divided by its rms where that exceeds 1.
        tau1, tau2: Inverse temperatures of the potential. Only the first changes the class probabilities (see
            `metrics.calibration`).
        fitted: Whether its logits are divided by a temperature fitted for each level of noise.
    """

    softplus: float | None = None
    looks: Looks = "x0_hat"
    tau1: float = 1.0
    tau2: float = 1.0
    fitted: bool = False

    @property
    def name(self) -> str:
        """What tables call it, and no other: `softplus 3, x0_hat, tau 1:0.5`."""
        taus = f"tau {self.tau1:g}:{self.tau2:g}"
        if self.fitted:
            taus = "fitted T" if self.taus == (1, 1) else f"fitted T, {taus}"
        return f"{'relu' if self.softplus is None else f'softplus {self.softplus:g}'}, {self.looks}, {taus}"

    @property
    def facts(self) -> dict[str, str | float | bool | None]:
        """What tables and JSON say of it."""
        return {
            "candidate": self.name,
            "softplus": self.softplus,
            "input": self.looks,
            "tau1": self.tau1,
            "tau2": self.tau2,
            "fitted": self.fitted,
        }

    @property
    def sees(self) -> tuple[float | None, Looks]:
        """What its logits depend on."""
        return self.softplus, self.looks

    @property
    def probabilities(self) -> tuple[float | None, Looks, float, bool]:
        """What its class probabilities depend on: two candidates that share it are calibrated alike."""
        return self.softplus, self.looks, self.tau1, self.fitted

    @property
    def taus(self) -> tuple[float, float]:
        return self.tau1, self.tau2

    def request(
        self, base: ClassifierRequest, temperatures: Sequence[tuple[float, float]] = (), **settings: Any
    ) -> ClassifierRequest:
        """The term of a recipe that guides by it.

        Args:
            base: Which classifier, and which of its classes are meant.
            temperatures: Fitted, (sigma / alpha, T); taken where the candidate is a fitted one.
            settings: Other fields of the term, such as scale and jacobian.

        Raises:
            pydantic.ValidationError: If a setting is none of the term's, or out of its range.
        """
        own = {
            "softplus": self.softplus,
            "input": self.looks,
            "tau1": self.tau1,
            "tau2": self.tau2,
            "temperatures": tuple(temperatures) if self.fitted else (),
            "reduce": 1,  # it was measured at the whole resolution, and not through the linear map of latents
        }
        told = {name: getattr(base, name) for name in ("classifier", "classes", "prompts", "template")}
        return ClassifierRequest(**told, **own, **settings)


PLAIN = Candidate()  # the classifier as it is


def candidates(
    betas: Sequence[float | None] = BETAS, taus: Sequence[tuple[float, float]] = TAUS, looks: Sequence[Looks] = get_args(Looks)
) -> list[Candidate]:
    """Every combination, the plain classifier first: of temperatures those given, and one fitted for each level of noise."""
    made = [
        Candidate(beta, at, *pair, fitted)
        for beta, at in product(betas, looks)
        for pair, fitted in [*((pair, False) for pair in taus), ((1.0, 1.0), True)]
    ]
    return [PLAIN, *(each for each in dict.fromkeys(made) if each != PLAIN)]


def read_betas(text: str) -> tuple[float | None, ...]:
    """`none,3,5` -> (None, 3.0, 5.0), each once.

    Raises:
        RequestError: If one is neither a positive number nor none.
    """
    betas: dict[float | None, None] = {}
    for part in map(str.strip, text.split(",")):
        beta = None if part == _NONE else _number(part)
        if beta is not None and not (math.isfinite(beta) and beta > 0):
            raise RequestError(
                "--betas", part or text, "it is neither a positive number nor none", "Write for instance --betas none,3,5."
            )
        betas[beta] = None
    return tuple(betas)


def read_taus(text: str) -> tuple[tuple[float, float], ...]:
    """`1:1,1:0.5` -> ((1.0, 1.0), (1.0, 0.5)), each once; a single number stands for both.

    Raises:
        RequestError: If one is no pair of inverse temperatures, or its tau1 is 0, which says nothing of the class.
    """
    pairs: dict[tuple[float, float], None] = {}
    for part in map(str.strip, text.split(",")):
        first, colon, second = part.partition(":")
        pair = _number(first), _number(second if colon else first)
        try:
            ClassifierRequest(classifier="it", tau1=pair[0], tau2=pair[1])
        except RequestError as error:
            raise RequestError("--taus", part or text, error.problem, "Write for instance --taus 1:1,1:0.5.") from None
        if pair[0] == 0:
            raise RequestError(
                "--taus", part, "with tau1 = 0 the guidance does not depend on the class", "Write for instance --taus 1:1,1:0."
            )
        pairs[pair] = None
    return tuple(pairs)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
