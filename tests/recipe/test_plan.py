"""Labels are matched or refused, never guessed in silence; noise depends on the image's own name alone."""

from __future__ import annotations

import pytest
import torch

from handful.commands.shared import listed
from handful.errors import RequestError
from handful.recipe.plan import Cohort, ImageNoise, assign_labels, image_seed, plan_cohorts
from handful.runs.writers import check_class_names

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_names_that_the_model_knows_have_its_labels():
    labels = assign_labels(None, ["dog", "cat"], label_count=3, names=["cat", "bird", "dog"])
    assert labels.of == {"dog": 2, "cat": 0}
    assert labels.notes == []


def test_labels_skip_the_null_class():
    labels = assign_labels(["b"], None, label_count=3, names=["a", "b"], null_class=0)
    assert labels.of == {"b": 2}


def test_whole_numbers_are_labels():
    labels = assign_labels(None, ["7", "3"], label_count=10)
    assert labels.of == {"7": 7, "3": 3}
    assert "labels" in labels.notes[0]
    assert assign_labels(None, ["0001", "0000"], label_count=2).of == {"0001": 1, "0000": 0}


def test_as_many_exemplar_classes_as_the_model_has_are_in_alphabetical_order_and_announced():
    labels = assign_labels(None, CIFAR[::-1], label_count=10)
    assert labels.of == {name: place for place, name in enumerate(CIFAR)}
    assert "alphabetical" in labels.notes[0]
    assert "0 = airplane" in labels.notes[0]


def test_one_label_more_than_classes_is_the_null_class_and_announced():
    labels = assign_labels(["cat"], CIFAR, label_count=11)
    assert (labels.of, labels.null_class) == ({"cat": 3}, 10)
    assert "null class: label 10" in labels.notes[0]
    assert labels.model_classes == tuple(CIFAR)
    assert assign_labels(None, list("0123"), label_count=5).null_class == 4
    assert assign_labels(None, None, label_count=4, names=["a", "b", "c"]).null_class == 3


def test_the_last_label_is_not_taken_for_null_where_it_is_named():
    assert assign_labels(None, list("1234"), label_count=5).null_class is None


def test_stated_null_class_is_believed():
    labels = assign_labels(None, ["x", "y"], label_count=3, null_class=0)
    assert (labels.of, labels.null_class) == ({"x": 1, "y": 2}, 0)


def test_unconditional_models_take_any_classes():
    assert assign_labels(None, ["cat", "dog"], label_count=0).of == {"cat": None, "dog": None}
    assert assign_labels(None, None, label_count=0).of == {"images": None}


def test_without_exemplars_every_class_is_generated():
    assert assign_labels(None, None, label_count=2, names=["a", "b"]).of == {"a": 0, "b": 1}
    unnamed = assign_labels(None, None, label_count=3)
    assert unnamed.of == {"0": 0, "1": 1, "2": 2}
    assert "null class: unknown" in unnamed.notes[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"wanted": None, "found": ["cat", "dog"], "label_count": 10}, "--class-names"),
        ({"wanted": None, "found": ["cats"], "label_count": 2, "names": ["cat", "dog"]}, "Did you mean 'cat'?"),
        ({"wanted": ["cow"], "found": ["cat"], "label_count": 0}, "no exemplars"),
        ({"wanted": ["cat", "cat"], "found": None, "label_count": 0}, "twice"),
        ({"wanted": ["cat"], "found": None, "label_count": 5}, "cat"),
        ({"wanted": None, "found": ["1", "01"], "label_count": 5}, "1, 01"),
        ({"wanted": None, "found": ["5"], "label_count": 5}, "--class-names"),
        ({"wanted": None, "found": None, "label_count": 5, "names": ["a", "b"]}, "2 names for 5 classes"),
        ({"wanted": None, "found": None, "label_count": 2, "names": ["a", "a"]}, "distinct"),
    ],
)
def test_what_cannot_be_matched_is_refused_with_the_remedy(given: dict, said: str):
    with pytest.raises(RequestError, match=said.replace("?", r"\?")):
        assign_labels(given.pop("wanted"), given.pop("found"), **given)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc",
        ".hidden",
        "a.",
        " a",
        "a\n",
        "a\0",
        "NUL",
        "con.x",
        "metadata.jsonl",
        "x" * 201,
    ],
)
def test_class_names_that_lead_elsewhere_are_refused(name: str):
    with pytest.raises(RequestError, match="can't name a folder"):
        check_class_names([name], "classes")


def test_class_names_of_any_language_are_fine_but_not_twice():
    check_class_names(["Katze", "猫", "great white shark", "n01440764"], "classes")
    with pytest.raises(RequestError, match="same folder"):
        check_class_names(["Cat", "cat"], "classes")


