"""A method is one file: the list, and a method of somebody else's that is used from a recipe like those that are listed.

What adding a method takes is all here: the file (`TOY`), its line in the list (`LINE`), and a test.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from handful.cli import app
from handful.errors import RequestError
from handful.guidance import METHODS, Method, request_of
from handful.guidance.method import TermRequest
from handful.recipe.file import read_recipe, recipe_yaml

TOY = '''
"""Images as light as the exemplars: U = (mean of the image - target - mean of the exemplars)^2, of each image."""

from typing import Literal

from torch import Tensor

from handful.guidance.base import ExemplarPotential
from handful.guidance.method import ByExemplarsRequest, Context


class Light(ExemplarPotential):
    name, per = "light", "image"
    target = 0.0

    def energy(self, features: Tensor) -> Tensor:
        return (features.mean(1) - self.target - self.exemplars.mean()).square()


class LightRequest(ByExemplarsRequest):
    """Guidance to the exemplars' brightness, or brighter."""

    method: Literal["light"] = "light"
    target: float = 0.0

    def build(self, context: Context) -> Light:
        term = Light(*self.seen(context), **self.when())
        term.target = self.target
        return term
'''
LINE = Method("toy_light_method", "LightRequest", "as light as the exemplars")

RECIPE = """
model: {name: digits}
exemplars: {path: DIGITS, k: 2}
classes: ['1']
per_class: 4
sampler: {steps: 4}
guidance: [{method: light, scale: 0.5, every: 1, features: pixels, target: 0.2}]
"""


@pytest.fixture
def toy(tmp_path: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy_light_method.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "light", LINE)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DIGITS", str(digits_folder)))
    return tmp_path


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_method_from_outside_is_used_from_a_recipe_like_any_other(toy: Path):
    run("generate", toy / "recipe.yaml", "--out", toy / "light", "--quiet")
    run("generate", toy / "recipe.yaml", "--out", toy / "none", "--quiet", "--scale", "0")
    energies = [pq.read_table(toy / name / "manifest.parquet")["energy_light"].to_pylist() for name in ("light", "none")]
    assert sum(energies[0]) < 0.5 * sum(energies[1]), f"its energy has a column, and is lowered: {energies}"
    assert "target: 0.2" in (toy / "light" / "recipe.yaml").read_text()
    assert read_recipe(toy / "light" / "recipe.yaml").guidance is not None
    counted = run("cost", toy / "recipe.yaml")
    assert "light" in counted


def test_what_is_wrong_with_it_is_said_like_any_other(toy: Path):
    for wrong, said in (
        ("targt: 1", "guidance[0].targt: 1: there is no such key. Did you mean 'target'?"),
        ("scale: -1", "guidance[0].scale: -1: it should be greater than or equal to 0"),
        ("target: x", "guidance[0].target: 'x'"),
    ):
        (toy / "wrong.yaml").write_text(RECIPE.replace("scale: 0.5", wrong).replace(", target: 0.2", ""))
        with pytest.raises(RequestError) as caught:
            read_recipe(toy / "wrong.yaml")
        assert str(caught.value).startswith(said)
    (toy / "none.yaml").write_text(RECIPE.replace("exemplars: {path: DIGITS, k: 2}\n", ""))
    result = CliRunner().invoke(app, ["generate", str(toy / "none.yaml"), "--out", str(toy / "x")])
    assert "light guidance needs exemplars" in str(result.exception)


@pytest.mark.parametrize("name", METHODS)
def test_each_listed_method_is_what_its_line_says(name: str):
    request = request_of(name)
    assert issubclass(request, TermRequest)
    assert request.model_fields["method"].default == name
    assert request.build is not TermRequest.build
    assert METHODS[name].help
    assert request.__doc__


def test_the_list_is_read_without_torch_and_the_command_names_all_of_it():
    code = "import sys, handful.guidance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(name in "".join(run("generate", "--help").split()) for name in METHODS)


def test_a_recipe_with_it_is_written_whole_and_read_again(toy: Path):
    recipe = read_recipe(toy / "recipe.yaml")
    (toy / "again.yaml").write_text(recipe_yaml(recipe))
    assert read_recipe(toy / "again.yaml") == recipe
