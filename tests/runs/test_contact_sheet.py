"""The contact sheet shows pixels as they are, class by class, exemplars first."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from handful.errors import RequestError
from handful.runs.contact_sheet import contact_sheet, contact_sheet_png


def sheet(exemplars: dict, generated: dict, **options: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(contact_sheet_png(exemplars, generated, **options))))


def checks(side: int, channels: int = 1) -> torch.Tensor:
    """A checkerboard of black and white pixels, one image."""
    place = torch.arange(side)
    return ((place[:, None] + place[None]) % 2 * 2.0 - 1).expand(1, channels, side, side)


def test_enlarging_blurs_nothing():
    drawn = sheet({}, {"": checks(8)}, columns=1)
    found = [tuple(colour) for colour in np.unique(drawn[32:].reshape(-1, 3), axis=0)]
    assert set(found) <= {(0, 0, 0), (255, 255, 255), (120, 120, 120)}, "black, white, and the mark at the left"
    assert (drawn[:, :, 0] == 0).sum() == 64 * 64 // 2


@pytest.mark.parametrize(("side", "tile"), [(8, 64), (28, 56), (32, 64), (64, 64), (100, 100), (512, 128)])
def test_tiles_have_a_readable_size(side: int, tile: int):
    one, two = (sheet({}, {"a": torch.full((n, 3, side, side), -1.0)}, columns=2, rows=2) for n in (2, 4))
    assert two.shape[0] - one.shape[0] == tile + 2
    assert int((one.sum(2) == 0).sum()) >= 2 * tile * tile


def test_exemplars_lie_above_what_was_generated():
    white, gray = torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    drawn = sheet({"a": white}, {"a": gray})
    middle = drawn[:, 40, 0]
    assert middle.tolist().count(128) == 64
    first_gray = middle.tolist().index(128)
    assert (middle[first_gray - 64 - 6 : first_gray] == 255).all()


def test_classes_follow_the_order_of_the_generated_and_any_text_can_name_them():
    dark, light = torch.full((1, 1, 8, 8), -0.5), torch.full((1, 1, 8, 8), 0.5)
    drawn = sheet({}, {"猫 & 'x'": light, "b" * 300: dark})
    column = drawn[:, 40, 0].tolist()
    assert column.index(191) < column.index(64)


def test_the_same_images_are_the_same_bytes():
    images = {"a": checks(8), "b": checks(8)}
    assert contact_sheet_png(images, images) == contact_sheet_png(images, images)


def test_thousands_of_classes_stay_a_picture():
    many = {f"class {place}": checks(8).expand(3, -1, -1, -1) for place in range(1000)}
    assert sheet({}, many).shape[0] < 8000


def test_it_is_written_whole_and_nothing_to_draw_is_refused(tmp_path: Path):
    contact_sheet({}, {"a": checks(8, 3)}, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").mode == "RGB"
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    with pytest.raises(RequestError, match="nothing to draw"):
        contact_sheet({}, {}, tmp_path / "sheet.png")
