"""A tiny EDM-preconditioned network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


class Preconditioned(nn.Module):
    """A small network with EDM's preconditioning (the paper's table 1, last column)."""

    img_resolution, img_channels, label_dim, sigma_min, sigma_max, sigma_data = 8, 3, 4, 0, float("inf"), 0.5

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
            self.time, self.map_label = nn.Linear(1, 16), nn.Linear(4, 16, bias=False)
        nn.init.normal_(self.map_label.weight, generator=torch.Generator().manual_seed(2))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = sigma**2 + self.sigma_data**2
        hidden = self.first(x / total.sqrt()) + self.time(sigma.log().flatten(1) / 4)[..., None, None]
        if class_labels is not None:
            hidden = hidden + self.map_label(class_labels)[..., None, None]
        out = self.last(silu(hidden))
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * out
