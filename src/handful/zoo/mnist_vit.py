"""The published MNIST flow transformer (github sofia-dominguezc/MNIST-diffusion, MIT), in our own code.

Sixteen tokens of 7 x 7 pixels, two of the time and two of the class go through four post-norm transformer layers (Vaswani et
al. 2017, arXiv 1706.03762); the sixteen become the clean image. Images are in [0, 1], x_t = t x1 + (1 - t) noise, and the
network answers x1. Its card: `mnist/README.md`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WIDTH, PATCH, SIDE = 64, 7, 28  # channels of a token; pixels of its side; pixels of an image's


class MnistViT(nn.Module):
    """(x_t, t, label) -> x1; see the head of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIDE // PATCH) ** 2, WIDTH))
        # Neither random weights nor arange on the meta device: they alone import torch._dynamo, a second.
        self.y_encoder = nn.Embedding.from_pretrained(torch.zeros(11, 2 * WIDTH), freeze=False)
        layers = [nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True) for _ in range(4)]
        self.transformer = nn.ModuleList(layers)
        self.unpatch = nn.ConvTranspose2d(WIDTH, 1, PATCH, PATCH)
        frequencies = (-math.log(10000) * torch.arange(WIDTH, device="cpu") / (WIDTH - 1)).exp()
        self.register_buffer("frequencies", frequencies.to(torch.get_default_device()), persistent=False)

    def tokens(self, x_t: Tensor) -> Tensor:
        """The image's tokens before any layer: (n, 1, 28, 28) in [0, 1] -> (n, 16, 64)."""
        return self.patch_embed(x_t).flatten(2).transpose(1, 2) + self.pos_embed

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Estimates the clean image.

        Args:
            x_t: (n, 1, 28, 28), t x1 + (1 - t) noise with x1 in [0, 1].
            t: (n,), 0 for noise to 1 for a clean image.
            labels: int64 (n,), 0 to 9, or 10 for no class.

        Returns:
            x1, (n, 1, 28, 28).
        """
        angles = t[:, None] * self.get_buffer("frequencies")
        time = torch.cat([angles.sin(), angles.cos()], 1).unflatten(1, (2, WIDTH))
        x = torch.cat([self.tokens(x_t), time, self.y_encoder(labels).unflatten(1, (2, WIDTH))], 1)
        for layer in self.transformer:
            x = layer(x)
        side = SIDE // PATCH
        return self.unpatch(x[:, : side * side].transpose(1, 2).unflatten(2, (side, side)))
