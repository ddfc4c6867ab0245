"""Labels beside points."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from handful.sweep.label_places import Label, place_labels


def written(points, texts):
    """The labels' boxes in pixels, in the order asked, and the panel."""
    figure = Figure((5, 4), dpi=100)
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    canvas.draw()
    place_labels(axes, canvas, points, [Label(x, y, text, "black") for (x, y), text in zip(points, texts, strict=True)])
    found = {child.get_text(): child for child in axes.get_children() if isinstance(child, Text)}
    return [found[text].get_window_extent(canvas.get_renderer()) for text in texts], axes


def test_labels_of_near_points_do_not_hide_each_other():
    points = [(0.50, 0.50), (0.52, 0.51), (0.50, 0.53), (0.53, 0.48)]
    boxes, axes = written(points, ["one-method", "another-one", "a-third", "a-fourth"])
    for place, box in enumerate(boxes):
        assert not any(Bbox.intersection(box, other) for other in boxes[:place])
        assert not any(box.contains(*axes.transData.transform(point)) for point in points)


@pytest.mark.parametrize("corner", [(0.995, 0.995), (0.005, 0.995), (0.995, 0.005), (0.005, 0.005)])
def test_a_label_in_a_corner_stays_inside(corner):
    (box,), axes = written([corner], ["a-long-name-of-a-method"])
    assert axes.bbox.x0 <= box.x0
    assert box.x1 <= axes.bbox.x1
    assert axes.bbox.y0 <= box.y0
    assert box.y1 <= axes.bbox.y1


def test_every_label_is_written_once_even_where_there_is_no_room():
    points, texts = [(0.5, 0.5)] * 30, [f"method-{at}" for at in range(30)]
    boxes, axes = written(points, texts)
    assert len(boxes) == 30
    assert sum(isinstance(child, Text) and child.get_text().startswith("method") for child in axes.get_children()) == 30
