"""What will be generated: classes and their labels, cohorts, and the noise of every image.

Nothing here depends on what else is generated, on the order, or on how many workers there are: an image's noise comes from
(run seed, class name, index) alone, and a cohort is cut by its place in its class.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from handful.errors import RequestError, counted
from handful.features.class_numbers import places_of, plain
from handful.recipe.schema import did_you_mean

_QUOTED = """ A name with commas goes in quotes, --classes '"tench, Tinca tinca",otter', or by one of its synonyms."""
ONLY_CLASS = "images"  # what an unconditional model's one class is called where nobody named any


@dataclass(frozen=True)
class Cohort:
    """Images that are guided together: the unit of work, of randomness and of resume.

    Attributes:
        class_name: Also the name of its folder.
        label: The model's label; None for an unconditional model.
        index: Its place among the cohorts of its class.
        first, count: Its images are number first to first + count - 1 of the class.
    """

    class_name: str
    label: int | None
    index: int
    first: int
    count: int

    @property
    def indices(self) -> range:
        """The numbers of its images in the class."""
        return range(self.first, self.first + self.count)

    @property
    def key(self) -> str:
        """Its name on disk. The index comes last and has at least four digits, so no two cohorts share a name."""
        return f"{self.class_name}-{self.index:04d}"

    def __str__(self) -> str:
        return f"class '{self.class_name}', cohort {self.index}"


@dataclass(frozen=True)
class Labels:
    """Which label each class name has.

    Attributes:
        of: Label by class name, in the order of generation; None for an unconditional model.
        null_class: The label that stands for "no class"; None where there is none.
        model_classes: Names of all classes the model knows, by label; None where they stay unknown.
        notes: What had to be concluded, in words that the user should see.
    """

    of: dict[str, int | None]
    null_class: int | None = None
    model_classes: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)


def assign_labels(
    wanted: Sequence[str] | None,
    found: Sequence[str] | None,
    *,
    label_count: int,
    names: Sequence[str] = (),
    null_class: int | None = None,
    may_have_null: bool = True,
    said: Mapping[str, int | str] | None = None,
) -> Labels:
    """Finds the model's label for each class name.

    Names that the model knows come first; else names that are whole numbers are labels; else, with as many exemplar
    classes as the model has classes, alphabetical order is label order (as torchvision's ImageFolder has it). Models
    with one label more than there are names or exemplar classes, and no null class stated, have it last: so do all that
    were trained for classifier-free guidance with diffusers' `num_class_embeds`. Every conclusion gets a note.

    Args:
        wanted: The classes asked for; None for all there are.
        found: The classes of the exemplars; None where there are no exemplars.
        label_count: Labels that the model takes, the null class included; 0 for an unconditional model.
        names: The model's class names by label, without the null class; empty where unknown.
        null_class: The label for "no class", where it is known.
        may_have_null: Whether one of the labels may be the null class though the model does not state it.
        said: By class what the user says its label is: a number, a name of the model's, a synset of ImageNet.

    Raises:
        RequestError: If a name can't be matched, saying which names there are and how to state the mapping.
    """
    if wanted is not None and len(set(wanted)) < len(wanted):
        twice = next(name for name in wanted if list(wanted).count(name) > 1)
        raise RequestError("classes", twice, "this class is named twice", "Name each class once.")
    missing = [name for name in wanted or () if found is not None and name not in found]
    if missing:
        problem = "there are no exemplars of this class"
        raise RequestError("classes", missing[0], problem, did_you_mean(missing[0], found or (), "The exemplars' classes"))
    chosen = wanted if wanted is not None else found
    if said:
        chosen = list(said) if chosen is None else chosen
        if stray := [name for name in said if name not in {*chosen, *(found or ())}]:
            raise RequestError("model.labels", stray[0], "there is no such class", did_you_mean(stray[0], chosen, "Classes"))
        others = [name for name in chosen if name not in said]
        rest = assign_labels(
            others, None, label_count=label_count, names=names, null_class=null_class, may_have_null=may_have_null
        )
        labels = [label for label in range(label_count) if label != rest.null_class]
        meant = {name: rest.of[name] if name in rest.of else _as_said(name, said[name], names, labels) for name in chosen}
        return replace(rest, of=meant)
    if not label_count:
        return Labels(dict.fromkeys(chosen if chosen is not None else (ONLY_CLASS,)))

    notes: list[str] = []
    counts = len(names) or len(found or ())
    if may_have_null and null_class is None and counts == label_count - 1 and _could_be_all(names or found or (), label_count):
        null_class = label_count - 1
        notes.append(
            f"null class: label {null_class}, the last one, as the model has {counted(label_count, 'label')} and the data "
            f"{counted(counts, 'class')}"
        )
    labels = [label for label in range(label_count) if label != null_class]
    if names and len(names) != len(labels):
        remedy = "Give one name per label, in the labels' order, without the null class."
        raise RequestError(
            "model.classes", list(names), f"{counted(len(names), 'name')} for {counted(len(labels), 'class')}", remedy
        )
    by_name: Mapping[str, int] = dict(zip(names, labels, strict=False))
    _refuse_twice(names)

    if chosen is None:
        if not names:
            names = tuple(map(str, labels))
            if null_class is None:
                notes.append(
                    "null class: unknown, so every label is generated; if one label means 'no class', name it with --null-class"
                )
        return Labels(dict(zip(names, labels, strict=True)), null_class, tuple(names), notes)
    if by_name and all(name in by_name for name in chosen):
        return Labels({name: by_name[name] for name in chosen}, null_class, tuple(names), notes)
    meant = _by_synonym(chosen, names, labels)
    if meant is not None:
        notes += [f"labels: '{name}' is the model's '{whole}'" for name, (whole, _) in meant.items() if name != whole]
        return Labels({name: label for name, (_, label) in meant.items()}, null_class, tuple(names), notes)
    if (known := _by_synset(chosen, labels)) is not None:
        return Labels(
            dict(known), null_class, tuple(names) or None, [*notes, "labels: the class names are synsets of ImageNet"]
        )
    numbers = _as_labels(chosen, labels)
    if numbers is not None and not any(name in by_name for name in chosen):
        notes.append(f"labels: the class names are the labels {_range(list(numbers.values()))}")
        return Labels(dict(numbers), null_class, tuple(names) or None, notes)
    if by_name:
        unknown = next(name for name in chosen if name not in by_name)
        field_name = "classes" if wanted is not None else "exemplars"
        remedy = (
            did_you_mean(unknown, [f'"{name}"' if "," in name else name for name in names], "It knows")
            + " Rename the folder, or name all the model's classes in the order of its labels (--class-names)."
            + (_QUOTED if any("," in name for name in names) else "")
        )
        raise RequestError(field_name, unknown, "the model knows no such class", remedy)
    if found is not None and len(found) == len(labels):
        order = sorted(found)
        by_order = dict(zip(order, labels, strict=True))
        notes.append(
            "labels: in alphabetical order of the exemplar classes, as the model does not name its own: "
            + ", ".join(f"{label} = {name}" for name, label in list(by_order.items())[:10])
            + (", ..." if len(order) > 10 else "")
        )
        ordered = list(chosen) if wanted is not None else order
        return Labels({name: by_order[name] for name in ordered}, null_class, tuple(order), notes)
    listed = ", ".join(list(chosen)[:10]) + (", ..." if len(chosen) > 10 else "")
    problem = f"the model has {counted(len(labels), 'class')} without names, so these {len(chosen)} can't be matched: {listed}"
    remedy = (
        f"State the names of all {len(labels)} in the labels' order with model.classes (--class-names), and "
        'the label for "no class" with model.null_class (--null-class). Or name the folders by label.'
    )
    raise RequestError("classes" if wanted is not None else "exemplars", list(chosen), problem, remedy)


def _as_said(name: str, meant: int | str, names: Sequence[str], labels: Sequence[int]) -> int:
    """The label that the user says a class has."""

    def refused(problem: str, remedy: str) -> RequestError:
        return RequestError("model.labels", f"{name}: {meant}", problem, remedy)

    known = f"its labels are {_range(list(labels))}" if labels else "it takes no labels"
    text = str(meant).strip()
    if text.isdecimal() and text not in names:
        if int(text) not in labels:
            raise refused(f"the model has no such label: {known}", "Give one of these." if labels else "Leave labels out.")
        return int(text)
    if (found := _by_synonym([text], names, labels)) is not None:
        return found[text][1]
    if is_synset(text) and len(labels) == len(synsets()):
        if text not in synsets():
            raise refused("it is none of ImageNet's 1000 synsets", "Give the label itself, 0 to 999.")
        return labels[synsets()[text]]
    remedy = did_you_mean(text, names, "It knows") if names else "Give the label's number."
    raise refused(f"the model knows no such class; {known}", remedy)


def is_synset(text: str) -> bool:
    """Whether it is written as WordNet's synsets are: n02123045."""
    return re.fullmatch(r"n\d{8}", text) is not None


@cache
def synsets() -> dict[str, int]:
    """ImageNet's 1000 synsets of WordNet, each with its label."""
    text = files("handful.recipe").joinpath("imagenet_synsets.txt").read_text()
    return {name: label for label, name in enumerate(text.split())}


def _by_synset(chosen: Sequence[str], labels: Sequence[int]) -> dict[str, int] | None:
    """Labels by synset, where all classes are synsets and the model has as many labels as ImageNet."""
    if len(labels) != 1000 or not all(name in synsets() for name in chosen):
        return None
    return {name: labels[synsets()[name]] for name in chosen}


def _by_synonym(chosen: Sequence[str], names: Sequence[str], labels: Sequence[int]) -> dict[str, tuple[str, int]] | None:
    """By name, the model's whole name and its label, where each is one of a class's synonyms and of no other's; else None."""
    places = places_of(names)
    found = [places.get(name) or places.get(plain(name), []) for name in chosen]
    for at, (name, each) in enumerate(zip(chosen, found, strict=True)):
        if len(each) > 1:  # the first of a class's synonyms is the one that it is known by
            first = [place for place in each if plain(names[place].split(",")[0]) == plain(name)]
            found[at] = first if len(first) == 1 else each
    if any(len(each) != 1 for each in found) or len({each[0] for each in found}) < len(found):
        return None
    return {name: (names[each[0]], labels[each[0]]) for name, each in zip(chosen, found, strict=True)}


def _could_be_all(names: Sequence[str], label_count: int) -> bool:
    """Whether these can be all labels but the last: any names can, numbers only where the last label is not among them."""
    return not all(name.isdecimal() for name in names) or str(label_count - 1) not in names


def _as_labels(names: Sequence[str], labels: Sequence[int]) -> dict[str, int] | None:
    if not all(name.isascii() and name.isdecimal() for name in names):
        return None
    numbers = {name: int(name) for name in names}
    distinct = len(set(numbers.values())) == len(numbers)  # "1" and "01" are no two labels
    return numbers if distinct and set(numbers.values()) <= set(labels) else None


def _range(labels: list[int]) -> str:
    low, high = min(labels), max(labels)
    whole = sorted(labels) == list(range(low, high + 1)) and len(labels) > 2
    return f"{low} to {high}" if whole else ", ".join(map(str, sorted(labels)[:10])) + (", ..." if len(labels) > 10 else "")


def _refuse_twice(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        problem = "two of the model's classes have this same name"
        raise RequestError("model.classes", twice[0], problem, "Give distinct names with model.classes (--class-names).")


def plan_cohorts(
    labels: Mapping[str, int | None],
    per_class: int | Mapping[str, int],
    cohort: int,
    laid: Mapping[str, Sequence[int]] | None = None,
) -> list[Cohort]:
    """Cuts each class into cohorts; the last of a class may be smaller.

    Args:
        per_class: Images of each class, or by class.
        laid: By class the sizes of cohorts that are there already: they stay, and more images come after them in cohorts of
            their own. A smaller one among them stays as small.
    """
    planned = []
    for name, label in labels.items():
        sizes = list((laid or {}).get(name, ()))
        first, count = sum(sizes), per_class if isinstance(per_class, int) else per_class[name]
        sizes += [min(cohort, count - begin) for begin in range(first, count, cohort)]
        first = 0
        for index, size in enumerate(sizes):
            planned.append(Cohort(name, label, index, first, size))
            first += size
    return planned


def setting_of(cohort: int, shares: Sequence[float]) -> int:
    """Which setting of a mixture makes a class's cohort of this number: after each cohort all are as near to their shares as
    can be, so a class may grow."""
    made = [0] * len(shares)
    place = 0
    for number in range(1, cohort + 2):
        place = max(range(len(shares)), key=lambda i: (round(shares[i] * number / sum(shares) - made[i], 9), -i))
        made[place] += 1
    return place


def image_seed(run_seed: int, class_name: str, index: int) -> int:
    """The seed of one image: 63 bits of BLAKE2b over what names it."""
    named = f"{run_seed}\0{class_name}\0{index}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "big") >> 1


def start_places(run_seed: int, class_name: str, indices: Sequence[int], exemplars: int) -> list[int]:
    """Which of a class's exemplars each image starts from: each once in every so many images, in an order of their own."""
    orders: dict[int, list[int]] = {}
    for block in {index // exemplars for index in indices}:
        key = image_seed(run_seed, class_name, block * exemplars)
        # a place of its own among an image's random numbers (guidance/draws.py): 6
        draw = np.random.RandomState(np.random.Philox(key=key, counter=[0, 0, 0, 6]))
        orders[block] = draw.permutation(exemplars).tolist()
    return [orders[index // exemplars][index % exemplars] for index in indices]


class ImageNoise:
    """Standard normal noise of a cohort, each image's from a generator of its own: first the start, then step by step.

    NumPy's Philox under `RandomState`, whose streams NumPy promises never to change: torch's CPU generator uses 32 bits
    of a seed, so that among 100,000 images one pair would be expected to share its noise.

    Args:
        shape: (c, h, w) of one image's noise.
        device: Where it is wanted. It is always drawn on the CPU, so it is the same on every device.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self._generators = [np.random.RandomState(np.random.Philox(key=seed)) for seed in seeds]
        self._shape, self._device = shape, device

    def __call__(self) -> Tensor:
        """Fresh noise (n, c, h, w), float32."""
        drawn = [generator.standard_normal(self._shape).astype(np.float32) for generator in self._generators]
        return torch.from_numpy(np.stack(drawn)).to(self._device)
