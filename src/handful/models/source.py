"""Where a model's files are: a directory, the hub or its cache, a single file. Small files are read first.

A `Source` gives the configs of a model before anything large is touched, so that what can't be done is said at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from handful.errors import RequestError, first_line

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".pkl")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A model's files.

    Attributes:
        folder: A local directory; None for a hub name or configs alone.
        file: A single file of weights; None otherwise.
        parts: Where a part lies instead, by its name: `vae`, `scheduler`.
        configs: Configs known without any file, by their path in the model: `{"unet/config.json": {...}}`.
    """

    name: str
    folder: Path | None = None
    file: Path | None = None
    revision: str | None = None
    configs: Mapping[str, Mapping[str, Any]] | None = field(default=None, compare=False)
    parts: Mapping[str, Source] = field(default_factory=dict, compare=False)

    def read_json(self, path: str) -> dict[str, Any] | None:
        """A small file of the model; None if it has none of that name.

        Raises:
            RequestError: If it is damaged, or the hub and its cache don't have the model.
        """
        part, _, file = path.partition("/")
        if part in self.parts and file:
            there = self.parts[part]
            return there.read_json(file) or there.read_json(path)
        if self.configs is not None:
            held = self.configs.get(path)
            return None if held is None else dict(held)
        found = self.folder / path if self.folder else self._from_hub(path) if self.file is None else None
        if found is None or not found.is_file():
            return None
        try:
            data = json.loads(found.read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise ValueError("it does not hold a JSON object")
        except (OSError, ValueError) as error:
            raise RequestError(
                "model", str(found), f"it can't be read ({first_line(error)})", "Copy the model again: the file is damaged."
            ) from error
        return data

    def config(self, component: str) -> dict[str, Any]:
        """`component/config.json`."""
        return self._needed(f"{component}/config.json")

    def scheduler(self) -> dict[str, Any]:
        """`scheduler/scheduler_config.json`."""
        return self._needed("scheduler/scheduler_config.json", ", so its noise levels are unknown")

    def _needed(self, path: str, why: str = "") -> dict[str, Any]:
        data = self.read_json(path)
        if data is None:
            remedy = "Copy the whole pipeline, as its save_pretrained wrote it."
            raise RequestError("model", self.name, f"it has no {path}{why}", remedy)
        return data

    def files(self) -> list[str]:
        """The paths of all its files; of a hub name those in its cache, or on the hub where no weights are there yet."""
        if self.folder is not None:
            return [str(path.relative_to(self.folder)) for path in self.folder.glob("**/*") if path.is_file()]
        if self.file is not None or self.configs is not None:
            return []
        from huggingface_hub import HfApi, snapshot_download

        try:
            kept = Path(snapshot_download(self.name, revision=self.revision, local_files_only=True))
            found = Source(self.name, folder=kept).files()
            if not any(name.endswith(".safetensors") for name in found):
                found = HfApi().list_repo_files(self.name, revision=self.revision)
        except Exception:  # offline, gated, gone: whoever loads it says why
            return []
        return found

    def _from_hub(self, path: str) -> Path | None:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub import errors as hub

        hub_is_away()
        try:
            return Path(hf_hub_download(self.name, path, revision=self.revision))
        except hub.LocalEntryNotFoundError as error:  # offline, or no connection, and not in the cache
            if self._is_cached():  # the model is there, and just has no such file
                return None
            problem = f"the hub can't be reached, and its cache ({constants.HF_HUB_CACHE}) does not hold {path}"
            remedy = f"Give a local directory, or go online once: hf download {self.name}."
            raise RequestError("model", self.name, problem, remedy) from error
        except hub.EntryNotFoundError:
            return None
        except (hub.GatedRepoError, hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
            remedy = "Check the name and revision, accept its licence on the hub, and run hf auth login."
            raise RequestError("model", self.name, f"the hub refuses it ({first_line(error)})", remedy) from error
        except (OSError, ValueError, hub.HfHubHTTPError) as error:  # a name that can't be one is a ValueError
            problem = f"the hub can't be reached ({first_line(error)})"
            raise RequestError("model", self.name, problem, "Give a local directory, or try again later.") from error

    def _is_cached(self) -> bool:
        """Whether the hub's cache holds the model: its index, or the config of a network alone."""
        from huggingface_hub import try_to_load_from_cache

        told = ("model_index.json", "config.json", "unet/config.json")
        return any(isinstance(try_to_load_from_cache(self.name, file, revision=self.revision), str) for file in told)


@cache
def hub_is_away() -> bool:
    """Whether the hub can't be reached. Its client then uses its cache alone: it would retry each file for half a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:  # the user wants it so
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of requests or httpx, by the hub's version
        constants.HF_HUB_OFFLINE = True
    return constants.HF_HUB_OFFLINE


def find_source(name_or_path: str | Path, revision: str | None = None) -> Source | None:
    """The source that a name or path means; None if there is no such thing."""
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(name, folder=path)
    if path.is_file() and path.suffix in SINGLE_FILES:
        return Source(name, file=path)
    if _HUB_NAME.fullmatch(name) and not name.endswith(SINGLE_FILES) and not name.startswith("."):
        return Source(name, revision=revision)
    return None