def test_each_class_is_cut_into_cohorts_of_its_own():
    cohorts = plan_cohorts({"a": 0, "b": None}, per_class=5, cohort=2)
    assert [(c.class_name, c.index, c.first, c.count) for c in cohorts] == [
        ("a", 0, 0, 2),
        ("a", 1, 2, 2),
        ("a", 2, 4, 1),
        ("b", 0, 0, 2),
        ("b", 1, 2, 2),
        ("b", 2, 4, 1),
    ]


def test_no_two_cohorts_share_a_key():
    tricky = [Cohort(name, 0, index, 0, 1) for name in ("a", "a-0000", "a-0001", "a-00001") for index in (0, 1, 10000)]
    assert len({cohort.key for cohort in tricky}) == len(tricky)


def test_an_images_seed_depends_on_its_name_alone_and_fits_a_signed_column():
    assert image_seed(0, "cat", 1) == image_seed(0, "cat", 1) < 2**63
    seeds = {image_seed(run, name, index) for run in range(3) for name in ("cat", "dog", "1") for index in range(100)}
    assert len(seeds) == 900
    assert image_seed(1, "1", 11) != image_seed(11, "1", 1)


def test_an_images_noise_does_not_depend_on_its_neighbours():
    alone, together = ImageNoise([5], (2, 3, 4)), ImageNoise([9, 5, 1], (2, 3, 4))
    for _ in range(3):
        assert torch.equal(alone()[0], together()[1])


def test_seeds_that_share_their_low_32_bits_have_different_noise():
    one, other = ImageNoise([1], (1, 8, 8))(), ImageNoise([1 + 2**32], (1, 8, 8))()
    assert not torch.equal(one, other)


def test_noise_is_standard_normal():
    """Mean and variance of 40,000 numbers; false alarm: below 1e-6 each (5 standard errors)."""
    drawn = ImageNoise(list(range(100)), (1, 20, 20))()
    assert drawn.dtype == torch.float32
    assert abs(float(drawn.mean())) < 5 / 200
    assert abs(float(drawn.var()) - 1) < 5 * (2 / 40_000) ** 0.5


def test_a_model_that_says_itself_whether_it_has_a_null_class_is_not_guessed_to_have_one():
    found = [f"{label}" for label in range(9)]
    assert assign_labels(None, found, label_count=10).null_class == 9
    assert assign_labels(None, found, label_count=10, may_have_null=False).null_class is None


IMAGENET = ("tench, Tinca tinca", "great white shark, white shark", "crane", "crane, bird")


def test_a_class_is_found_by_its_whole_name_or_by_a_synonym_of_its_own():
    found = assign_labels(["tench", "White_Shark", "tench, Tinca tinca"][:2], None, label_count=4, names=IMAGENET)
    assert found.of == {"tench": 0, "White_Shark": 1}
    assert found.notes[0] == "labels: 'tench' is the model's 'tench, Tinca tinca'"
    assert assign_labels(["crane"], None, label_count=4, names=IMAGENET).of == {"crane": 2}, "the exact name wins"
    for unclear in (["tench", "Tinca tinca"], ["bird", "sparrow"]):
        with pytest.raises(RequestError, match=r"""--classes '"tench, Tinca tinca",otter'"""):
            assign_labels(unclear, None, label_count=4, names=IMAGENET)


def test_the_user_says_a_label_by_number_name_or_synset():
    said = {"cat": 281, "pet": "285", "fox": "n02119022", "shark": 2}
    found = assign_labels(None, ["pet", "cat", "fox", "shark"], label_count=1001, null_class=1000, said=said)
    assert found.of == {"pet": 285, "cat": 281, "fox": 277, "shark": 2}
    named = assign_labels(["fish", "crane"], None, label_count=4, names=IMAGENET, said={"fish": "White Shark"})
    assert named.of == {"fish": 1, "crane": 2}
    twice = ("white wolf, wolf", "wolf, gray wolf", "fox")  # known by their first synonym
    assert assign_labels(["Wolf"], None, label_count=3, names=twice).of == {"Wolf": 1}
    assert assign_labels(None, ["n02123045"], label_count=1001, null_class=1000).of == {"n02123045": 281}
    for wrong, why in (
        ({"cat": 1000}, "no such label"),
        ({"cat": "n01234567"}, "none of ImageNet's"),
        ({"dog": 3}, "no such class"),
    ):
        with pytest.raises(RequestError, match=why):
            assign_labels(["cat"], None, label_count=1001, null_class=1000, said=wrong)
    with pytest.raises(RequestError, match=r"model\.labels.*'cat: tenh'.*tench"):
        assign_labels(["cat"], None, label_count=4, names=IMAGENET, said={"cat": "tenh"})


def test_names_with_commas_go_in_quotes_on_the_command_line():
    assert listed('"tench, Tinca tinca", otter') == ["tench, Tinca tinca", "otter"]
    assert listed("a, b") == ["a", "b"]
    assert listed(None) is None
