"""What the published models are made of: the values in their configs that differ from diffusers' defaults, as facts.

`handful cost` counts a model by these without its files. They build exactly the published networks (tests hold the parameter
counts against the published ones); no weights are ever loaded into them.
"""

from __future__ import annotations

import json
from pathlib import Path

from handful.models.source import Source

_FOLDER = Path(__file__).parent


def packaged_names() -> list[str]:
    """The hub names of the models that are known here."""
    return sorted(file.stem.replace("--", "/") for file in _FOLDER.glob("*.json"))


def packaged_configs(name: str) -> Source | None:
    """The configs of the model of this hub name; None if it is not known here, or there is a directory of that name."""
    if name not in packaged_names() or Path(name).is_dir():
        return None
    file = _FOLDER / f"{name.replace('/', '--')}.json"
    return Source(name, configs=json.loads(file.read_text(encoding="utf-8")))
