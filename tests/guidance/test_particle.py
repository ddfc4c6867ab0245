"""Particle guidance: the paper's potential, its gradient, and what it does to a cohort."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.drawn import normal
from support.runs import digits_recipe

from handful.data.images import read_image
from handful.errors import RequestError
from handful.features.registry import load_extractor
from handful.generate import prepare
from handful.generate.run import run
from handful.guidance.particle import Particle, repulsion


def test_it_is_half_the_papers_sum_of_kernels_at_the_medians_bandwidth():
    y = normal(5, 3)
    distances = sorted(float((y[i] - y[j]).norm()) for i in range(5) for j in range(i))
    h = distances[4] ** 2 / math.log(5)  # torch's median of ten is the lower of the middle two
    sums = sum(math.exp(-(float((y[i] - y[j]).norm()) ** 2) / h) for i in range(5) for j in range(5) if i != j)
    assert float(repulsion(y)) == pytest.approx(sums / 2, rel=1e-9)
    assert float(repulsion(y, 2.0)) > float(repulsion(y))


def test_its_gradient_is_the_papers_with_the_bandwidth_held():
    y = normal(5, 3).requires_grad_()
    (found,) = torch.autograd.grad(repulsion(y), y)
    with torch.no_grad():
        d = torch.cdist(y, y).square()
        h = d[torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)].median() / math.log(5)
        kernel = torch.exp(-d / h)
        wanted = torch.stack([sum(-2 / h * kernel[i, j] * (y[i] - y[j]) for j in range(5)) for i in range(5)])  # type: ignore
    torch.testing.assert_close(found, wanted)


def test_a_single_image_and_equal_images_have_a_finite_gradient_and_a_bandwidth_is_above_0():
    for y in (normal(1, 3), normal(1, 3).expand(4, 3).clone()):
        y.requires_grad_()
        assert torch.autograd.grad(repulsion(y), y)[0].isfinite().all()
    with pytest.raises(RequestError, match=r"^bandwidth: 0"):
        Particle(load_extractor("pixels"), 1.0, bandwidth=0.0)


def test_a_cohort_guided_by_it_lies_farther_apart(digits_folder: Path, tmp_path: Path):
    spreads = []
    for scale in (0.0, 1.0):
        term = {"method": "particle", "scale": scale, "features": "pixels", "jacobian": "gaussian", "every": 1}
        out = tmp_path / f"{scale}"
        assert run(prepare(digits_recipe(digits_folder, exemplars={}, guidance=[term]), out)).failures == []
        images = torch.stack([read_image(path, channels=1) for path in sorted((out / "images" / "1").glob("*.png"))[:4]])
        spreads.append(float(torch.pdist(images.flatten(1)).mean()))
    assert spreads[1] > 1.1 * spreads[0]
