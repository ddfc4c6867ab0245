"""Measurements of a generated set against a real one, from their features; numpy only, torch is never imported here.

What compares images themselves needs torch and is imported by its own name: `perceptual` (distances), `lpips`, `few_shot`.
"""

from handful.metrics.copying import copied_share
from handful.metrics.frechet import frechet, frechet_from_moments
from handful.metrics.kernel import authenticity, cmmd, frechet_at_infinity, kernel_distance
from handful.metrics.neighbours import nearest, neighbour_radii
from handful.metrics.prdc import PRDC, prdc
from handful.metrics.summary import Summary, summarize
from handful.metrics.vendi import vendi

__all__ = [
    "PRDC",
    "Summary",
    "authenticity",
    "cmmd",
    "copied_share",
    "frechet",
    "frechet_at_infinity",
    "frechet_from_moments",
    "kernel_distance",
    "nearest",
    "neighbour_radii",
    "prdc",
    "summarize",
    "vendi",
]
