"""Generated images as files: a folder per class and metadata.jsonl, which Hugging Face's "imagefolder" loads as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from handful.errors import RequestError

IMAGES = "images"
METADATA = "metadata.jsonl"
_RESERVED = re.compile(r"^(con|prn|aux|nul|com[0-9]|lpt[0-9]|metadata)(\..*)?$", re.IGNORECASE)


def check_class_names(names: Iterable[str], field: str) -> None:
    """Refuses class names that can't be names of folders: nothing is ever renamed in silence, or written elsewhere.

    Raises:
        RequestError: Naming the first such class.
    """
    seen: dict[str, str] = {}
    for name in names:
        problem = _problem(name)
        if name.casefold() in seen:
            problem = f"on some file systems it is the same folder as '{seen[name.casefold()]}'"
        if problem:
            raise RequestError(
                field,
                name,
                f"this class name can't name a folder: {problem}",
                "Rename the class, or state other names with model.classes (--class-names).",
            )
        seen[name.casefold()] = name


def _problem(name: str) -> str | None:
    if not name or name != name.strip():
        return "it is empty, or begins or ends with a space"
    if "/" in name or "\\" in name or name in (".", ".."):
        return "it leads to another folder"
    if name.startswith(".") or name.endswith("."):
        return "it begins or ends with a dot"
    if not name.isprintable():
        return "it holds characters that can't be printed"
    if _RESERVED.match(name):
        return "this name is reserved"
    if len(name.encode("utf-8", "surrogatepass")) > 200:
        return "it is longer than 200 bytes"
    return None


def image_file(class_name: str, index: int) -> str:
    """Where an image lies, relative to the run directory."""
    return f"{IMAGES}/{class_name}/{index:06d}.png"


def metadata_jsonl(rows: Iterable[tuple[str, str]]) -> str:
    """The imagefolder's metadata.

    Args:
        rows: (file relative to the run directory, class name).
    """
    lines = (
        json.dumps({"file_name": file.removeprefix(f"{IMAGES}/"), "label": label}, ensure_ascii=False) + "\n"
        for file, label in rows
    )
    return "".join(lines)
