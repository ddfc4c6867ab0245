"""`handful sweep`, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.sweeps import digits_data, write_digits

from handful import console
from handful.cli import app
from handful.generate import read_recipe
from handful.sweep import read_sweep

SWEEPS = sorted((Path(__file__).parents[2] / "recipes" / "sweeps").glob("*.yaml"))


def handful(*arguments: Any) -> int:
    return console.answer(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's file beside its images."""
    root = write_digits(tmp_path_factory.mktemp("digits"))
    (root / "sweep.yaml").write_text(yaml.safe_dump(digits_data(Path())))
    return root / "sweep.yaml"


@pytest.fixture(scope="module")
def swept(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert handful("sweep", file, "--out", out, "-q") == 0
    return out


def test_the_table_the_choice_and_the_files_are_told_on_stdout(swept, file, capsys):
    assert handful("sweep", file, "--out", swept) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == "test half of the real images, judged by digits-judge; mean of 1 seed"
    assert lines[1].split()[:3] == ["setting", "precision", "recall"]
    assert [line[3:].split("  ")[0] for line in lines[2:5]] == ["none", "chamfer 0.1 k=4", "chamfer 0.3 k=4"]
    assert "chosen by coverage: its value on the validation half, then on the test half" in lines
    assert lines[-1] == f"sets: 0 measured, 3 already done, 0 failed; results.parquet, chosen.yaml, pareto.png in {swept}"
    assert read_recipe(swept / "chosen.yaml").model.name == "digits"


def test_json_stands_alone_and_holds_rows_and_choice(swept, file, capsys):
    assert handful("sweep", file, "--out", swept, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sets"], found["resumed"], found["failures"]) == (3, 3, [])
    assert {row["split"] for row in found["rows"]} == {"validation", "test"}
    assert set(found["choice"]["methods"]) == {"none", "chamfer"}
    best = found["choice"]["best"]
    values = [row["coverage"] for row in found["rows"] if row["split"] == "validation"]
    assert best["validation"]["mean"]["coverage"] == max(values)


def test_a_dry_run_tells_sets_images_and_operations_and_writes_nothing(file, tmp_path, capsys):
    out = tmp_path / "out"
    assert handful("sweep", file, "--out", out, "--dry-run", "--set", "seeds=[0, 1]") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 sets, 6 to make; 8 images of each of 2 classes"
    assert [line.split()[0] for line in lines[2:4]] == ["none", "chamfer"]
    assert "16 to choose by, 16 to report on" in lines[-1]
    assert not out.exists()
    assert handful("sweep", file, "--out", out, "--dry-run", "--json", "--only", "chamfer") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["sets"], plan["to_make"]) == (3, 2)
    assert plan["plan"][0]["flops_ratio"] == 1.0
    assert not out.exists()


def test_a_wrong_request_exits_with_2_and_one_line(file, tmp_path, capsys):
    assert handful("sweep", file, "--out", tmp_path / "out", "--set", "objektive=f1", "--json") == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert json.loads(said.out)["error"]["field"] == "objektive"
    assert not (tmp_path / "out").exists()


def test_sets_that_fail_exit_with_1_and_the_others_are_told(file, tmp_path, capsys):
    """A scale no float32 survives."""
    broken = "methods.chamfer.guidance.0.normalize=none"
    code = handful("sweep", file, "--out", tmp_path / "out", "-q", "--set", broken, "--set", "methods.chamfer.scales=[1.0e+38]")
    said = capsys.readouterr()
    assert code == 1
    assert "** none" in said.out
    *failures, last = said.err.splitlines()
    assert last == "error: 1 of 2 sets failed; the same command tries them again"
    assert failures[0].startswith("error: chamfer 1e+38 k=4, seed 0: model 'digits', class '1', cohort 0, step 1 of 3")


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_a_packaged_sweep_can_be_read(file):
    assert read_sweep(file).methods
