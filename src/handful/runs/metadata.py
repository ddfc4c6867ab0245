"""What a run directory says of itself, for those who judge it: who guided, and by which exemplars."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from handful.data.exemplars import PER_CLASS_LEFT, Exemplars, content_hash
from handful.data.images import read_all
from handful.data.shared_exemplars import features_file
from handful.data.sources import LabelledFiles, absolute_source, labelled_files
from handful.errors import RequestError, counted


@dataclass(frozen=True)
class DrawnExemplars:
    """Which exemplars a recipe draws: so many a class (None: all) of a folder."""

    folder: Path
    k: int | None
    seed: int


def guided_by(run: str | Path, name: str, digest: str, weights: Iterable[str] = ()) -> bool:
    """Whether an extractor guided a run: one of that digest, of that name (at any size, smooth or not), or of these weights.

    Args:
        run: A run directory or its `images`; any other folder was guided by nobody.
        name, digest: The extractor's.
        weights: Its `handful.files.digests.marks`.
    """
    provenance = _part(_recipe(run), "provenance")
    told = _part(provenance, "features_sha256")
    # a classifier made smooth has another digest, but the judge of that name is still its own guide
    names = {_bare(re.sub(r"( prompts [0-9a-f]{8})?( softplus \S+| noisy)?$", "", key)) for key in told}
    if digest in told.values() or any(_same(_bare(name), other) for other in names):
        return True
    return any(set(weights) & set(str(each).split()) for each in _part(provenance, "features_weights").values())


def exemplars_of(run: str | Path) -> DrawnExemplars | None:
    """The exemplars that guided a run; None where there were none, or it is no run."""
    asked = _part(_recipe(run), "exemplars")
    if not asked.get("path"):
        return None
    folder = absolute_source(asked["path"], Path(run).expanduser())  # a relative path is relative to the recipe
    return DrawnExemplars(Path(folder), asked.get("k", asked.get("per_class")), asked.get("seed") or 0)


def drawn_json(folder: str | None, exemplars: Exemplars) -> bytes:
    """Which images guide a run, for .handful/exemplars.json: always the same bytes for the same ones."""
    images = {
        name: [[called, content] for called, content in zip(exemplars.called(name), hashes, strict=True)]
        for name, hashes in exemplars.hashes.items()
    }
    shape = list(exemplars.shape)
    return (json.dumps({"folder": folder, "shape": shape, "images": images}, ensure_ascii=False) + "\n").encode()


def drawn(run: str | Path) -> dict[str, tuple[str, ...]]:
    """By class the content hashes of the images that guided a run; {} where they were not recorded."""
    try:
        images = _drawn(run)["images"]
        return {name: tuple(content for _, content in of_class) for name, of_class in images.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def unused_images(run: str | Path, *, needed: int = 1, field: str = "real", remedy: str = "--real DIR") -> LabelledFiles:
    """The images of the folder of a run's exemplars that guided nothing, of the classes that were generated.

    An image that guided is known by its content: a copy of it under another name is left out too.

    Args:
        needed: How many of each class there must be.
        remedy: The option that names other images.

    Raises:
        RequestError: The run had no exemplars or only their features, their folder is gone, or too few are left.
    """
    root = Path(run).expanduser()
    root = root.parent if root.name == "images" else root
    asked, other = exemplars_of(root), f"Name a folder of real images ({remedy})."
    if asked is None:
        raise RequestError(field, root, "it was made without exemplars, so it does not say where real images are", other)
    if features_file(asked.folder) is not None:
        raise RequestError(field, root, "its exemplars were a file of features, which holds no images", other)
    listed = labelled_files(asked.folder, field=field, flat=True)
    used = drawn(root)
    if not used:
        raise RequestError(field, root, "it does not record which images were its exemplars", other)
    channels, height, width = _drawn(root)["shape"]
    listed = listed.only([place for place, name in enumerate(listed.labels) if name in used])

    def guided(place: int) -> bool:
        return content_hash(listed.content(place), channels, (height, width)) in contents

    contents = {content for of_class in used.values() for content in of_class}
    known = read_all(guided, range(len(listed)), field=field, root=asked.folder)
    left = listed.only([place for place, is_used in enumerate(known) if not is_used])
    counts = {name: left.counts.get(name, 0) for name in used}
    few = [f"'{name}' has {count} of {listed.counts.get(name, 0)}" for name, count in counts.items() if count < needed]
    if few:
        most = min(listed.counts.values()) - PER_CLASS_LEFT
        enough = f" ({most} leaves enough for evaluate and utility)" if most > 1 else ""
        listed_few = ", ".join(few[:5]) + (f" and {counted(len(few) - 5, 'more class')}" if len(few) > 5 else "")
        raise RequestError(
            field,
            asked.folder,
            f"too few of its images are left that were not exemplars: {listed_few}; at least {needed} of each class are needed",
            f"Generate with a smaller --k{enough}, add images to the folder, or name another one ({remedy}).",
        )
    return left


def _drawn(run: str | Path) -> dict[str, Any]:
    return json.loads((Path(run).expanduser() / ".handful" / "exemplars.json").read_text(encoding="utf-8"))


def prompts_of(run: str | Path) -> dict[str, str]:
    """The prompts of each class of a run; empty if its model takes class labels, or if this is no run."""
    return {str(name): str(text) for name, text in _part(_part(_recipe(run), "model"), "prompts").items()}


def _recipe(run: str | Path) -> dict[str, Any]:
    run = Path(run).expanduser()
    file = (run.parent if run.name == "images" else run) / "recipe.yaml"
    if not file.is_file():
        return {}
    try:
        recipe = yaml.safe_load(file.read_text())
    except yaml.YAMLError:
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _part(data: dict[str, Any], key: str) -> dict[str, Any]:
    found = data.get(key)
    return found if isinstance(found, dict) else {}


def _bare(name: str) -> str:
    """`dinov2@112` is dinov2."""
    return re.sub(r"@\d+$", "", name)


def _same(name: str, other: str) -> bool:
    return name == other or Path(name).expanduser().resolve() == Path(other).expanduser().resolve()
