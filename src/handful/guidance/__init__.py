"""Guidance terms: one file a method; `Guided` adds their shifts to a denoiser."""

from handful.guidance.base import ExemplarPotential, Guidance, Potential, Pull, Step, Timing
from handful.guidance.cfg import CFG
from handful.guidance.chamfer import Chamfer, chamfer_distance
from handful.guidance.energy import Energy, energy_distance
from handful.guidance.guided import Guided

__all__ = [
    "CFG",
    "Chamfer",
    "Energy",
    "ExemplarPotential",
    "Guidance",
    "Guided",
    "Potential",
    "Pull",
    "Step",
    "Timing",
    "chamfer_distance",
    "energy_distance",
]
