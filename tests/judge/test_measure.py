"""Sets measured by the row."""

from __future__ import annotations

import pytest
import torch
from support.sweeps import write_digits

from handful.data.images import LabelledImages, read_folder
from handful.features.registry import load_extractor
from handful.judge.measure import Referee, Training, train_on


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Real digits and others to judge."""
    root = write_digits(tmp_path_factory.mktemp("digits"))
    return read_folder(root / "real", channels=1), read_folder(root / "pool", channels=1)


def test_utility_is_the_mean_over_the_classifiers_and_has_their_spread(parts):
    real, made = parts
    referee = Referee(real, load_extractor("pixels"), k=3, audit=False)

    class Always(torch.nn.Module):
        """Says "1" of everything: right for half of the images."""

        def forward(self, images):
            return torch.tensor([1.0, 0.0]).expand(len(images), 2)

    trained = train_on(made, real.classes, Training(steps=60, seeds=1, augment=False))
    alone = referee.row(made, classifiers=trained)
    assert alone["utility"] > 0.8
    assert alone["utility_spread"] is None
    both = referee.row(made, classifiers=[*trained, Always()])
    assert both["utility"] == pytest.approx((alone["utility"] + 0.5) / 2)
    assert both["utility_spread"] == pytest.approx((alone["utility"] - 0.5) / 2**0.5)
    assert referee.row(made)["utility"] is None


def test_classifiers_are_tested_where_it_is_said(parts):
    real, made = parts
    trained = train_on(made, real.classes, Training(steps=60, seeds=1, augment=False))
    swapped = LabelledImages(real.images, [{"1": "4", "4": "1"}[name] for name in real.labels], real.files)
    found = [
        Referee(real, load_extractor("pixels"), k=3, audit=False, test=test).row(made, classifiers=trained)["utility"]
        for test in (None, swapped)
    ]
    assert found[1] == pytest.approx(1 - found[0])


def test_exemplars_themselves_are_copies_and_without_exemplars_none_are_counted(parts):
    real, made = parts
    referee = Referee(real, load_extractor("pixels"), k=3, audit=False)
    assert referee.row(made, exemplars=made.by_class())["copied"] == 1.0
    assert referee.row(made)["copied"] is None


def test_what_one_referee_sees_serves_the_others(parts):
    real, made = parts
    halves = [LabelledImages(real.images[at::2], real.labels[at::2], real.files[at::2]) for at in (0, 1)]
    one, other = (Referee(half, load_extractor("digits-judge"), k=3, classes=[str(d) for d in range(10)]) for half in halves)
    seen = one.see(made)
    assert other.row(made, seen=seen) == other.row(made)
    assert one.row(made, seen=seen) != other.row(made, seen=seen)
    assert one.row(made)["robust_f1"] is not None
