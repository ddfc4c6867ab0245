"""The CIFAR ResNet of He et al. 2015 (arXiv 1512.03385), section 4.2, as akamaster/pytorch_resnet_cifar10 trained it.

A 3x3 stem of 16 channels, three stages of (depth - 2) / 6 basic blocks with 16, 32 and 64 channels, shortcuts without weights
(option A: every second pixel, padded with zero channels), average pooling, a linear layer. Names follow that checkpoint.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the images that it was trained on, in [0, 1]."""


class Block(nn.Module):
    """Basic block: x' + conv(relu(conv(x))), x' halved in size and padded where the stage changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.more = after // before, after - before
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(kept, (0, 0, 0, 0, self.more // 2, self.more // 2)))


class CifarResNet(nn.Module):
    """(n, 3, 32, 32), normalised by `MEAN` and `STD` -> logits (n, 10).

    Args:
        depth: 20, 32, 44, 56 or any other 6 n + 2.
    """

    mean, std = MEAN, STD

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16) for _ in range(blocks)])
        self.layer2 = nn.Sequential(*[Block(16 if i == 0 else 32, 32) for i in range(blocks)])
        self.layer3 = nn.Sequential(*[Block(32 if i == 0 else 64, 64) for i in range(blocks)])
        self.linear = nn.Linear(64, 10)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of the three stages: (n, 16, 32, 32), (n, 32, 16, 16), (n, 64, 8, 8)."""
        one = self.layer1(F.relu(self.bn1(self.conv1(x))))
        two = self.layer2(one)
        return [one, two, self.layer3(two)]

    def features(self, x: Tensor) -> Tensor:
        """The pooled last stage, (n, 64)."""
        return self.stages(x)[-1].mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))
