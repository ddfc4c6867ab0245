"""Guidance terms: one file a method; `Guided` adds their shifts to a denoiser."""

from handful.guidance.base import ExemplarPotential, Guidance, Potential, Pull, Smoothing, Step, Timing
from handful.guidance.cads import CADS
from handful.guidance.cfg import CFG
from handful.guidance.chamfer import Chamfer, chamfer_distance
from handful.guidance.classifier import Classifier, NoisyClassifier
from handful.guidance.energy import Energy, energy_distance
from handful.guidance.guided import Guided
from handful.guidance.vendi import CVSG, Vendi, vendi_score

__all__ = [
    "CADS",
    "CFG",
    "CVSG",
    "Chamfer",
    "Classifier",
    "Energy",
    "ExemplarPotential",
    "Guidance",
    "Guided",
    "NoisyClassifier",
    "Potential",
    "Pull",
    "Smoothing",
    "Step",
    "Timing",
    "Vendi",
    "chamfer_distance",
    "energy_distance",
    "vendi_score",
]
