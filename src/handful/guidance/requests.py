"""What a recipe can ask of guidance: one class a method. Data alone; `terms.py` makes the terms.

Defaults are handful's own; papers' settings are under recipes/.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _names(value: object) -> object:
    """Class names: `classes: [0, 1]` in YAML are numbers, and mean the folders "0" and "1"."""
    if isinstance(value, (list, tuple)):
        return tuple(str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in value)
    return value


def _name_or_number(value: object) -> object:
    """Told in one sentence, where a union would tell its members' one by one."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PydanticCustomError("name_or_number", "it is no name and no whole number")
    return value


ClassNames = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_names)]
Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]


class Request(BaseModel):
    """Part of a recipe. A misspelt key is refused, never ignored; no number is infinite or NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Gain = Literal["constant", "linear", "sine", "edm"]
Interval = tuple[Weight, Weight]
NoiseInterval = tuple[Weight, Weight | None]  # None: no upper end


class TimedRequest(Request):
    """What every term has: how strongly it acts, and on which steps; see `handful.guidance.Timing`."""

    scale: Weight = 1.0
    every: Positive | None = 1
    interval: Interval = (0.0, 1.0)
    noise: NoiseInterval = (0.0, None)
    gain: Gain = "constant"


class SmoothingRequest(Request):
    """Views that a potential is averaged over; see `handful.guidance.Smoothing`."""

    samples: Positive = 1
    noise: Weight = 0.0
    shift: Annotated[int, Field(ge=0)] = 0
    flip: bool = False


class PotentialRequest(TimedRequest):
    """What guidance by a potential has in common; see `handful.guidance.Pull` and `Timing`.

    Attributes:
        every: On every n-th step; None becomes the largest n that guides at least four steps of a run (Heun's method
            evaluates most of them twice).
        hold: Use the direction again on the steps between; None: where rule, normalize and every allow it.
        reduce: Look at images of 1/reduce of the resolution; None: 1 for pixel models, for models of latents the factor at
            which a linear map, fitted to the exemplars, does for the decoder (without exemplars 1).
        boost: Of the gain "edm" and the rule "ancestral".
    """

    scale: Weight = 0.4
    jacobian: Literal["exact", "gaussian", "identity"] = "exact"
    normalize: Literal["rms", "rms-image", "sample", "none"] = "rms"
    hold: bool | None = None
    reduce: Positive | None = None
    input: Literal["x0_hat", "x_t", "state", "blend"] = "x0_hat"
    rule: Literal["shift", "held", "ancestral", "before"] = "shift"
    inner: Positive = 1
    smoothing: SmoothingRequest = SmoothingRequest()
    every: Positive | None = None
    boost: Weight = 0.0


class SmoothableRequest(PotentialRequest):
    """A potential of what a network of the user's choice answers.

    Attributes:
        softplus: Beta; every ReLU of the network becomes softplus(beta x) / beta. None leaves them.
    """

    softplus: Annotated[float, Field(gt=0)] | None = None


class FeaturesRequest(SmoothableRequest):
    """A potential of features; `auto` becomes what suits the model. With `softplus` exemplars are seen so as well."""

    features: Annotated[str, Field(min_length=1)] = "auto"


class ByExemplarsRequest(FeaturesRequest):
    """A potential that the exemplars' features are part of."""


class ChamferRequest(ByExemplarsRequest):
    """Chamfer guidance by the exemplars; see `handful.guidance.Chamfer`."""

    method: Literal["chamfer"] = "chamfer"
    coverage_weight: Weight = 4.0
    fidelity_weight: Weight = 1.0
    margin: Weight = 0.0


class EnergyRequest(ByExemplarsRequest):
    """Energy-distance guidance by the exemplars, for few of them; see `handful.guidance.Energy`."""

    method: Literal["energy"] = "energy"


class VendiRequest(FeaturesRequest):
    """Guidance towards a diverse cohort; see `handful.guidance.Vendi`."""

    method: Literal["vendi"] = "vendi"
    order: Annotated[float, Field(gt=0)] = 1.0


class CVSGRequest(ByExemplarsRequest):
    """Contextualised Vendi score guidance by the exemplars; see `handful.guidance.CVSG`.

    The memory of generated images that the paper compares with is the cohort, generated together. Cohorts do not remember
    each other, since then the images of one would depend on which others were made, in which order: so a class is as
    diverse as its cohort is large. `CVSG(memory=...)` takes other images' features, in Python.

    Attributes:
        beta: Of the exemplars' term; 0 is vendi.
    """

    method: Literal["cvsg"] = "cvsg"
    beta: Weight = 2.0


