"""A small vision transformer of 32x32 photographs: the judge that shares neither architecture nor objective with the guides.

A convolutional stem makes 8 x 8 tokens of an image (as in Xiao et al. 2021, arXiv 2106.14881), pre-norm transformer blocks
(Dosovitskiy et al. 2021, arXiv 2010.11929) mix them, 2 x 2 tokens are merged into one (Liu et al. 2021, arXiv 2103.14030), more
blocks follow, and the mean of the tokens is the image's features. There is no ReLU, no batch normalisation
and no label in how the features were learned; the linear layer was fitted afterwards, on frozen features, to name classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
"""Of the images that it takes, in [0, 1]."""
GRID, HEAD, EXPANSION = 8, 32, 2  # tokens a side; channels of a head; hidden layer over tokens


class Attention(nn.Module):
    """Multi-head self-attention of tokens (n, t, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, EXPANSION * width), nn.GELU(), nn.Linear(EXPANSION * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Merge(nn.Module):
    """Four neighbouring tokens of a square grid become one: (n, t, before) -> (n, t / 4, after)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * before), nn.Linear(4 * before, after)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        side = math.isqrt(t)
        squares = x.view(n, side // 2, 2, side // 2, 2, width).transpose(2, 3).reshape(n, t // 4, 4 * width)
        return self.reduce(self.norm(squares))


class CifarViT(nn.Module):
    """(n, 3, 32, 32), normalised by `MEAN` and `STD` -> logits (n, classes).

    Args:
        width: Of the features, D, and of the second stage's tokens; the first stage's are half as wide. A multiple of 64.
        depths: Transformer blocks of the two stages, on 8 x 8 and on 4 x 4 tokens.
    """

    mean, std = MEAN, STD

    def __init__(self, width: int = 128, depths: Sequence[int] = (2, 4), classes: int = 10) -> None:
        super().__init__()
        first, second = width // 2, width
        self.stem = nn.Sequential(  # 32 -> 16 -> 8 a side
            nn.Conv2d(3, first // 2, 3, 2, 1), nn.GELU(), nn.Conv2d(first // 2, first, 3, 2, 1)
        )
        self.position = nn.Parameter(0.02 * torch.randn(1, GRID * GRID, first))
        self.stage1 = nn.Sequential(*[Block(first, first // HEAD) for _ in range(depths[0])])
        self.merge = Merge(first, second)
        self.stage2 = nn.Sequential(*[Block(second, second // HEAD) for _ in range(depths[1])])
        self.norm = nn.LayerNorm(second)
        self.linear = nn.Linear(second, classes)

    def features(self, x: Tensor) -> Tensor:
        """The mean of the last tokens, (n, width)."""
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.position
        return self.norm(self.stage2(self.merge(self.stage1(tokens)))).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))
