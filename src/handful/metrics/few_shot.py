"""Measurements of few-shot generation: many images made from N targets (Cao & Gong, ECCV 2024).

    reconstruction      how near each target is to what its embedding alone gives back: MSE, SSIM, perceptual
    Intra-distance      variety around each target: Intra-LPIPS of Ojha et al. (CVPR 2021), with any perceptual distance
    MC-SSIM             mode coverage: has each real image of the domain a generated one that looks like it?
    nearest target      copying

SSIM is that of Wang et al. (2004): a Gaussian window of 11 pixels and deviation 1.5. Its luminance term is meant for values
that are not negative, so images in [-1, 1] are compared as (x + 1) / 2 with a data range of 1, as others do from their bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from handful.core.ranges import any_range
from handful.errors import RequestError, counted
from handful.metrics._features import as_count
from handful.metrics.copying import share_nearer
from handful.metrics.perceptual import MOST_VALUES, PerceptualDistance, as_image_pair

WINDOW, DEVIATION = 11, 1.5  # Wang et al.
_PIXELS = 1 << 17  # values compared at once; SSIM's scratch is some thirty times that, and the fastest where it fits a cache


@dataclass(frozen=True)
class Mean:
    """A mean over images with its standard error, which one image does not give (None)."""

    mean: float
    standard_error: float | None


@dataclass(frozen=True)
class Reconstruction:
    """How near images are to what was reconstructed of them.

    Attributes:
        n: Pairs of images.
        mse: Mean squared error on the scale of [-1, 1]: 0 to 4.
        ssim: -1 to 1, 1 for equal images.
        perceptual: By the distance named in `distance`; None without one.
        window: Pixels of SSIM's window.
    """

    n: int
    mse: Mean
    ssim: Mean
    perceptual: Mean | None
    distance: str | None
    window: int


@dataclass(frozen=True)
class IntraDistance:
    """Variety inside the clusters of generated images around the targets.

    Attributes:
        mean: Over targets, clusters of fewer than two images counting 0.
        values: (k,) mean pairwise distance inside each target's cluster.
        sizes: (k,) generated images that are nearest to each target; their sum is n.
        compared: (k,) images of each cluster that were compared: `sizes` capped at `most`.
    """

    mean: float
    values: tuple[float, ...]
    sizes: tuple[int, ...]
    compared: tuple[int, ...]
    distance: str


@dataclass(frozen=True)
class ModeCoverage:
    """How well generated images cover real ones.

    Attributes:
        mean: MC-SSIM, -1 to 1: higher covers more. It grows with the number of generated images: compare at equal numbers.
        values: (m,) the largest SSIM of each real image to any generated one.
        nearest: (m,) which generated image that is.
        window: Pixels of SSIM's window.
    """

    mean: float
    values: tuple[float, ...]
    nearest: tuple[int, ...]
    window: int


def intra_distance(
    generated: Tensor,
    targets: Tensor,
    distance: PerceptualDistance,
    *,
    most: int | None = 50,
    seed: int = 0,
    most_values: int = MOST_VALUES,
) -> IntraDistance:
    """Mean pairwise distance inside the clusters of generated images around targets (Intra-LPIPS, where LPIPS measures).

    Every generated image goes to its nearest target, by the same distance. High is varied; far off the domain is varied too,
    so read it beside the Frechet distance. Copies of the targets score near 0.

    Args:
        generated: (n, c, h, w) in [-1, 1].
        targets: (k, c, h, w). Of targets that are equal to the bit the first gets all; the others' clusters are empty.
        distance: Any (`handful.metrics.perceptual`).
        most: Images of a cluster to compare, drawn at random where there are more; None: all. The original takes 50.
        seed: Of that draw; a cluster's draw depends on nothing but its size, this and its target's place.
        most_values: Embedded values held at once (`PerceptualDistance.pairs`).

    Raises:
        RequestError: If a set is empty, the sets differ in size or channels, or `most` is below 2.
    """
    if most is not None and as_count(most, "most") < 2:
        raise RequestError("most", most, "a single image has no distances to others", "Give 2 or more; 50 is usual.")
    generated, targets = as_image_pair(generated, targets, "generated", "targets")
    owner = nearest_targets(generated, targets, distance, most_values=most_values)[1]
    values, sizes, compared = [], [], []
    for place in range(len(targets)):
        members = np.flatnonzero(owner == place)
        sizes.append(len(members))
        if most is not None and len(members) > most:
            members = np.sort(np.random.default_rng([seed, place]).permutation(members)[:most])
        compared.append(len(members))
        values.append(_mean_pairwise(generated[torch.from_numpy(members)], distance, most_values))
    return IntraDistance(math.fsum(values) / len(values), tuple(values), tuple(sizes), tuple(compared), distance.name)


@any_range()  # the sets were looked at as a whole; a cluster may well be bright
def _mean_pairwise(images: Tensor, distance: PerceptualDistance, most_values: int) -> float:
    n = len(images)
    return float(distance.pairs(images, most_values=most_values).sum()) / (n * (n - 1)) if n > 1 else 0.0


def nearest_targets(
    generated: Tensor, targets: Tensor, distance: PerceptualDistance, *, most_values: int = MOST_VALUES
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest target of every generated image.

    Args:
        generated: (n, c, h, w) in [-1, 1].
        targets: (k, c, h, w).

    Returns:
        distance: (n,) float64, >= 0; `copied` says which of them are suspicious.
        index: (n,) int64, row of the target; of equal targets the first.

    Raises:
        RequestError: If a set is empty, or the sets differ in size or channels.
    """
    generated, targets = as_image_pair(generated, targets, "generated", "targets")
    found = distance.pairs(generated, targets, most_values=most_values)
    # A network may give equal images of one batch features that differ in the last bit.
    first: dict[bytes, int] = {}
    same = np.array([first.setdefault(target.cpu().numpy().tobytes(), place) for place, target in enumerate(targets)])
    index = same[found.argmin(1)]
    return found[np.arange(len(found)), index], index


