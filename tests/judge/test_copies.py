"""Copies of exemplars are found by pixels, among the exemplars that the run drew."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from handful.data.exemplars import Exemplars
from handful.data.images import LabelledImages, read_folder, write_png
from handful.judge.copies import CopyCheck


def images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def write(root: Path, classes: dict[str, Tensor]) -> Path:
    for name, of_class in classes.items():
        (root / name).mkdir(parents=True)
        for index, image in enumerate(of_class):
            write_png(root / name / f"{index}.png", image)
    return root


def read(root: Path) -> LabelledImages:
    return read_folder(root, channels=1, size=(6, 6))


def test_a_copy_is_found_in_its_own_class_alone(tmp_path):
    folder = write(tmp_path / "exemplars", {"a": images(3, 0), "b": images(3, 1), "not generated": images(3, 2)})
    real = read(write(tmp_path / "real", {"a": images(30, 3), "b": images(30, 4)}))
    check = CopyCheck(folder, tmp_path / "no run", real, ["a", "b"])
    made = {"a": torch.cat([images(3, 0)[:1], images(3, 1)[:1]]), "b": torch.cat([images(3, 0)[:1], images(3, 1)[:1]])}
    flags = check(read(write(tmp_path / "made", made)))
    assert flags.tolist() == [True, False, False, True]
    assert check.identical(read(tmp_path / "made")) == 2
    assert check.shared == 0


def test_a_run_is_held_against_the_exemplars_that_it_drew(tmp_path):
    folder = write(tmp_path / "pool", {"a": images(12, 0)})
    real = read(write(tmp_path / "real", {"a": images(30, 3)}))
    run = write(tmp_path / "run" / "images", {"a": images(12, 0)}).parent
    (run / "recipe.yaml").write_text(yaml.safe_dump({"exemplars": {"path": str(folder), "per_class": 4, "seed": 5}}))
    made = read(run)
    drawn = CopyCheck(folder, run, real, ["a"])(made)
    assert drawn.sum() == 4
    wanted = Exemplars.from_folder(folder, channels=1, size=(6, 6), k=4, seed=5).files["a"]
    assert {made.files[row].name for row in np.flatnonzero(drawn)} == {file.name for file in wanted}
    # another folder than the recipe's, and a folder that is no run: all of it
    other = write(tmp_path / "other", {"a": images(12, 0)})
    assert CopyCheck(other, run, real, ["a"])(made).all()
    assert CopyCheck(folder, tmp_path / "real", real, ["a"])(made).all()


def test_real_images_that_are_exemplars_are_counted_whatever_their_names(tmp_path):
    folder = write(tmp_path / "exemplars", {"a": images(3, 0)})
    known = write(tmp_path / "real", {"a": torch.cat([images(8, 3), images(3, 0)[1:]])})
    with pytest.warns(UserWarning, match="exemplars among the real images, byte for byte: 2 of 10"):
        CopyCheck(folder, tmp_path, read(known), ["a"])
    fresh = write(tmp_path / "fresh", {"a": images(8, 3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CopyCheck(folder, tmp_path, read(fresh), ["a"])
