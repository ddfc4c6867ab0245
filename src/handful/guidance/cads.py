"""CADS: condition-annealed diffusion sampling (Sadat et al., ICLR 2024, arXiv 2310.17347), usually beside CFG.

What the network is told, y (a prompt's embeddings, or a class's), is noised early on the path and clean at its end:

    y' = sqrt(g) y + s sqrt(1 - g) n,   n standard normal;   g: 1 below tau1, 0 above tau2 of the time left, linear between
    y'' = psi ((y' - mean(y')) / std(y') * std(y) + mean(y)) + (1 - psi) y'
"""

from __future__ import annotations

from handful.guidance.base import Guidance


class CADS(Guidance):
    """Placeholder until the helper's work lands."""
