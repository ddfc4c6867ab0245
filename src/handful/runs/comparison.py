"""What a stored request and a new one differ in: one comparer for all jobs that go on where they stopped.

What only says how to compute may change on the way, and is noted. The same content at another path is the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from handful.errors import RequestError
from handful.runs.provenance import DECIDING

# Fields that say how to compute, not what: with another value the last bits may differ, no more.
HOW = ("chunk", *(f"model.{name}" for name in ("attention", "compile", "device", "offload", "vae_slicing", "vae_tiling")))
# Fields that are paths, by the digest of what lies there.
PATHS = {
    "model_sha256": "model.name",
    "exemplars_sha256": "exemplars.path",
    "embeddings_sha256": "guidance.embeddings",
    "real_sha256": "real",
    "test_sha256": "utility.test",
}


class Comparison(NamedTuple):
    """What differs, a line for each field in the fields' order."""

    unlike: list[str]
    how: list[str]

    def refuse(self, out: Path, problem: str, remedy: str = "Choose another --out, or use the same settings as then.") -> None:
        """Refuses another request.

        Args:
            problem: What lies there, such as "it holds the run of another recipe".
        """
        if self.unlike:
            more = [f"and {len(self.unlike) - 12} more"] if len(self.unlike) > 12 else []
            raise RequestError("out", out, f"{problem}:\n  " + "\n  ".join(self.unlike[:12] + more), remedy)


def compared(
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
    now: Mapping[str, Any] | None = None,
    contents: Sequence[str] = (),
) -> Comparison:
    """Compares two requests (plain data).

    Args:
        contents: The provenances' keys of what was read, which must be the same; those that `now` has not are not compared.
    """
    before, now = before or {}, now or {}
    same = {PATHS[key] for key in PATHS if key in now and before.get(key) == now[key]}
    one, other = dict(_flat(there)), dict(_flat(json.loads(json.dumps(here))))
    unlike, how = [], []
    for key in dict.fromkeys([*one, *other]):
        field = re.sub(r"\[\d+\]", "", key)
        if _shown(one, key) != _shown(other, key) and not _any_of(field, same):
            (how if _any_of(field, HOW) else unlike).append(f"{key}: {_shown(one, key)} there, {_shown(other, key)} now")
    unlike += [
        f"{key}: {before.get(key)} there, {now[key]} now" for key in contents if key in now and before.get(key) != now[key]
    ]
    return Comparison(unlike, how)


def changed_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Versions of what decides bytes that are not what they were, in words."""
    changed = [name for name in DECIDING if name in now and before.get(name) != now[name]]
    return [f"{name} {before.get(name)} then, {now[name]} now" for name in changed]


def _any_of(field: str, names: Sequence[str] | set[str]) -> bool:
    return any(field == name or field.endswith("." + name) for name in names)


def _shown(flat: Mapping[str, Any], key: str) -> str:
    text = repr(flat[key]) if key in flat else "nothing"
    return text if len(text) <= 200 else text[:197] + "..."


def _flat(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        for name, value in data.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list) and any(isinstance(item, Mapping) for item in data):
        for index, value in enumerate(data):
            yield from _flat(value, f"{key}[{index}]")
    else:
        yield key, data