class ClassifierRequest(SmoothableRequest):
    """Guidance by a classifier of clean images (EluCD); see `handful.guidance.Classifier`.

    The gaussian jacobian is the default: with Softplus 3 more of its gain survived than of the exact one's, at half the price
    (docs/findings.md, section 8).

    Attributes:
        classifier: A name that `handful.features.load_extractor` knows and that has logits, or `clip` or another CLIP of
            transformers, whose classes are prompts.
        classes: Which of the classifier's classes (name or number) each class to generate is; those that are not named
            here are matched by name, or, where the classifier's classes have no names, by the model's labels.
        by_label: The classifier numbers its classes as the model its labels, whatever they are called.
        prompts: For CLIP, the prompts of single classes, over the template.
        template: For CLIP, how a class becomes a prompt.
        tau1, tau2: The inverse temperatures: -(tau1 f_y - logsumexp(tau2 f)).
        temperatures: [sigma / alpha, T] pairs, rising in the first: logits are divided by T, interpolated between.
    """

    method: Literal["classifier"] = "classifier"
    scale: Weight = 0.3
    jacobian: Literal["exact", "gaussian", "identity"] = "gaussian"
    classifier: Annotated[str, Field(min_length=1)]
    classes: dict[str, Annotated[str | int, BeforeValidator(_name_or_number)]] = {}
    by_label: bool = False
    prompts: dict[str, str] = {}
    template: Annotated[str, Field(min_length=1)] = "a photo of a {}"
    tau1: Weight = 1.0
    tau2: Weight = 1.0
    temperatures: tuple[tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], ...] = ()


class NoisyClassifierRequest(PotentialRequest):
    """Guidance by a classifier of noisy images, f(x_t, t) (Dhariwal & Nichol 2021); see `handful.guidance.NoisyClassifier`.

    Attributes:
        classifier: `FILE.py:FUNCTION` that returns a torch module; called with x_t / n and the model's own time, (n,).
        classes, by_label: As for `ClassifierRequest`, numbers.
        tau1, tau2: As there.
    """

    method: Literal["noisy-classifier"] = "noisy-classifier"
    classifier: Annotated[str, Field(pattern=r"\.py:\w+$")]
    classes: dict[str, int] = {}
    by_label: bool = False
    tau1: Weight = 1.0
    tau2: Weight = 1.0
    input: Literal["state"] = "state"


class CFGRequest(TimedRequest):
    """Classifier-free guidance; scale 0 is the conditional model (diffusers' `guidance_scale` is `scale + 1`).

    With `noise` or `interval` it is limited-interval guidance.
    """

    method: Literal["cfg"] = "cfg"


class APGRequest(TimedRequest):
    """Adaptive projected guidance (Sadat et al. 2024), diffusers' own; see `handful.guidance.guiders.adaptive_projected`.

    Attributes:
        parallel: eta, the share of the part of the difference that is parallel to the estimate.
        momentum: beta; negative.
        norm: r, the largest norm of the difference; None does not limit it.
    """

    method: Literal["apg"] = "apg"
    parallel: Annotated[float, Field(ge=0, le=1)] = 0.0
    momentum: Annotated[float, Field(gt=-1, le=0)] = -0.5
    norm: Annotated[float, Field(gt=0)] | None = None


class CADSRequest(TimedRequest):
    """Condition-annealed sampling (Sadat et al. 2023); see `handful.guidance.CADS`. Usually beside cfg.

    Attributes:
        scale: s, of the noise on what the network is told.
        tau1, tau2: Of the remaining time: no noise below tau1, nothing but noise above tau2.
        mix: psi, the share of the rescaled condition.
    """

    method: Literal["cads"] = "cads"
    scale: Weight = 0.1
    tau1: Annotated[float, Field(ge=0, le=1)] = 0.6
    tau2: Annotated[float, Field(ge=0, le=1)] = 0.9
    mix: Annotated[float, Field(ge=0, le=1)] = 1.0


class InversionRequest(TimedRequest):
    """Guidance by a new domain's fitted embeddings (CRDI); see `handful.guidance.inversion.Inversion`.

    Images start from noised targets, and path, clamp and condition are those of the fit.

    Attributes:
        embeddings: The file that `handful invert` wrote.
        scale: 1 is the strength of the fit; 0 noises and denoises the targets without guidance (SDEdit).
        exchange: Whose embeddings an image is given: those of another target at every "step", of one for the whole
            "image", or with "none" those of the target that it starts from.
        perturbation: Of the embeddings, annealed; None takes what the file says.
    """

    method: Literal["inversion"] = "inversion"
    embeddings: Annotated[str, Field(min_length=1)]
    exchange: Literal["step", "image", "none"] = "step"
    perturbation: Weight | None = None


METHODS: dict[str, type[Request]] = {
    "chamfer": ChamferRequest,
    "energy": EnergyRequest,
    "classifier": ClassifierRequest,
    "noisy-classifier": NoisyClassifierRequest,
    "cvsg": CVSGRequest,
    "vendi": VendiRequest,
    "cfg": CFGRequest,
    "apg": APGRequest,
    "cads": CADSRequest,
    "inversion": InversionRequest,
}
GuidanceRequest = Annotated[
    ChamferRequest
    | EnergyRequest
    | ClassifierRequest
    | NoisyClassifierRequest
    | CVSGRequest
    | VendiRequest
    | CFGRequest
    | APGRequest
    | CADSRequest
    | InversionRequest,
    Field(discriminator="method"),
]
