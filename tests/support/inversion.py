"""A tiny eps network on a linear VP schedule, for the tests of inversion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from handful.core.denoiser import Condition, NetworkDenoiser
from handful.core.noise import VP, Levels
from handful.guidance.inversion import Embeddings

SHAPE = (2, 4, 4)
STEPS = 10
INTERVAL = (2, 8)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + (time / 500)[:, None, None, None]))


class Tiny(NetworkDenoiser):
    """An unconditional denoiser that counts what it was asked."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = Network().to(dtype)
        super().__init__(network, "eps", SHAPE, VP.linear())
        self.batches: list[int] = []

    def condition(self, labels: Any) -> Condition:
        return Condition()

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.batches.append(len(scaled))
        return self.network(scaled, time.to(scaled))


def path(steps: int = STEPS) -> Levels:
    return VP.linear().spacing(steps, "linspace")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets(n: int = 3) -> Tensor:
    return 0.8 * randn(n, *SHAPE, seed=5)


def embeddings(n: int = 3, segments: int = 3, **words: Any) -> Embeddings:
    """Random ones."""
    told: dict[str, Any] = {"interval": INTERVAL, "model": "digest", **words}
    return Embeddings(randn(n, segments, *SHAPE, seed=6), targets(n), path(), **told)
