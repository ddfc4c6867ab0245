"""Which of a classifier's classes a name means: by name, by number, or as the user says. Never by the order of the alphabet."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Mapping, Sequence

from handful.errors import RequestError, counted, some_of

Places = Mapping[str, Sequence[int]]


def places_of(names: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of the classes that a text may mean: as it is written, without case, as one of several synonyms."""
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        synonyms = [name, plain(name), *map(plain, name.split(","))] if "," in name else [name, plain(name)]
        for text in dict.fromkeys(synonyms):
            places.setdefault(text, []).append(number)
    return places


def number_of(name: str, asked: str, names: Sequence[str], places: Places) -> int:
    """The number of the class that `asked` means; `name` is the class that it stands for.

    Raises:
        RequestError: If none or several are called so.
    """
    exact = [number for number in places.get(asked, ()) if names[number] == asked]
    found = exact if len(exact) == 1 else places.get(plain(asked), [])
    if len(found) == 1:
        return found[0]
    remedy = f"Give its number: classes: {{{name}: NUMBER}}."
    if found:
        listed = ", ".join(f"{number} ({names[number]})" for number in found[:5])
        raise RequestError("classes", asked, f"{len(found)} of the classifier's classes have this name: {listed}", remedy)
    near = difflib.get_close_matches(plain(asked), places, n=1)
    hint = f"; the nearest is '{near[0]}'" if near else ""
    raise RequestError(
        "classes",
        asked,
        f"the classifier has no class of this name among its {len(names)}{hint}",
        remedy.replace("NUMBER", "NUMBER or NAME")[:-1] + "; or by_label: true, if it numbers them as the model does.",
    )


def class_numbers(
    labels: Sequence[str], names: Sequence[str], count: int, said: Mapping[str, str | int] | None = None
) -> tuple[dict[str, int] | None, str]:
    """Which of a judge's classes each class of images is: as the user says, else all by name, else all by number.

    Args:
        names: What the judge calls its classes, by number; empty where it states none.
        said: By class of the images, the judge's class: its name or number.

    Returns:
        The numbers; or None, and why there is no certain answer.

    Raises:
        RequestError: If what the user says names a class that is not there.
    """
    if names and len(names) != count:
        return None, f"the judge has names of {counted(len(names), 'class')}, but {counted(count, 'logit')}"
    places, found = places_of(names), {}
    for label, meant in (said or {}).items():
        if label not in labels:
            raise RequestError(
                "judge_class", label, "no class of the images has this name", f"These are: {some_of(labels, 8)}."
            )
        number = int(meant) if str(meant).isdecimal() and str(meant) not in names else None
        if number is None:
            try:
                number = number_of(label, str(meant), names, places)
            except RequestError as error:
                remedy = f"Give one of: {some_of(names, 8)}." if names else f"Give a number, 0 to {count - 1}."
                raise RequestError("judge_class", f"{label}={meant}", error.problem, remedy) from None
        if number >= count:
            raise RequestError(
                "judge_class", f"{label}={meant}", f"the judge has {counted(count, 'class')}", f"Give 0 to {count - 1}."
            )
        found[label] = number
    others = [label for label in dict.fromkeys(labels) if label not in found]
    unknown: list[str] = []
    by_name: dict[str, int] = {}
    for label in others:
        try:
            by_name[label] = number_of(label, label, names, places)
        except RequestError:
            unknown.append(label)
    if unknown and all(label.isdecimal() and int(label) < count for label in others):
        numbers = {label: int(label) for label in others}
        # A judge whose names are numbers says itself which is which: "00" is its "0", wherever that stands.
        stated = {int(name): number for number, name in enumerate(names) if name.strip().isdecimal()}
        if not stated:
            meant = numbers
        else:
            meant = {label: stated[number] for label, number in numbers.items() if number in stated and len(stated) == count}
        # Two classes of one number: they are counted otherwise.
        if len({*meant.values(), *found.values()}) == len(others) + len(set(found.values())):
            by_name, unknown = meant, []
    if unknown:
        has = f"its classes are {some_of(names, 8)}" if names else f"it has no names for its {counted(count, 'class')}"
        remedy = f"give the judge's class: --judge-class {unknown[0]}={names[0] if names else 'NUMBER'}"
        return None, f"the judge has no class named {some_of(unknown, 8)}: {has}; {remedy}"
    return {label: (found | by_name)[label] for label in dict.fromkeys(labels)}, ""


def plain(name: str) -> str:
    """A name without what may differ where the same is meant: case, underscores, accents that macOS splits off."""
    return unicodedata.normalize("NFC", name).strip().casefold().replace("_", " ")
