"""The summary: the same numbers as the metrics give one by one, per class and pooled, beside an honest ceiling."""

import json
import math

import numpy as np
import pytest
import torch

from handful.errors import RequestError
from handful.metrics import frechet, prdc, summarize, vendi
from handful.metrics.catalogue import METRICS, PER_IMAGE
from handful.metrics.summary import Scores, plain


def three_classes(per_class=40, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(["cat", "dog", "emu"], per_class)
    centres = 6 * rng.normal(size=(3, 10)).repeat(per_class, axis=0)
    return centres + rng.normal(size=centres.shape), centres + 0.7 * rng.normal(size=centres.shape), labels


def assert_scores_are(scores, real, generated, k):
    expected = prdc(real, generated, k)
    for metric in ("precision", "recall", "density", "coverage", "f1", "n_real", "n_generated"):
        assert getattr(scores, metric) == getattr(expected, metric)
    assert scores.frechet == frechet(real, generated)
    assert (scores.vendi, scores.vendi_real) == (vendi(generated), vendi(real))
    assert scores.note == ""


def test_classes_and_pool_are_the_metrics_of_their_images():
    real, generated, labels = three_classes()
    order = np.random.default_rng(1).permutation(len(labels))
    found = summarize(real, generated[order], labels, labels[order], k=3)
    assert list(found.per_class) == ["cat", "dog", "emu"]
    assert (found.k, found.dimensions, found.seed) == (3, 10, 0)
    for name, group in found.per_class.items():
        assert_scores_are(group.generated, real[labels == name], generated[order][labels[order] == name], 3)
    assert_scores_are(found.pooled.generated, real, generated[order], 3)


def test_mean_over_classes_is_the_plain_mean():
    real, generated, labels = three_classes()
    found = summarize(real, generated, labels, labels)
    for metric in (metric.name for metric in METRICS if metric.usual and metric.name not in PER_IMAGE):
        values = [getattr(group.generated, metric) for group in found.per_class.values()]
        assert getattr(found.mean_over_classes.generated, metric) == pytest.approx(np.mean(values))


def test_the_ceiling_is_one_half_of_the_real_images_against_the_other():
    real, generated, labels = three_classes(per_class=41)
    found = summarize(real, generated, labels, labels)
    assert (found.per_class["dog"].ceiling.n_real, found.per_class["dog"].ceiling.n_generated) == (21, 20)
    assert (found.pooled.ceiling.n_real, found.pooled.ceiling.n_generated) == (63, 60)
    # Of the generated images it knows nothing.
    other = summarize(real, generated + 100, labels, labels)
    assert other.pooled.ceiling == found.pooled.ceiling
    assert other.pooled.generated.coverage == 0


def test_the_ceiling_of_a_good_generator_is_near_its_scores():
    """Generated from the very distribution; n = 600, so shares differ by 4 standard errors with chance below 1e-4."""
    rng = np.random.default_rng(2)
    real, generated = rng.normal(size=(1200, 6)), rng.normal(size=(600, 6))
    found = summarize(real, generated, np.zeros(1200), np.zeros(600))
    assert abs(found.pooled.ceiling.precision - found.pooled.generated.precision) < 0.1
    assert found.pooled.ceiling.frechet < 0.3


def test_the_seed_alone_decides_the_split():
    real, generated, labels = three_classes()
    first, again = (summarize(real, generated, labels, labels, seed=7) for _ in range(2))
    assert first == again
    other = summarize(real, generated, labels, labels, seed=8)
    assert other.pooled.ceiling != first.pooled.ceiling
    assert other.pooled.generated == first.pooled.generated


def test_a_classs_ceiling_does_not_depend_on_the_other_classes():
    real, generated, labels = three_classes()
    some = labels != "cat"
    whole = summarize(real, generated, labels, labels)
    part = summarize(real[some], generated[some], labels[some], labels[some])
    assert part.per_class == {name: whole.per_class[name] for name in ("dog", "emu")}


def test_no_ceiling_where_none_is_asked_for():
    real, generated, labels = three_classes()
    found = summarize(real, generated, labels, labels, ceiling=False)
    assert found.pooled.ceiling is None
    assert found.mean_over_classes.ceiling is None
    assert all(group.ceiling is None for group in found.per_class.values())


def test_a_class_too_small_for_k_has_none_and_says_why_while_others_go_on():
    real, generated, labels = three_classes()
    few = np.flatnonzero((labels != "dog") | (np.cumsum(labels == "dog") <= 4))
    found = summarize(real, generated[few], labels, labels[few], k=5)
    small = found.per_class["dog"].generated
    assert (small.precision, small.recall, small.density, small.coverage, small.f1) == (None,) * 5
    assert small.frechet is not None
    assert small.note == (
        "40 real and 4 generated images: precision, recall, density and coverage at k = 5 need 6 of each; k = 3 would "
        "work (--neighbours)"
    )
    assert found.per_class["cat"].generated.precision is not None
    mean = found.mean_over_classes.generated
    assert mean.precision == pytest.approx(
        (found.per_class["cat"].generated.precision + found.per_class["emu"].generated.precision) / 2
    )
    assert "precision over 2" in mean.note
    assert "frechet" not in mean.note


def test_a_k_that_a_note_proposes_works():
    real, generated, labels = three_classes()
    few = np.flatnonzero((labels != "dog") | (np.cumsum(labels == "dog") <= 4))
    assert summarize(real, generated[few], labels, labels[few], k=3).per_class["dog"].generated.precision is not None


def test_single_images_of_a_class_leave_only_vendi():
    real, generated, labels = three_classes()
    one = np.flatnonzero((labels != "dog") | (np.cumsum(labels == "dog") <= 1))
    found = summarize(real[one], generated[one], labels[one], labels[one])
    alone = found.per_class["dog"]
    assert (alone.generated.precision, alone.generated.frechet, alone.generated.vendi) == (None, None, 1)
    assert "Frechet distance needs 2 of each" in alone.generated.note
    assert alone.ceiling == Scores(1, 0, note="with only 1 real image there are no two halves to compare")


def test_labels_may_be_any_kind_and_meet_as_strings():
    real, generated, _ = three_classes()
    numbers = np.repeat([0, 1, 10], 40)
    expected = summarize(real, generated, numbers, numbers)
    assert list(expected.per_class) == ["0", "1", "10"]
    assert summarize(real, generated, torch.tensor(numbers), [str(n) for n in numbers]) == expected
    assert summarize(torch.from_numpy(real), torch.from_numpy(generated), numbers.tolist(), iter(numbers)) == expected


def test_the_dictionary_survives_json_and_holds_everything():
    real, generated, labels = three_classes()
    found = summarize(real, generated, labels, labels).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {"k", "dimensions", "seed", "pooled", "per_class", "mean_over_classes"}
    assert set(found["per_class"]["cat"]["ceiling"]) == {
        "n_real",
        "n_generated",
        *(metric.name for metric in METRICS if metric.usual),
        "note",
    }


def test_the_dictionary_has_none_for_nan_and_infinity():
    assert plain({"a": math.nan, "b": {"c": math.inf, "d": 1.5, "e": "x"}}) == {"a": None, "b": {"c": None, "d": 1.5, "e": "x"}}


def test_classes_on_one_side_only_are_named():
    real, generated, labels = three_classes()
    with pytest.raises(RequestError, match=r"real_labels: \['cat', 'emu'\]: no generated image has these classes\. Add such"):
        summarize(real, generated[labels == "dog"], labels, labels[labels == "dog"])
    with pytest.raises(RequestError, match=r"generated_labels: \['cow'\]: no real image"):
        summarize(real, generated, labels, np.where(np.arange(120) == 3, "cow", labels))
    with pytest.raises(RequestError, match=r"'15'\]: no generated image has these classes \(the first 8 of 29\)"):
        summarize(real[:30], generated[:30], range(30), [29] * 30)


def test_errors_name_the_argument_the_value_and_the_remedy():
    real, generated, labels = three_classes()
    with pytest.raises(RequestError, match="real_labels: 119: this is the number of labels, for 120 images"):
        summarize(real, generated, labels[1:], labels)
    with pytest.raises(RequestError, match="generated: 5: too few images for k = 5"):
        summarize(real, generated[:5], ["a"] * 120, ["a"] * 5)
    with pytest.raises(RequestError, match="generated: 9: the number of features differs"):
        summarize(real, generated[:, :9], labels, labels)
    with pytest.raises(RequestError, match="k: 0: this is too small"):
        summarize(real, generated, labels, labels, k=0)
