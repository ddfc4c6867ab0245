"""README.md of a run directory: the data set's card, as the Hugging Face hub and `datasets` read it.

Its YAML head says where the images are (so that a class called `test` is no split) and that they are synthetic. Below it
stand how they were made, what was measured, and how near they are to the exemplars.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from handful.data.images import write_atomically
from handful.data.shared_exemplars import ExemplarFeatures
from handful.errors import HandfulError, counted
from handful.runs.kept import all_kept

CARD = "README.md"
MARK = "<!-- Written by handful, and written again after each evaluation. Remove this line to keep your own text. -->"
_LOAD = '## Load it\n\n```python\nfrom datasets import load_dataset\n\nimages = load_dataset({}, split="train")\n```'
_MOST_CLASSES = 100  # named in the table of classes
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**12, "1M<n<10M"))


def card(root: Path, recipe: Mapping[str, Any], counts: Mapping[str, int], distances: Sequence[float]) -> str:
    """The card's text; it holds no time, so that the same run has the same card.

    Args:
        root: The run directory, for what `handful evaluate` and `handful utility` kept there.
        distances: Of images to their nearest exemplar, where that was measured.
    """
    images = sum(counts.values())
    size = next(name for most, name in _SIZES if images < most)
    path = (
        "images/**" if (root / "images").is_dir() else f"data/*.{'tar' if next(root.glob('data/*.tar'), None) else 'parquet'}"
    )
    head = {
        "license": "unknown",
        "pretty_name": root.name,
        "task_categories": ["image-classification"],
        "size_categories": [size],
        "tags": ["synthetic", "handful"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": path}]}],
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"{MARK}\n# {root.name}",
        f"{images:,} **synthetic** images of {counted(len(counts), 'class')}, made by [handful](https://pypi.org/project/handful/)."
        " No image here is a photograph.",
        _made(root, recipe),
        _measured(root),
        _nearest(distances),
        _classes(counts),
        _LOAD.format(repr(root.name)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def may_write(root: Path) -> bool:
    """Whether no card is there, or one that nobody has made their own."""
    file = root / CARD
    try:
        return not file.exists() or MARK in file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def refresh(root: Path, recipe: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the card again, with what has been measured since; a directory that can't be written is left alone."""
    if may_write(root):
        with suppress(OSError):
            counts, distances = Counter[str](), list[float]()
            for row in rows:
                counts[row["class"]] += 1
                distances += [row["nearest_exemplar_distance"]] * (row["nearest_exemplar_distance"] is not None)
            write_atomically(root / CARD, card(root, recipe, counts, distances).encode("utf-8", "replace"))


def _made(root: Path, recipe: Mapping[str, Any]) -> str:
    model, sampler, drawn = (recipe.get(part) or {} for part in ("model", "sampler", "exemplars"))
    terms = [f"`{term.get('method')}` (scale {term.get('scale')})" for term in recipe.get("guidance") or []]
    lines = [
        f"- model: `{Path(str(model.get('name'))).name}`; the model's licence applies to these images",
        f"- guidance: {', '.join(terms) or 'none'}",
        f"- sampler: `{sampler.get('name')}`, steps: {sampler.get('steps')}, seed {recipe.get('seed')}",
    ]
    if drawn.get("path"):
        source, licence = _stated(root, str(drawn["path"]))
        k = drawn.get("k", drawn.get("per_class"))
        lines.append(f"- exemplars: {counted(k, 'real image') if k else 'all real images'} of each class; source: {source}")
        lines.append(f"- the exemplars' licence: {licence}")
    return (
        "## How it was made\n\n"
        + "\n".join(lines)
        + "\n\n`recipe.yaml` holds all settings; `handful generate recipe.yaml` repeats the run."
    )


def _stated(root: Path, exemplars: str) -> tuple[str, str]:
    """Source and licence of the exemplars, where a file of features states them."""
    file = root / Path(exemplars).expanduser()
    if file.is_file():
        with suppress(HandfulError):
            known = ExemplarFeatures.load(file)
            return known.source or "not stated", known.licence or "not stated"
    return "a folder", "not stated; fill it in before you publish"


def _measured(root: Path) -> str:
    evaluations, utilities = all_kept(root, "evaluation"), all_kept(root, "utility")
    lines = []
    if evaluations and isinstance(found := evaluations[-1].get("result"), dict):
        for name in ("precision", "recall", "coverage", "f1", "frechet"):
            if (value := found.get(name)) is not None:
                lines.append(f"| {name} | {value:.3f} |")
        if lines:
            lines = [f"Judged by {found.get('judge')}:\n", "| metric | value |", "|---|---|", *lines]
    if utilities and isinstance(found := utilities[-1].get("result"), dict):
        lines += ["", str(found.get("sentence", ""))]
    return "## What was measured\n\n" + "\n".join(lines or ["Nothing yet: run `handful evaluate` and `handful utility`."])


def _nearest(distances: Sequence[float]) -> str:
    if not distances:
        return ""
    return (
        "## Copies\n\nGuided images can be near copies of the exemplars. The smallest distance to an exemplar here is"
        f" {min(distances):.4g} (median: {sorted(distances)[len(distances) // 2]:.4g}; in the features that guided);"
        " `manifest.parquet` has it for every image. Look at the nearest ones in `handful report` before you publish, above "
        "all if the exemplars show people or are not yours."
    )


def _classes(counts: Mapping[str, int]) -> str:
    shown = list(counts.items())[:_MOST_CLASSES]
    lines = [f"| {' '.join(name.split()).replace('|', '/')} | {count} |" for name, count in shown]
    if len(counts) > len(shown):
        lines.append(f"| and {len(counts) - len(shown):,} more | |")
    return "\n".join(["## Classes", "", "| class | images |", "|---|---|", *lines])