def copied(
    generated: Tensor, targets: Tensor, held_out: Tensor, distance: PerceptualDistance, *, quantile: float = 0.01
) -> float:
    """Share of generated images nearer to a target than nearly all real images of the domain are.

    Args:
        generated: (n, c, h, w) in [-1, 1].
        targets: (k, c, h, w), what the images were generated from.
        held_out: (m, c, h, w), other real images of the domain.
        distance: Any; pixels find copies, semantic features find paraphrases.
        quantile: As in `handful.metrics.copied_share`: held-out images score so much themselves.

    Returns:
        0 to 1.

    Raises:
        RequestError: If a set is empty, or the sets differ in size or channels.
    """
    as_image_pair(targets, held_out, "targets", "held_out")
    real = nearest_targets(held_out, targets, distance)[0]
    return share_nearer(nearest_targets(generated, targets, distance)[0], real, quantile)


def reconstruction(real: Tensor, reconstructed: Tensor, distance: PerceptualDistance | None = None) -> Reconstruction:
    """How near reconstructions are to their images, with standard errors over images.

    Args:
        real: (n, c, h, w) in [-1, 1].
        reconstructed: (n, c, h, w), image i of image i.
        distance: A perceptual distance to measure by as well.

    Raises:
        RequestError: If a set is empty, or they differ in number, size or channels; or images are too small for SSIM.
    """
    real, reconstructed = as_image_pair(real, reconstructed, "real", "reconstructed")
    if len(real) != len(reconstructed):
        problem = f"this is the number of reconstructions, for {counted(len(real), 'image')}"
        raise RequestError("reconstructed", len(reconstructed), problem, "Give one for each image.")
    window = ssim_window(*real.shape[2:])
    squares = (real - reconstructed).double().square().flatten(1).mean(1).cpu().numpy()
    perceptual = None if distance is None else _mean(distance(real, reconstructed))
    return Reconstruction(
        len(real), _mean(squares), _mean(ssim(real, reconstructed)), perceptual, distance and distance.name, window
    )


def _mean(values: np.ndarray) -> Mean:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(float(values.mean()), error)


def mc_ssim(real_targets: Tensor, generated: Tensor, *, most_pixels: int = _PIXELS) -> ModeCoverage:
    """Mode coverage by SSIM: for each real image the largest SSIM to any generated one, and the mean of these.

    It takes m n comparisons, on the device where the images are, in float32; the largest are measured again in float64.

    Args:
        real_targets: (m, c, h, w) in [-1, 1].
        generated: (n, c, h, w).
        most_pixels: Values compared at once, which bounds memory and changes nothing else.

    Raises:
        RequestError: If a set is empty, the sets differ in size or channels, or images are too small for SSIM.
    """
    real_targets, generated = as_image_pair(real_targets, generated, "real_targets", "generated")
    window = ssim_window(*real_targets.shape[2:])
    values, nearest = [], []
    for target in real_targets:
        best = int(_ssim(target.expand_as(generated), generated, most_pixels, torch.float32).argmax())
        nearest.append(best)
        values.append(float(_ssim(target[None], generated[best : best + 1], most_pixels)[0]))
    return ModeCoverage(math.fsum(values) / len(values), tuple(values), tuple(nearest), window)


def ssim_window(height: int, width: int) -> int:
    """Pixels a side of SSIM's window: 11, or the largest odd number that smaller images hold (7 for 8 x 8 digits).

    Its deviation shrinks with it: 1.5 window / 11.

    Raises:
        RequestError: Below 3 x 3 pixels: a window of one pixel would compare brightness alone.
    """
    smallest = min(height, width)
    if smallest < 3:
        raise RequestError("images", f"{height} x {width}", "they are too small for SSIM", "Give 3 x 3 pixels or more.")
    return min(WINDOW, smallest - 1 + smallest % 2)


def ssim(first: Tensor, second: Tensor, *, most_pixels: int = _PIXELS) -> np.ndarray:
    """SSIM of image i of `first` and image i of `second`, by torchmetrics: edges mirrored, mean over channels and places.

    Args:
        first, second: Images (n, c, h, w) in [-1, 1].
        most_pixels: Values compared at once.

    Returns:
        (n,) float64, -1 to 1.

    Raises:
        RequestError: If the sets are empty, differ in shape or number, or are too small (`ssim_window`).
    """
    first, second = as_image_pair(first, second, "first", "second")
    if len(first) != len(second):
        raise RequestError("second", len(second), f"this is the number of images, but `first` has {len(first)}", "Give pairs.")
    return _ssim(first, second, most_pixels)


def _ssim(first: Tensor, second: Tensor, most_pixels: int, dtype: torch.dtype = torch.float64) -> np.ndarray:
    """`ssim` of checked images; float32 is ten times as fast, and wrong by up to 3e-4 where images are flat."""
    from torchmetrics.functional.image.ssim import structural_similarity_index_measure  # takes seconds to import

    # torchmetrics takes a Gaussian window's size from its deviation, and ignores `kernel_size`.
    deviation = DEVIATION * ssim_window(*first.shape[2:]) / WINDOW
    size = max(1, most_pixels // first[0].numel())
    found = [
        structural_similarity_index_measure(
            (a.to(dtype) + 1) / 2, (b.to(dtype) + 1) / 2, sigma=deviation, data_range=1.0, reduction="none"
        )
        for a, b in zip(first.split(size), second.split(size), strict=True)
    ]
    return torch.cat([torch.as_tensor(part).double().reshape(-1) for part in found]).cpu().numpy()
