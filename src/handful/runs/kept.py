"""What was found about a run, kept in it by content: OUT/.handful/found/KIND-KEY.json. Nothing is computed twice.

The key is a digest of all that decides the result (the files' contents, the settings), so a changed image or setting is
another result, and an old one is never taken for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from handful.data.images import write_atomically

FOLDER = ".handful/found"  # hidden: `datasets` takes a file called evaluation-... for a split


def run_root(folder: str | Path) -> Path | None:
    """The run directory that a folder is, or is the `images` of; None of a plain folder."""
    path = Path(folder).expanduser()
    path = path.parent if path.name == "images" else path
    made = any((path / name).is_dir() for name in ("images", "data"))
    return path if (path / "recipe.yaml").is_file() and made else None


def key_of(data: Any) -> str:
    """16 hexadecimal digits that identify plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def kept(run: str | Path, kind: str, key: str) -> dict[str, Any] | None:
    """A result that `keep` wrote; None where there is none that can be read."""
    root = run_root(run)
    return None if root is None else _read(root / FOLDER / f"{kind}-{key}.json")


def keep(run: str | Path, kind: str, key: str, data: Mapping[str, Any]) -> Path | None:
    """Writes a result into the run directory.

    Args:
        run: Of a folder that is no run directory nothing is kept: a new folder in it would be taken for a class.

    Returns:
        The file; None where it can't be kept (no run directory, or a read-only one).
    """
    root = run_root(run)
    if root is None:
        return None
    file = root / FOLDER / f"{kind}-{key}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())
    except OSError:
        return None
    return file


def all_kept(run: str | Path, kind: str) -> list[dict[str, Any]]:
    """All results of a kind, the newest last."""
    root = run_root(run)
    files = [] if root is None else list((root / FOLDER).glob(f"{kind}-*.json"))
    ages: dict[Path, float] = {}
    for file in files:
        with suppress(OSError):
            ages[file] = file.stat().st_mtime
    return [found for file in sorted(ages, key=lambda each: (ages[each], each.name)) if (found := _read(file)) is not None]


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
