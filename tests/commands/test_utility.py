"""`handful utility`: a table, a plain sentence, or JSON alone."""

import json

from typer.testing import CliRunner

from handful.cli import app
from handful.judge import worth as module
from handful.judge.worth import BOTH, EXEMPLARS, SYNTHETIC, TEST, Difference, Trained, Worth

FOUND = Worth(
    "a network",
    "shift",
    [
        Trained(
            name,
            10,
            share,
            {TEST: module.Tested([0.5, 0.7], {"a": 0.9, "b": 0.3}), "far": module.Tested([0.4, 0.4], {"a": 0.4})},
        )
        for name, share in ((EXEMPLARS, None), (SYNTHETIC, None), (BOTH, 0.25))
    ],
    [Difference(EXEMPLARS, 0.0, 0.1), Difference(SYNTHETIC, 0.0, 0.1)],
    steps=10,
    seeds=2,
)


def test_what_is_asked_reaches_the_work_and_what_is_found_the_reader(monkeypatch, tmp_path):
    asked = {}

    def worth(synthetic, **options):
        asked.update(options, synthetic=synthetic)
        return FOUND

    monkeypatch.setattr(module, "worth", worth)
    options = [
        "utility",
        "out",
        "--test",
        "t",
        "--ood",
        "far=f",
        "--baseline",
        "plain=p",
        "--seeds",
        "2",
        "--steps",
        "10",
        "-q",
    ]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert " ".join(lines[1].split()) == "trained on images exemplars in a batch test worst class far worst class"
    assert " ".join(lines[4].split()) == "exemplars + synthetic 10 25 % 0.600 ±0.141 b: 0.30 0.400 ±0.000 a: 0.40"
    assert "The synthetic images do not help beyond the spread" in " ".join(lines[-3:])
    assert {name: str(path) for name, path in asked["ood"].items()} == {"far": "f"}
    assert {name: str(path) for name, path in asked["baselines"].items()} == {"plain": "p"}
    assert (str(asked["test"]), asked["seeds"], asked["steps"]) == ("t", 2, 10)
    found = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert Worth.from_dict(found) == FOUND
    assert found["rows"][2]["tests"]["test"]["worst"] == ["b", 0.3]
