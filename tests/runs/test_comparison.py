"""What may change between two starts of a run, and what makes it another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import contents, tiny_recipe

from handful.core.noise import Level
from handful.errors import RequestError
from handful.generate import prepare
from handful.generate.run import run
from handful.models.unet2d import UNet2DDenoiser
from handful.recipe.schema import recipe_from
from handful.runs.comparison import HOW, compared


def test_a_line_for_each_field_and_none_for_how_it_is_computed_or_where_it_lies():
    there = {
        "seed": 0,
        "chunk": None,
        "model": {"name": "/a", "device": "cuda"},
        "guidance": [{"embeddings": "/x", "scale": 1}],
    }
    here = {"seed": 1, "chunk": 4, "model": {"name": "/b", "device": "cpu"}, "guidance": [{"embeddings": "/y", "scale": 2}]}
    same = {"model_sha256": "m", "embeddings_sha256": "e"}
    found = compared(there, here, same, same)
    assert found.unlike == ["seed: 0 there, 1 now", "guidance[0].scale: 1 there, 2 now"]
    assert found.how == ["chunk: None there, 4 now", "model.device: 'cuda' there, 'cpu' now"]
    moved = compared({"recipe": there}, {"recipe": here}, {**same, "model_sha256": "n"}, same, ("model_sha256",))
    assert "recipe.model.name: '/a' there, '/b' now" in moved.unlike
    assert moved.unlike[-1] == "model_sha256: n there, m now"
    assert all(recipe_from({"model": {"name": "digits"}}).as_dict()["model"].keys() >= {field[6:]} for field in HOW[1:])


def test_how_a_run_is_computed_may_change_on_the_way_and_is_noted(tiny_model: Any, tmp_path: Path):
    model, out = tiny_model(), tmp_path / "out"
    whole = tiny_recipe(model)
    run(prepare(whole, out))
    run(prepare(whole, tmp_path / "whole"))
    next((out / ".handful" / "cohorts").glob("*-0001.parquet")).unlink()
    job = prepare(whole.model_copy(update={"chunk": 1}), out)
    assert job.changes == ["chunk: None there, 1 now; pixels may differ by rounding"]
    assert run(job).cohorts_done == 1
    images = {name: data for name, data in contents(tmp_path / "whole").items() if name.endswith(".png")}
    assert {name: data for name, data in contents(out).items() if name.endswith(".png")} == images
    assert "chunk: None there, 1 now" in (out / "recipe.yaml").read_text()
    with pytest.raises(RequestError, match=r"another recipe:\n  seed: 0 there, 1 now"):
        prepare(whole.model_copy(update={"seed": 1}), out)


def test_out_of_memory_names_ways_that_work_and_leaves_the_directory_free(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, out = tiny_model(), tmp_path / "out"
    forward = UNet2DDenoiser.forward

    def short(self: UNet2DDenoiser, x_t: torch.Tensor, level: Level, condition: Any) -> torch.Tensor:
        if next(self.parameters()).dtype == torch.float32:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(self, x_t, level, condition)

    job = prepare(tiny_recipe(model), out)
    monkeypatch.setattr(UNet2DDenoiser, "forward", short)
    with pytest.warns(UserWarning, match="going on with 1"):
        summary = run(job)
    assert summary.cohorts_failed == 2
    assert summary.failures[0].endswith("Repeat the command with --dtype bfloat16, which takes half.")
    followed = run(prepare(tiny_recipe(model, model={"name": model, "dtype": "bfloat16"}), out))
    assert (followed.failures, followed.images) == ([], 4)


def test_the_former_name_of_the_number_of_exemplars_is_taken_with_a_note():
    with pytest.warns(FutureWarning, match="now called exemplars.k"):
        old = recipe_from({"model": {"name": "digits"}, "exemplars": {"path": "x", "per_class": 3}})
    assert old == recipe_from({"model": {"name": "digits"}, "exemplars": {"path": "x", "k": 3}})
    with pytest.raises(RequestError, match=r"exemplars.per_class: 3: it is the former name of k"):
        recipe_from({"model": {"name": "digits"}, "exemplars": {"path": "x", "per_class": 3, "k": 2}})
