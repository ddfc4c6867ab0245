"""A file that is taken whole or refused: tensors and settings in one safetensors file, with a kind, a version and a checksum.

safetensors checks lengths but not contents, and a flipped bit in what guides every image would go unseen. The same contents
give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from handful.errors import RequestError, first_line
from handful.files.atomic import write_atomically
from handful.files.digests import tensors_digest
from handful.files.locks import held as locked

_CACHED = "cached tensors"
_warned: set[Path] = set()
_KEY = "handful"  # the only entry of the file's metadata: of several, safetensors would not promise the order


def seal(kind: str, version: int, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The file's bytes; settings are what JSON can hold."""
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"kind": kind, "version": version, "sha256": _checksum(settings, contents), "settings": dict(settings)}
    return save(contents, {_KEY: json.dumps(about, sort_keys=True)})


def unseal(path: str | Path, kind: str, version: int, *, field: str, remedy: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `seal` wrote: settings and tensors.

    Args:
        field: What the file is in the request, for errors.
        remedy: How to get another one.

    Raises:
        RequestError: If it is no such file, of another version, damaged or cut short.
    """
    try:
        held = Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise RequestError(field, Path(path), "there is no such file", "Check the path.") from None
    except OSError as error:
        raise RequestError(field, Path(path), f"it can't be read ({error.strerror or error})", "Give a file.") from error
    about = _about(held)
    if about is None or about.get("kind") != kind:
        raise RequestError(field, Path(path), f"it holds no {kind}", remedy)
    if about.get("version") != version:
        raise RequestError(
            field,
            Path(path),
            f"it holds {kind} of version {about.get('version')}, and this handful reads version {version}",
            f"Use the handful that wrote it. {remedy}",
        )
    try:
        tensors, settings = load(held), about["settings"]
        whole = about["sha256"] == _checksum(settings, tensors)
    except Exception as error:  # safetensors raises kinds of its own for damaged files
        raise RequestError(field, Path(path), f"it is damaged or cut short ({first_line(error)})", remedy) from error
    if not whole:
        raise RequestError(field, Path(path), "it is damaged: its contents have changed since it was written", remedy)
    return settings, tensors


def computed_once(
    compute: Callable[[], Mapping[str, Tensor]], key: str, cache: Path | None, folder: str
) -> Mapping[str, Tensor]:
    """Tensors from `cache/folder/KEY.safetensors`, else computed: by the first of many processes, while the others wait.

    A damaged file is computed again. A folder that can't be written is done without, with one warning.

    Args:
        key: Identifies all that decides the tensors; of characters that a file name can have.
        cache: None computes, and keeps nothing.
    """
    if cache is None:
        return compute()
    file = cache / folder / f"{key}.safetensors"
    if (kept := _cached(file, key)) is not None:
        return kept
    lock = Path(tempfile.gettempdir()) / f"handful-{key[:32]}.lock"
    with locked(lock):
        if (kept := _cached(file, key)) is not None:
            return kept
        tensors = compute()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, seal(_CACHED, 1, {"key": key}, tensors))
        except OSError as error:
            if cache not in _warned:
                _warned.add(cache)
                why = error.strerror or error
                text = f"The cache {cache} can't be written ({why}), so what it would hold is computed again each time."
                warnings.warn(text, RuntimeWarning, stacklevel=4)
        lock.unlink(missing_ok=True)
    return tensors


def _cached(file: Path, key: str) -> dict[str, Tensor] | None:
    """What a cache file holds, or None unless it is whole and of this key."""
    try:
        settings, tensors = unseal(file, _CACHED, 1, field="cache", remedy="")
    except RequestError:
        return None
    return tensors if settings == {"key": key} else None


def _about(held: bytes) -> dict[str, Any] | None:
    """What the header says of the file; None where it is not one of ours."""
    try:
        (length,) = struct.unpack("<Q", held[:8])
        about = json.loads(json.loads(held[8 : 8 + length])["__metadata__"][_KEY])
    except (ValueError, LookupError, TypeError, struct.error, RecursionError):
        return None
    return about if isinstance(about, dict) else None


def _checksum(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    named = f"{json.dumps(settings, sort_keys=True)}\n{tensors_digest(tensors)}"
    return hashlib.sha256(named.encode()).hexdigest()
