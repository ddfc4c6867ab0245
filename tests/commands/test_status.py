"""The commands around a run: shared work by hand, one image again, status, verify; and a console that can't print all names."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from handful import console
from handful.cli import app


def test_a_run_grows_by_command_and_is_looked_at(tiny_model: Callable[..., str], tmp_path: Path):
    out, runner = tmp_path / "out", CliRunner()
    asked = ["generate", "--model", tiny_model(2), "--steps", "2", "--cohort", "2", "--out", str(out), "--quiet"]
    assert runner.invoke(app, [*asked, "--per-class", "2"]).exit_code == 0
    assert runner.invoke(app, [*asked, "--per-class", "0=4", "--per-class", "1=2"]).exit_code == 0
    status = json.loads(runner.invoke(app, ["status", str(out), "--json"]).stdout)
    assert (status["images_planned"], status["images_done"], status["failures"], status["workers"]) == (6, 6, [], [])
    assert status["images"] == status["images_planned"], "its former name stays for a release"
    manifest, marker = out / "manifest.parquet", next((out / ".handful" / "cohorts").glob("*.parquet"))
    for file in (manifest, marker):
        file.rename(tmp_path / file.name)
    unfinished = runner.invoke(app, ["verify", str(out)])
    assert "it is unfinished: it has 4 of 6 images" in str(unfinished.exception)
    assert f"handful generate {out}/recipe.yaml --out {out} makes the others" in str(unfinished.exception)
    assert f"next: handful generate {out}/recipe.yaml --out {out}" in runner.invoke(app, ["status", str(out)]).stderr
    for file in (manifest, marker):
        (tmp_path / file.name).rename(file)
    again = runner.invoke(app, ["generate", str(out / "recipe.yaml"), "--only", "0/3", "--quiet"])
    assert (again.exit_code, "the same, byte for byte" in again.stdout) == (0, True)
    assert runner.invoke(app, ["verify", str(out)]).exit_code == 0
    (out / "images/0/000003.png").unlink()
    lost = runner.invoke(app, ["verify", str(out)])
    assert (lost.exit_code, "1 missing: images/0/000003.png" in lost.stdout) == (1, True)
    for wrong, told in (
        (["status", str(tmp_path)], "not a run directory"),
        ([*asked, "--per-class", "0=x"], "CLASS=NUMBER"),
        ([*asked, "--per-class", "0=3", "--per-class", "0=2"], "class '0' has two numbers"),
        ([*asked, "--engine", "slurm"], "no such engine"),
        ([*asked, "--ray-address", "auto"], "Add --engine ray"),
    ):
        assert told in str(runner.invoke(app, wrong).exception)


def test_an_option_that_is_given_twice_is_said_unless_it_may_be():
    asked = ["generate", "--model", "nowhere", "--set", "seed=1", "--set", "chunk=2", "--dry-run", "--steps", "3"]
    said = CliRunner().invoke(app, [*asked, "--steps", "4"]).stderr
    assert [line for line in said.splitlines() if "times" in line] == ["note: --steps is given 2 times; the last one counts"]
    assert not CliRunner().invoke(app, [*asked, "--steps", "4", "--quiet"]).stderr
    said = CliRunner().invoke(app, [*asked, "--per-class", "4", "--per-class", "2"]).stderr
    assert said == "note: --per-class is given 2 times; the last one counts\n"


def test_a_console_of_another_encoding_escapes_what_it_lacks(monkeypatch: pytest.MonkeyPatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(console, "answer", lambda app, arguments: print("класс \udce9") or 0)
    monkeypatch.setattr(console.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        console.main(app)
    stream.flush()
    assert stream.buffer.getvalue().startswith(b"\\u043a")  # type: ignore[attr-defined]
