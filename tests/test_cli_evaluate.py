"""`handful evaluate` and the tables, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from handful import console
from handful.cli import app
from handful.images import encode_png
from handful.tables import Table, demo_table, print_table
from handful.zoo.digits import load_digits_split


def handful(*arguments: Any) -> int:
    return console.answer(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twelve held-out digits of three classes each: two disjoint folders."""
    split, root = load_digits_split(), tmp_path_factory.mktemp("digits")
    for digit in range(3):
        images = split.test_images[split.test_labels == digit][:24]
        for index, image in enumerate(images):
            file = root / ("made" if index % 2 else "real") / str(digit) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(image))
    return root / "made", root / "real"


def test_json_stands_alone_on_stdout_with_judge_ceiling_and_transforms(folders, capsys, tmp_path):
    made, real = folders
    report = tmp_path / "report.json"
    assert handful("evaluate", made, "--real", real, "--features", "pixels", "--k", 3, "--json", "--report", report) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["judge"], found["k"], found["judge_accuracy"]) == ("pixels", 3, None)
    assert set(found["transformed"]) == {"jpeg", "resample", "noise"}
    assert found["pooled"]["ceiling"]["n_real"] == 18, "the ceiling is one half of the real images against the other"
    assert set(found["per_class"]) == {"0", "1", "2"}
    assert json.loads(report.read_text()) == found


def test_the_table_names_the_judge_and_every_class(folders, capsys):
    made, real = folders
    assert handful("evaluate", made, "--real", real, "--features", "digits-judge", "--k", 3, "--no-audit") == 0
    said = capsys.readouterr().out
    assert "judge digits-judge, k = 3" in said
    assert [line.split()[0] for line in said.splitlines()[4:7]] == ["0", "1", "2"]
    assert "after jpeg" not in said


def test_classes_that_the_real_folder_lacks_are_refused_before_any_feature_is_taken(folders, tmp_path, capsys):
    made, real = folders
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "0").symlink_to(real / "0")
    assert handful("evaluate", made, "--real", tmp_path / "real", "--features", "pixels") == 2
    assert "no folder for 1, 2" in capsys.readouterr().err


def test_too_few_images_for_k_are_refused_naming_the_remedy(folders, capsys):
    made, real = folders
    assert handful("evaluate", made, "--real", real, "--features", "pixels", "--k", 36) == 2
    assert "lower --k" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--seeds", 0), ("--per-class", 2)])
def test_a_demo_without_sense_exits_with_2(arguments, tmp_path, capsys):
    assert handful("demo", "--out", tmp_path / "out", *arguments) == 2
    assert "error: " in capsys.readouterr().err


def test_a_table_is_aligned_and_never_cut(capsys):
    print_table(Table("title", ["", "metric"], [["a long name", "1.000"], ["b", "12.000"]], ["a note"]))
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "             metric",
        "a long name   1.000",
        "b            12.000",
        "a note",
    ]


def test_the_demo_table_shows_spreads_only_where_there_are_seeds():
    columns = [
        "precision",
        "coverage",
        "f1",
        "recall",
        "frechet",
        "robust_precision",
        "robust_coverage",
        "copied",
        "utility",
        "seconds",
    ]
    mean = {"method": "cfg", "scale": 1.0, "k": 0, "seeds": 3, **dict.fromkeys(columns, 0.5)}
    with_spread = demo_table([mean | {f"{column}_spread": 0.01 for column in columns}])
    assert with_spread.rows[0][:2] == ["cfg w=1", "0.500 ±0.010"]
    single = demo_table([mean | {"seeds": 1} | {f"{column}_spread": None for column in columns}])
    assert single.rows[0][1] == "0.500"
