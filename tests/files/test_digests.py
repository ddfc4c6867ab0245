"""Marks of weights: shared by what shares weights, whatever is around them."""

from __future__ import annotations

import torch
from torch import nn

from handful.features.registry import load_extractor
from handful.features.softplus import softened
from handful.files.digests import marks


def test_a_smooth_or_renamed_network_has_the_marks_of_its_weights_and_another_training_none():
    guide, judge = load_extractor("digits-guide"), load_extractor("digits-judge")
    assert marks(softened(guide, 3.0)) == marks(guide) == marks(nn.Sequential(nn.Identity(), guide))
    assert not marks(guide) & marks(judge)
    assert marks(load_extractor("pixels")) == frozenset()


def test_what_all_fresh_networks_have_alike_is_no_mark():
    torch.manual_seed(0)
    one, other = (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2))
    assert not marks(one) & marks(other)
    assert len(marks(one)) == 2  # weight and bias of the first; ones and zeros say nothing
