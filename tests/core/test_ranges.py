"""Images of another range or type than [-1, 1] never become numbers."""

import pytest
import torch

from handful.core.ranges import any_range, check_images
from handful.data.exemplars import Exemplars
from handful.errors import RequestError
from handful.features.extractor import pixels

REAL = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
WRONG = {
    "in [0, 1]": ((REAL + 1) / 2, "images in \\[0, 1\\]"),
    "in [0, 255]": ((REAL + 1) * 127.5, "127.5"),
    "bytes": (((REAL + 1) * 127.5).to(torch.uint8), "from_uint8"),
    "whole numbers": (REAL.long(), "from_uint8"),
    "standardised": (REAL * 4, "values in \\[-1, 1\\]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_extractors_and_exemplars_refuse_images_of_another_range(kind: str):
    images, said = WRONG[kind]
    with pytest.raises(RequestError, match=f"^images: .*{said}"):
        pixels()(images)
    with pytest.raises(RequestError, match=f"^exemplars.*{said}"):
        Exemplars.from_tensors({"a": images})


def test_what_can_be_an_image_passes_unchanged():
    dark = REAL.clone()
    dark[1:] = dark[1:].abs()  # bright ones beside one with dark pixels
    for images in (REAL, REAL.double(), REAL.half(), dark, REAL[:3].abs(), torch.zeros(9, 1, 2, 2), REAL * 1.3):
        assert check_images(images) is images
    with any_range():
        assert torch.equal(pixels()(REAL.abs()), REAL.abs().flatten(1))
    assert torch.equal(pixels()((REAL * 9).requires_grad_()), (REAL * 9).flatten(1))  # an estimate, in guidance
