"""Files that are taken whole or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from handful.errors import RequestError
from handful.files.sealed import seal, unseal

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.zeros(0), "c": torch.tensor(3, dtype=torch.float64)}
SETTINGS = {"scale": 2.0, "names": ["x", "y"], "unknown": None}


def written(folder: Path, held: bytes) -> Path:
    file = folder / "file.safetensors"
    file.write_bytes(held)
    return file


def read(file: Path):
    return unseal(file, "toys", 1, field="toys", remedy="Make them again.")


def test_what_is_sealed_comes_back(tmp_path: Path):
    settings, tensors = read(written(tmp_path, seal("toys", 1, SETTINGS, TENSORS)))
    assert settings == SETTINGS
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) and tensors[name].dtype == TENSORS[name].dtype for name in TENSORS)


def test_the_order_of_names_changes_no_byte():
    turned = dict(reversed(SETTINGS.items())), dict(reversed(TENSORS.items()))
    assert seal("toys", 1, *turned) == seal("toys", 1, SETTINGS, TENSORS)


@pytest.mark.parametrize(
    "held",
    [
        b"",
        b"short",
        b"\xff" * 64,
        save({"a": torch.zeros(2)}),
        save({"a": torch.zeros(2)}, {"handful": "{"}),
        save({"a": torch.zeros(2)}, {"handful": "[]"}),
        seal("books", 1, SETTINGS, TENSORS),
    ],
    ids=["empty", "short", "bytes", "no metadata", "no JSON", "no settings", "another kind"],
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path, held: bytes):
    with pytest.raises(RequestError, match=r"^toys: .*file.safetensors': it holds no toys\. Make them again\."):
        read(written(tmp_path, held))


def test_another_version_is_refused_by_name(tmp_path: Path):
    with pytest.raises(RequestError, match=r"^toys: .* of version 2, and this handful reads version 1\."):
        read(written(tmp_path, seal("toys", 2, SETTINGS, TENSORS)))


def test_every_flipped_byte_and_every_cut_is_refused(tmp_path: Path):
    """Whatever is read is what was written, but for padding that means nothing."""
    held = seal("toys", 1, SETTINGS, TENSORS)
    for place in range(len(held)):
        broken = bytearray(held)
        broken[place] ^= 1
        try:
            settings, tensors = read(written(tmp_path, bytes(broken)))
        except RequestError:
            continue
        assert settings == SETTINGS
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    for place in range(0, len(held), 7):
        with pytest.raises(RequestError, match=r"^toys: "):
            read(written(tmp_path, held[:place]))
    with pytest.raises(RequestError, match="damaged"):
        read(written(tmp_path, held[:-1]))
    changed = bytearray(held)
    changed[-1] ^= 1
    with pytest.raises(RequestError, match="damaged: its contents have changed since it was written"):
        read(written(tmp_path, bytes(changed)))


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path):
    with pytest.raises(RequestError, match=r"^toys: .*there is no such file"):
        read(tmp_path / "none")
    with pytest.raises(RequestError, match=r"^toys: .*it can't be read \(Is a directory\)"):
        read(tmp_path)
