"""Which folder of a test set is which class: ImageNet-V2 has numbers for names, Sketch, R and A have synsets, a run has words.

A class list says what a class is called. Three kinds are read: `n01440764 tench, Tinca tinca`, a line for each class in the
order of the labels (LOC_synset_mapping.txt); `{"0": ["n01440764", "tench"]}` (imagenet_class_index.json); and CSV with the
columns folder and class.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from handful.data.archives import read_table
from handful.data.sources import LabelledFiles
from handful.errors import RequestError, counted, first_line, some_of
from handful.features.class_numbers import plain
from handful.recipe.plan import is_synset


class Entry(NamedTuple):
    """What one class is called: its whole names, such as "tench, Tinca tinca", and these with every synonym."""

    whole: set[str]
    every: set[str]


_REMEDY = (
    'Write lines such as "n01440764 tench, Tinca tinca" in the order of the labels, JSON such as {"0": ["n01440764", "tench"]},'
    " or CSV with the columns folder and class."
)


def read_class_list(path: str | Path, field: str = "ood_classes") -> list[Entry]:
    """Reads a list of classes: of each everything that it is called, ImageNet's with their numbers.

    Raises:
        RequestError: It can't be read, or is none of the three kinds.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".csv":
        rows = read_table(path, field)
        if not rows or not {"folder", "class"} <= set(rows[0]):
            problem = f"it lacks a column; it has {', '.join(map(str, rows[0])) if rows else 'no rows'}"
            raise RequestError(field, path, problem, _REMEDY)
        together: dict[str, list[str]] = {}
        for row in rows:
            together.setdefault((row["class"] or "").strip(), []).append((row["folder"] or "").strip())
        return [_entry([name, *folders]) for name, folders in together.items()]
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            held = json.loads(text)
            return [_entry([number, *map(str, names)]) for number, names in sorted(held.items(), key=lambda one: int(one[0]))]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RequestError(field, path, f"it can't be read ({first_line(error)})", _REMEDY) from None
    lines = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    if not lines or not all(is_synset(synset) and names for synset, _, names in lines):
        wrong = next((number for number, (synset, _, names) in enumerate(lines, 1) if not is_synset(synset) or not names), 1)
        raise RequestError(field, path, f"line {wrong} does not hold a synset and a name", _REMEDY)
    return [_entry([str(number), synset, names.strip()]) for number, (synset, _, names) in enumerate(lines)]


def _entry(names: Sequence[str]) -> Entry:
    whole = {plain(name) for name in names if name.strip()}
    return Entry(whole, whole | {plain(part) for name in names for part in name.split(",") if part.strip()})


def meanings(folders: Sequence[str], classes: Sequence[str], entries: Sequence[Entry]) -> dict[str, str]:
    """Which of `classes` each folder is; folders that are none, or may be several, are left out.

    Names are compared without case and with underscores as spaces, whole names before synonyms ("tench" of "tench, Tinca
    tinca"): a folder with those of the list's classes, and these with the names of `classes`.
    """
    lists = [*entries, *(_entry([name]) for name in classes)]
    meant = [*_classes_of(entries, classes), *classes]
    found = {}
    for folder in folders:
        own = _entry([folder])
        same = {meant[place] for place, entry in enumerate(lists) if own.whole & entry.whole}
        like = {meant[place] for place, entry in enumerate(lists) if own.every & entry.every}
        known = {folder} & set(classes) or (same - {None}) or (like - {None})
        if len(known) == 1:
            found[folder] = str(known.pop())
    return found


def _classes_of(entries: Sequence[Entry], classes: Sequence[str]) -> list[str | None]:
    """The class that each of the list's entries is: by a whole name, else by a synonym; None where that is not one to one."""
    own = {name: _entry([name]) for name in classes}
    whole = [[name for name in classes if own[name].whole & entry.whole] for entry in entries]
    taken = {name for names in whole for name in names}
    like = [[name for name in classes if name not in taken and own[name].every & entry.every] for entry in entries]
    best = [names or others for names, others in zip(whole, like, strict=True)]
    count = Counter(name for names in best for name in names)  # "crane" is a bird and a machine
    return [names[0] if len(names) == 1 and count[names[0]] == 1 else None for names in best]


def of_classes(
    name: str, files: LabelledFiles, classes: Sequence[str], entries: Sequence[Entry]
) -> tuple[LabelledFiles, list[str]]:
    """A test set with its images labelled by `classes`, and what is left out or missing, in words.

    Raises:
        RequestError: No folder of it is any of these classes.
    """
    found = meanings(files.classes, classes, entries)
    if not found:
        numbers = all(folder.isdecimal() or is_synset(folder) for folder in files.classes)
        remedy = "Give ImageNet's list of classes with --ood-classes FILE" if numbers else "Rename its folders as the classes"
        problem = f"none of its folders ({some_of(files.classes)}) has the name of a generated class ({some_of(classes)})"
        raise RequestError(
            "ood", str(files.root), problem, f"{remedy}, or give each folder's class in a table: --ood-classes FILE.csv."
        )
    kept = files.only([place for place, label in enumerate(files.labels) if label in found])
    labels = [found[label] for label in kept.labels]
    notes = []
    if strangers := [folder for folder in files.classes if folder not in found]:
        notes.append(
            f"{name}: folders that can't be matched with a generated class are left out ({len(strangers)} of "
            f"{len(files.classes)}): {some_of(strangers)}"
        )
    if missing := [each for each in classes if each not in set(labels)]:
        notes.append(
            f"{name}: it has no image of {len(missing)} of the {counted(len(classes), 'generated class')}: {some_of(missing)}"
        )
    renamed: Mapping[str, str] = {folder: meant for folder, meant in found.items() if folder != meant}
    if renamed:
        pairs = some_of([f"{folder} is {meant}" for folder, meant in renamed.items()], 3)
        notes.append(f"{name}: folders with another name than their class: {pairs}")
    return replace(kept, labels=labels, classes=[each for each in classes if each in set(labels)]), notes
