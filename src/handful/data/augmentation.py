"""Strong augmentation, each image by its own random draws: what a user with few images would try first.

Of photographs: crop and zoom, mirror, brightness, contrast, saturation, tint, gray, as in self-supervised learning (Chen et
al. 2020, arXiv 2002.05709, appendix A). In batches, and on the images' device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def stroke_view(images: Tensor, draw: torch.Generator) -> Tensor:
    """One random view of each drawing on paper of -1: turned, sheared, scaled and moved a little, in other focus and contrast.

    To 12 degrees, .2, 15 % each way and a fourteenth of the side; half-blurred over 3 x 3 pixels by a random share; ink times
    .7 to 1.3. What a user with a few drawings would try first, in the place of crops and mirrors, which change a digit.

    Args:
        images: (n, c, h, w) in [-1, 1].
        draw: On the CPU, so that a seed gives the same views on every device.

    Returns:
        The shape of images, in [-1, 1].
    """

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(len(images), generator=draw)).to(images)

    turn, shear, (wide, high) = uniform(-0.21, 0.21), uniform(-0.2, 0.2), (uniform(0.85, 1.15), uniform(0.85, 1.15))
    across = torch.stack([wide * turn.cos(), shear - turn.sin(), uniform(-1 / 7, 1 / 7)], 1)
    down = torch.stack([turn.sin(), high * turn.cos(), uniform(-1 / 7, 1 / 7)], 1)
    grid = affine_grid(torch.stack([across, down], 1), list(images.shape), align_corners=False)
    ink = grid_sample(images + 1, grid, align_corners=False)
    focus, contrast = (share.view(-1, 1, 1, 1) for share in (uniform(0, 1), uniform(0.7, 1.3)))
    blurred = avg_pool2d(ink, 3, 1, padding=1)
    return ((ink + focus * (blurred - ink)) * contrast).clamp(0, 2) - 1


def random_view(
    images: Tensor, draw: torch.Generator, *, area: float = 0.2, jitter: float = 0.4, gray: float = 0.2, mirrored: bool = True
) -> Tensor:
    """One random view of each image: cropped and brought back to size, mirrored, in other colours, sometimes gray.

    Args:
        images: (n, 3, h, w) in [-1, 1].
        draw: On the CPU, so that a seed gives the same views on every device.
        area: Smallest share of the image that a crop keeps, above 0; 1 keeps it whole, but for its aspect.
        jitter: Brightness, contrast and saturation are each multiplied by 1 - jitter to 1 + jitter, in four images of five;
            a quarter of it is the deviation of each channel's saturation from the others'. 0 leaves the colours.
        gray: Share of the jittered images that lose their colours.
        mirrored: Mirror every second image; not for digits and letters.

    Returns:
        (n, 3, h, w) in [-1, 1].
    """

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=draw)).to(images)

    side, aspect = uniform(area, 1.0).sqrt(), torch.exp(uniform(-0.29, 0.29)).sqrt()  # 3:4 to 4:3
    wide, high = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    mirror = torch.where((uniform(0, 1) < 0.5) & mirrored, -1.0, 1.0)
    none = torch.zeros_like(wide)
    moved = [uniform(-1, 1) * (1 - length) for length in (wide, high)]
    maps = torch.cat([mirror * wide, none, moved[0], none, high, moved[1]], 3).view(-1, 2, 3)
    grid = affine_grid(maps, list(images.shape), align_corners=False)
    seen = grid_sample((images + 1) / 2, grid, padding_mode="reflection", align_corners=False)

    bright = seen * uniform(1 - jitter, 1 + jitter)
    middle = bright.mean((1, 2, 3), keepdim=True)
    contrasted = middle + (bright - middle) * uniform(1 - jitter, 1 + jitter)
    luma = (contrasted * contrasted.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    saturation = torch.where(uniform(0, 1) < gray, 0.0, uniform(1 - jitter, 1 + jitter))
    tint = 1 + jitter / 4 * torch.randn(len(images), 3, 1, 1, generator=draw).to(images)
    coloured = luma + (contrasted - luma) * saturation * tint
    return 2 * torch.where(uniform(0, 1) < 0.8, coloured, seen).clamp(0, 1) - 1
