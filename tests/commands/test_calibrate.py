"""`handful calibrate` at the command line: what it prints, where, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from handful import cli, console

QUICK = (
    "--model",
    "digits",
    "--classifier",
    "digits-guide",
    "--classes",
    "1,4",
    "--per-class",
    2,
    "--steps",
    2,
    "--betas",
    "none",
    "--taus",
    "1:1",
)


def handful(*arguments: object) -> int:
    return console.answer(cli.app, ["calibrate", *map(str, arguments)])


def test_it_prints_a_table_on_stdout_and_the_rest_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert handful(*QUICK, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "relu, x0_hat, tau 1:1" in printed.out
    assert "chosen by calibration" in printed.out
    assert "calibration alone" in printed.out
    assert "measured 4 of 4 images" in printed.err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        ".handful",
        "calibration.json",
        "calibration.parquet",
        "guidance.yaml",
        "reliability.png",
        "request.yaml",
    ]
    assert handful(*QUICK, "--out", tmp_path / "out") == 0
    assert "from an earlier run" in capsys.readouterr().out


def test_json_is_alone_on_stdout_and_says_what_the_file_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert handful(*QUICK, "--out", tmp_path / "out", "--json", "-q") == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert "measured" not in printed.err
    assert "note:" not in printed.err
    written = json.loads((tmp_path / "out/calibration.json").read_text())
    assert {key: told[key] for key in written} == written
    assert told["provenance"]["command"].startswith("handful")


def test_a_dry_run_tells_how_much_it_is_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert handful(*QUICK, "--out", tmp_path / "out", "--dry-run") == 0
    assert "4 images, 2 steps: 8 denoiser evaluations" in capsys.readouterr().out
    assert handful(*QUICK, "--out", tmp_path / "out", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["classifier_evaluations"] == 16
    assert not (tmp_path / "out").exists()


def test_a_recipe_gives_model_sampler_classes_and_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = {
        "model": {"name": "digits"},
        "classes": ["3"],
        "sampler": {"name": "ddim", "steps": 3},
        "seed": 5,
        "guidance": [{"method": "cfg"}, {"method": "classifier", "classifier": "digits-guide", "classes": {"3": 8}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert (
        handful(tmp_path / "recipe.yaml", "--per-class", 2, "--betas", "none", "--out", tmp_path / "out", "--json", "-q") == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["request"]["recipe"]["sampler"]["name"] == "ddim"
    assert told["request"]["recipe"]["seed"] == 5
    assert told["steps"] == 3
    assert told["guidance"][0]["classes"] == {"3": 8}, "as the recipe's own term has it"
    assert "guidance" not in told["request"]["recipe"], "the reverse process runs unguided"


def test_a_class_is_mapped_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert handful(*QUICK, "--class", "1=7", "--out", tmp_path / "out", "--json", "-q") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["guidance"][0]["classes"] == {"1": 7, "4": 4}
    assert told["candidates"][0]["accuracy"] < 0.75, "asked for 1, judged by whether it is named 7"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--betas", "hot"), "--betas"),
        (("--taus", "0:1"), "--taus"),
        (("--class", "1"), "--class"),
        (("--class", "1=1", "--class", "1=2"), "mapped twice"),
        (("--class", "1=99"), "10 classes"),
        (("--class", "seven=7"), "no such class is generated"),
        (("--real", "somewhere"), "--judge"),
        (("--judge", "digits-judge"), "--real"),
        (("--real", "somewhere", "--judge", "digits-judge"), "no such folder"),
        (("--real", "a", "--judge", "b", "--scales", "big"), "--scales"),
        (("--real", "a", "--judge", "b", "--objective", "beauty"), "--objective"),
        (("--per-class", "1"), "per_class"),
        (("--steps", "0"), "steps"),
        (("--classifier", "pixels"), "no logits"),
    ],
)
def test_a_wrong_request_exits_with_2_names_the_field_and_writes_nothing(
    options: tuple[str, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert handful(*QUICK, "--out", tmp_path / "out", *options) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert handful("--model", "digits", "--classifier", "digits-guide") == 2
    assert "--out" in capsys.readouterr().err
    assert handful("--model", "digits", "--out", tmp_path / "out") == 2
    assert "--classifier" in capsys.readouterr().err
    assert handful("--classifier", "digits-guide", "--out", tmp_path / "out") == 2
    assert "model" in capsys.readouterr().err


def test_the_help_has_examples(capsys: pytest.CaptureFixture[str]):
    assert handful("--help") == 0
    assert "handful calibrate --model digits --classifier digits-guide" in capsys.readouterr().out
