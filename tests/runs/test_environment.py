"""`handful doctor`: what is there, what is broken, and what to do."""

import json
from pathlib import Path

from typer.testing import CliRunner

from handful.cli import app
from handful.runs import environment as doctor


def test_a_working_place_has_nothing_broken_and_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "no-such-package", ("nothing", "pip install nothing"))
    found = CliRunner().invoke(app, ["doctor", "--fast", "--json"])
    assert found.exit_code == 0, found.stdout
    findings = {each["name"]: each for each in json.loads(found.stdout)["findings"]}
    assert findings["torch"]["state"] == "good"
    missing = findings["no-such-package"]
    assert (missing["state"], missing["text"], missing["remedy"]) == (
        "absent",
        "not installed, for nothing",
        "pip install nothing",
    )


def test_what_is_missing_too_old_or_not_writable_is_broken_with_its_remedy(monkeypatch, tmp_path: Path):
    versions = {"torch": "2.5.1+cu124", "numpy": "1.26.0"}
    monkeypatch.setattr(doctor, "version", lambda name: versions[name])
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=2.6", "numpy>=1.26", "ray[data]>=2.40; extra == 'ray'"])
    told = ("torch", "broken", "2.5.1+cu124, older than 2.6", "pip install --upgrade 'torch>=2.6'")
    assert doctor._package("torch") == doctor.Finding(*told)
    assert doctor._package("numpy").state == "good"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HANDFUL_CACHE", str(tmp_path / "file"))
    broken = doctor._handful_cache()
    assert broken.state == "broken"
    assert "HANDFUL_CACHE" in broken.remedy


def test_a_torchvision_that_breaks_the_others_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "0.20.0")
    monkeypatch.setattr(doctor, "_alone", lambda code: (False, "RuntimeError: operator torchvision::nms does not exist"))
    found = doctor._torchvision()
    assert found.state == "broken"
    assert "operator torchvision::nms does not exist" in found.text
    assert "pip uninstall torchvision" in found.remedy
    monkeypatch.setattr(doctor, "_alone", lambda code: (True, ""))
    assert doctor._torchvision().state == "good"


def test_a_broken_place_exits_with_1(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda **_: [doctor.Finding("disk", "broken", "full", "Free some space.")])
    found = CliRunner().invoke(app, ["doctor"])
    assert found.exit_code == 1
    assert "!!  disk  full" in found.stdout
    assert "-> Free some space." in found.stdout
