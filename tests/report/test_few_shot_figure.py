"""The few-shot picture shows every row in its place, and the map beside them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from handful.errors import RequestError
from handful.report.few_shot_figure import few_shot_figure_png

TILE = 64


def flat(n: int, value: float, channels: int = 1, side: int = 8) -> Tensor:
    return torch.full((n, channels, side, side), value)


def drawn(*given: Tensor, **asked: object) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(few_shot_figure_png(*given, **asked))))  # type: ignore[arg-type]


def runs(line: np.ndarray, values: set[int]) -> list[tuple[int, int]]:
    """Values of a line of pixels with their lengths, of the tiles' own grays."""
    edges = np.flatnonzero(np.diff(line.astype(int))) + 1
    parts = np.split(line, edges)
    return [(int(part[0]), len(part)) for part in parts if int(part[0]) in values and len(part) >= 10]


def test_rows_come_in_order_and_columns_are_targets():
    first, second, third, fourth = (byte / 127.5 - 1 for byte in (26, 51, 76, 128))
    rows = {1: flat(3, second), 15: flat(3, third)}
    picture = drawn(flat(3, first), flat(5, fourth), reconstructions=rows, columns=3, rows=2)
    grays = {26, 51, 76, 128}
    found = [value for value, length in runs(picture[:, -40, 0], grays) if length == TILE]
    assert found == [26, 51, 76, 128], "the last column has one generated image less"
    inside = picture.shape[1] - 12 - 3 * (TILE + 2) + 10
    assert [value for value, length in runs(picture[:, inside, 0], grays) if length == TILE] == [26, 51, 76, 128, 128]
    assert [length for value, length in runs(picture[30, :, 0], grays)] == [TILE] * 3


def test_the_first_targets_are_shown_where_there_are_too_many():
    shades = torch.linspace(-0.9, 0.3, 5).view(5, 1, 1, 1).expand(5, 1, 8, 8)
    picture = drawn(shades, flat(1, 0.5), columns=2, reconstructions={"same": shades})
    grays = {round((float(shade) + 1) * 127.5) for shade in shades[:, 0, 0, 0]}
    assert [value for value, _ in runs(picture[30, :, 0], grays)] == sorted(grays)[:2]


def test_labels_are_written_at_the_left_of_each_kind_of_row():
    picture = drawn(flat(2, 1.0), flat(20, 1.0), reconstructions={8: flat(2, 1.0)}, columns=5)
    gutter = picture[:, 12:80].min(axis=(1, 2)) < 100
    starts = np.flatnonzero(np.diff(gutter.astype(int)) == 1)
    assert len(starts) == 3, "targets, eta = 8, generated: its second and third rows have none"


def test_the_map_lies_beside_the_rows_with_its_own_width():
    draw = np.random.default_rng(0)
    features = {"generated": draw.normal(size=(12, 4)), "targets": draw.normal(size=(2, 4))}
    plain = drawn(flat(2, -1.0), flat(6, 0.0))
    mapped = drawn(flat(2, -1.0), flat(6, 0.0), features=features)
    assert mapped.shape[1] == plain.shape[1] + 340 + 24
    assert (mapped[14:80, : plain.shape[1] - 12] == plain[14:80, : plain.shape[1] - 12]).all()
    beside = mapped[:, plain.shape[1] :].reshape(-1, 3)
    assert (beside == (200, 30, 30)).all(1).any(), "a star for each target"
    assert (beside == (230, 159, 0)).all(1).any()


def test_the_same_images_are_the_same_bytes():
    draw = np.random.default_rng(0)
    asked = {"features": {"generated": draw.normal(size=(12, 4))}}
    assert few_shot_figure_png(flat(1, 0.0, 3), flat(2, 0.5, 3), **asked) == few_shot_figure_png(
        flat(1, 0.0, 3), flat(2, 0.5, 3), **asked
    )


def test_rows_that_do_not_fit_the_targets_are_refused_by_name():
    with pytest.raises(RequestError, match=r"^reconstructions, eta = 8: 2: this is the number of images, for 3 targets"):
        few_shot_figure_png(flat(3, 0.0), flat(2, 0.0), reconstructions={8: flat(2, 0.0)})
    with pytest.raises(RequestError, match=r"^reconstructions, eta = 8: '9 x 9': this size differs"):
        few_shot_figure_png(flat(3, 0.0), flat(2, 0.0), reconstructions={8: flat(3, 0.0, side=9)})
    with pytest.raises(RequestError, match=r"^generated: 3: this is the number of channels, but `targets` has 1"):
        few_shot_figure_png(flat(3, 0.0), flat(2, 0.0, 3))
    with pytest.raises(RequestError, match=r"^targets: .*this set is empty"):
        few_shot_figure_png(flat(0, 0.0), flat(2, 0.0))
    with pytest.raises(RequestError, match=r"^columns: \(0, 3\): there is nothing to draw"):
        few_shot_figure_png(flat(3, 0.0), flat(2, 0.0), columns=0)
