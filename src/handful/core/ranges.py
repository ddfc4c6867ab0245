"""The one range of images, [-1, 1], asked for where images come in from outside: by extractors and by metrics of images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from handful.errors import RequestError, counted

SLACK = 1.0  # beyond [-1, 1]: resizing 8 x 8 digits by cubics overshoots by 0.6
SET = 4  # images; so many without one value below 0 are hardly real ones, each pixel of which would be brighter than gray

_ANY: ContextVar[bool] = ContextVar("any_range", default=False)


@contextmanager
def any_range() -> Iterator[None]:
    """No check of images inside: for estimates, which leave the range, and for images that a file's bytes prove to be in it.

    Also a decorator, `@any_range()`.
    """
    before = _ANY.set(True)
    try:
        yield
    finally:
        _ANY.reset(before)


def check_images(images: Tensor, field: str = "images") -> Tensor:
    """The images themselves, if they can be of the range [-1, 1]; inside of `any_range` always.

    Args:
        images: (n, c, h, w) or (c, h, w).
        field: What they are called in errors.

    Raises:
        RequestError: If they are whole numbers, go beyond the range, or are a set of 4 or more without any value below 0:
            images in [0, 1] would give plausible, wrong numbers.
    """
    if not images.dtype.is_floating_point:
        problem = "images are floating-point numbers in [-1, 1]"
        remedy = "Convert bytes by handful.data.images.from_uint8."
        raise RequestError(field, str(images.dtype).removeprefix("torch."), problem, remedy)
    if _ANY.get() or images.is_meta or not images.numel():
        return images
    low, high = (float(value) for value in images.detach().aminmax())
    shown = f"values from {low:.3g} to {high:.3g}"
    if low < -1 - SLACK or high > 1 + SLACK:
        remedy = "Convert them: images / 127.5 - 1." if high > 2 and low >= 0 else "Bring them to [-1, 1]."
        raise RequestError(field, shown, "images must have values in [-1, 1]", remedy)
    if low >= 0 and high > 0 and images.ndim == 4 and len(images) >= SET:
        raise RequestError(
            field,
            shown,
            f"no value of {counted(len(images), 'image')} is below 0, which looks like images in [0, 1]; [-1, 1] is needed",
            "Convert them: images * 2 - 1. If they are that bright, call it inside `with handful.core.ranges.any_range():`.",
        )
    return images
