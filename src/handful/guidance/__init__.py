"""Guidance: one file a method; `Guided` adds what their terms say to a denoiser.

`METHODS` is the one list of what a recipe can ask for. Importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from handful.guidance.auto import Auto as Auto
    from handful.guidance.base import ExemplarPotential as ExemplarPotential
    from handful.guidance.base import Guidance as Guidance
    from handful.guidance.base import Potential as Potential
    from handful.guidance.base import Pull as Pull
    from handful.guidance.base import Smoothing as Smoothing
    from handful.guidance.base import Step as Step
    from handful.guidance.base import Timing as Timing
    from handful.guidance.cads import CADS as CADS
    from handful.guidance.cfg import CFG as CFG
    from handful.guidance.chamfer import Chamfer as Chamfer
    from handful.guidance.chamfer import chamfer_distance as chamfer_distance
    from handful.guidance.classifier import Classifier as Classifier
    from handful.guidance.cvsg import CVSG as CVSG
    from handful.guidance.energy import Energy as Energy
    from handful.guidance.energy import energy_distance as energy_distance
    from handful.guidance.guided import Guided as Guided
    from handful.guidance.method import TermRequest
    from handful.guidance.noisy_classifier import NoisyClassifier as NoisyClassifier
    from handful.guidance.vendi import Vendi as Vendi
    from handful.guidance.vendi import vendi_score as vendi_score


class Method(NamedTuple):
    """Where a method's file is, what its request is called there, and what it does, in a line."""

    module: str
    request: str
    help: str


METHODS: dict[str, Method] = {
    "chamfer": Method("handful.guidance.chamfer", "ChamferRequest", "nearest exemplars; the default where there are some"),
    "energy": Method("handful.guidance.energy", "EnergyRequest", "all exemplars at once, for few of them"),
    "auto": Method("handful.guidance.auto", "AutoRequest", "energy; its strength is measured at each step"),
    "classifier": Method("handful.guidance.classifier", "ClassifierRequest", "a classifier of clean images, or CLIP"),
    "noisy-classifier": Method(
        "handful.guidance.noisy_classifier", "NoisyClassifierRequest", "a classifier trained on noisy images"
    ),
    "cvsg": Method("handful.guidance.cvsg", "CVSGRequest", "diverse, and near the exemplars (c-VSG)"),
    "vendi": Method("handful.guidance.vendi", "VendiRequest", "diverse images, without exemplars"),
    "particle": Method("handful.guidance.particle", "ParticleRequest", "images that push each other apart"),
    "cfg": Method("handful.guidance.cfg", "CFGRequest", "classifier-free guidance"),
    "apg": Method("handful.guidance.apg", "APGRequest", "classifier-free guidance, projected"),
    "cads": Method("handful.guidance.cads", "CADSRequest", "noise on the condition, beside cfg"),
    "inversion": Method("handful.guidance.inversion", "InversionRequest", "embeddings fitted to a new domain (CRDI)"),
}


def request_of(method: str) -> type[TermRequest]:
    """What a recipe may say of a method."""
    listed = METHODS[method]
    return getattr(import_module(listed.module), listed.request)


_HOME = {
    **dict.fromkeys(("ExemplarPotential", "Guidance", "Potential", "Pull", "Smoothing", "Step", "Timing"), "base"),
    "Auto": "auto",
    "CADS": "cads",
    "CFG": "cfg",
    "CVSG": "cvsg",
    "Chamfer": "chamfer",
    "chamfer_distance": "chamfer",
    "Classifier": "classifier",
    "Energy": "energy",
    "energy_distance": "energy",
    "Guided": "guided",
    "NoisyClassifier": "noisy_classifier",
    "Vendi": "vendi",
    "vendi_score": "vendi",
}

__all__ = ["METHODS", "Method", "request_of", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
