"""`handful cost`, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from handful import console
from handful.cli import app

RECIPES = Path(__file__).parents[2] / "recipes"
DIGITS = RECIPES / "digits-chamfer.yaml"


def handful(*arguments: Any) -> int:
    return console.answer(app, [str(argument) for argument in arguments])


def figures(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert handful("cost", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_json_stands_alone_on_stdout_with_the_other_ways_beside(capsys: pytest.CaptureFixture[str]):
    found = figures(capsys, DIGITS)
    assert found["ratio_to_plain"] == found["flops_per_image"] / found["plain"]["flops_per_image"]
    assert found["ratio_to_cfg"] == found["flops_per_image"] / found["cfg"]["flops_per_image"]
    assert sum(found["parts"].values()) == pytest.approx(found["flops_per_image"])
    for way in (found, found["plain"], found["cfg"]):
        assert way["parameters"] == 702_753, "the packaged model; pixels have no network"
        assert way["peak_bytes"] > 4 * 702_753


def test_the_table_has_the_three_ways_the_parts_and_what_a_flop_is(capsys: pytest.CaptureFixture[str]):
    assert handful("cost", DIGITS, "--set", "guidance.0.features=digits-guide", "--set", "guidance.0.jacobian=exact") == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0] == "digits, 8 x 8, dpmpp_2m, 18 steps, cohort of 64"
    assert [line.split()[0] for line in lines[2:5]] == ["plain", "CFG", "recipe"]
    assert "multiply-add is 2 FLOPs" in said
    assert "chamfer: acts at 18 evaluations" in said
    for part in ("denoiser, back", "feature extractors, backward", "once per class"):
        assert part in said


def test_options_override_the_recipe(capsys: pytest.CaptureFixture[str]):
    usual = figures(capsys, DIGITS)
    half = figures(capsys, DIGITS, "--steps", 9, "--cohort", 16, "--set", "guidance=[]")
    assert half["flops_per_image"] == usual["plain"]["flops_per_image"] / 2
    assert (half["steps"], half["cohort"], half["guided"]) == (9, 16, [])
    assert half["peak_bytes"] < usual["plain"]["peak_bytes"]
    assert figures(capsys, DIGITS, "--per-class", 5)["cohort"] == 5, "a cohort is never larger than its class"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["nowhere.yaml"], "recipe"),
        ([DIGITS, "--set", "guidance.0.scael=1"], "guidance[0].scael"),
        ([DIGITS, "--set", "model.name=no-such-model"], "model"),
        ([DIGITS, "--set", "guidance.0.features=dinov3000"], "features"),
        ([DIGITS, "--set", "guidance.0.reduce=3"], "guidance[0].reduce"),
        ([DIGITS, "--steps", 0], "sampler.steps"),
    ],
)
def test_wrong_requests_exit_with_2_naming_the_field(
    arguments: list[Any], field: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert handful("cost", *arguments, "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["field"] == field


def test_a_model_that_nobody_knows_is_refused_naming_the_cache(capsys: pytest.CaptureFixture[str], monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert handful("cost", DIGITS, "--set", "model.name=nobody/knows-this") == 2
    assert str(constants.HF_HUB_CACHE) in capsys.readouterr().err
