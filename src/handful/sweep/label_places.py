"""Labels beside a picture's points that hide neither each other nor the points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

# Where a label may stand, in points from its own: (across, up, how it is aligned to that). The first that is free is taken.
_PLACES = (
    (7, 5, "left"),
    (-7, 5, "right"),
    (7, -12, "left"),
    (-7, -12, "right"),
    (0, 11, "center"),
    (0, -18, "center"),
    (14, -3, "left"),
    (-14, -3, "right"),
    (10, 16, "left"),
    (-10, 16, "right"),
    (10, -23, "left"),
    (-10, -23, "right"),
)
_HALF_MARKER = 5.0  # points


@dataclass(frozen=True)
class Label:
    """A text beside a point, in data coordinates."""

    x: float
    y: float
    text: str
    colour: str


def place_labels(axes: Axes, canvas: FigureCanvasAgg, points: Sequence[tuple[float, float]], labels: Sequence[Label]) -> None:
    """Writes the labels, one after the other, where they hide the least.

    Args:
        axes: Laid out and drawn already: a label's place depends on the final scale.
        points: All points that are drawn, in data coordinates.
    """
    scale, renderer = canvas.figure.dpi / 72, canvas.get_renderer()
    half = _HALF_MARKER * scale
    centres = [axes.transData.transform(point) for point in points]
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in centres]
    for label in labels:
        tried = []
        for place, (across, up, aligned) in enumerate(_PLACES):
            text = axes.annotate(
                label.text,
                (label.x, label.y),
                (across, up),
                textcoords="offset points",
                fontsize=7,
                color=label.colour,
                ha=aligned,
                zorder=6,
                annotation_clip=False,
            )
            box = text.get_window_extent(renderer)
            hidden = sum(_shared(box, other) for other in taken) + _outside(box, axes.bbox)
            tried.append((hidden, place, text, box))
            if not hidden:
                break
        _, _, kept, box = min(tried, key=lambda each: each[:2])
        for _, _, text, _ in tried:
            if text is not kept:
                text.remove()
        kept.set_in_layout(False)  # the layout is done, and must not shrink for it
        taken.append(box)


def _shared(one: Bbox, other: Bbox) -> float:
    """Area of two boxes' overlap, in square pixels."""
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else both.width * both.height


def _outside(box: Bbox, frame: Bbox) -> float:
    return box.width * box.height - _shared(box, frame)
