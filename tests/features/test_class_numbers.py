"""Which of a judge's classes a folder is: by name, by number, as the user says; never by the alphabet."""

from __future__ import annotations

import pytest

from handful.errors import RequestError
from handful.features.class_numbers import class_numbers

CIFAR = ("airplane", "automobile", "bird", "cat")


@pytest.mark.parametrize(
    ("labels", "names", "count", "said", "wanted"),
    [
        ([str(n) for n in (0, 1, 10, 11, 2)], (), 12, {}, {"0": 0, "1": 1, "10": 10, "11": 11, "2": 2}),
        (["cat", "Bird"], CIFAR, 4, {}, {"cat": 3, "Bird": 2}),
        (["1", "03"], CIFAR, 4, {}, {"1": 1, "03": 3}),  # numbers of named classes
        (["plane", "car", "cat"], CIFAR, 4, {"plane": "airplane", "car": 1}, {"plane": 0, "car": 1, "cat": 3}),
        (["1", "0"], ("0", "1"), 2, {}, {"1": 1, "0": 0}),
        (["1", "2"], ("2", "1", "0"), 3, {}, {"1": 1, "2": 0}),  # a name comes before a number
        (["00", "1"], ("1", "0"), 2, {}, {"00": 1, "1": 0}),  # names that are numbers are not numbers of other names
        (["cafe\u0301"], ("tea", "caf\u00e9"), 2, {}, {"cafe\u0301": 1}),  # macOS splits accents off
        (["great_white"], ("tench, Tinca tinca", "great white, shark"), 2, {}, {"great_white": 1}),
    ],
)
def test_classes_are_found_by_what_is_said_by_name_and_by_number(labels, names, count, said, wanted):
    assert class_numbers(labels, names, count, said) == (wanted, "")


@pytest.mark.parametrize(
    ("labels", "names", "count", "why"),
    [
        (["airplane", "car"], CIFAR, 4, "no class named car: its classes are airplane, automobile"),
        (["bird", "cat"], (), 2, "it has no names for its 2 classes"),  # the alphabet says nothing
        (["1", "4"], (), 4, "named 1, 4"),  # counted from 1, or of another judge
        (["0", "1"], ("1", "2"), 2, "its classes are 1, 2"),  # counted from 1 there, from 0 here
        (["01", "1"], (), 2, "named 01, 1"),
        (["ten", "1", "2"], (), 4, "named 1, 2"),  # "ten" is 2, so "2" must be another
        (["cat"], CIFAR, 5, "has names of 4 classes, but 5 logits"),
    ],
)
def test_where_nothing_is_certain_there_is_no_answer_and_the_reason(labels, names, count, why):
    found, text = class_numbers(labels, names, count, {"ten": 2} if "ten" in labels else {})
    assert found is None
    assert why in text


@pytest.mark.parametrize("said", [{"dog": "cat"}, {"car": "auto"}, {"car": 4}, {"car": "4"}])
def test_what_the_user_says_must_be_there(said):
    with pytest.raises(RequestError, match=r"^judge_class: "):
        class_numbers(["car"], CIFAR, 4, said)
