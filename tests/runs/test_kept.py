"""Results about a run lie in the run, by content."""

import os
from pathlib import Path

from handful.runs.kept import FOLDER, all_kept, keep, kept, key_of


def run_directory(root: Path) -> Path:
    (root / "images").mkdir(parents=True)
    (root / "recipe.yaml").write_text("model: {name: digits}\n")
    return root


def test_what_was_kept_is_found_by_its_key_and_by_its_kind_newest_last(tmp_path):
    run = run_directory(tmp_path / "run")
    for number, key in enumerate(("b", "a")):
        file = keep(run, "utility", key, {"number": number})
        assert file is not None
        os.utime(file, (number, number))
    assert kept(run, "utility", "b") == {"number": 0}
    assert [found["number"] for found in all_kept(run / "images", "utility")] == [0, 1]
    assert kept(run, "utility", "c") is None
    assert all_kept(run, "evaluation") == []


def test_a_damaged_result_is_no_result(tmp_path):
    run = run_directory(tmp_path)
    file = keep(run, "utility", "a", {})
    assert file is not None
    file.write_text("{")
    assert kept(run, "utility", "a") is None
    assert all_kept(run, "utility") == []


def test_nothing_is_kept_in_a_plain_folder_whose_folders_are_classes(tmp_path):
    (tmp_path / "cat").mkdir()
    assert keep(tmp_path, "utility", "a", {}) is None
    assert not (tmp_path / FOLDER).exists()


def test_keys_tell_contents_apart_and_not_the_order_of_keys():
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": 3})
