"""Where a model's files are looked for, and what is said when they are not there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.pipelines import tiny_stable_diffusion

from handful.errors import RequestError
from handful.models import load
from handful.models.source import Source, find_source

PROGRAM = """
from handful.errors import RequestError
from handful.models import load
print(load("org/sd").shape)
try:
    load("org/other")
except RequestError as error:
    print(error)
"""


@pytest.mark.slow  # a process of its own: the hub's settings are read at its import
def test_a_complete_cache_serves_offline_and_what_it_lacks_is_refused_with_the_cache_searched(tmp_path: Path):
    tiny_stable_diffusion(tmp_path / "sd")
    held = tmp_path / "hf" / "hub" / "models--org--sd"
    (held / "refs").mkdir(parents=True)
    (held / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tmp_path / "sd", held / "snapshots" / ("a" * 40))
    settings = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hf/hub")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shape, refusal = done.stdout.splitlines()
    assert shape == str(load(tmp_path / "sd").shape)
    assert refusal.startswith("model: 'org/other': ")
    assert str(tmp_path / "hf/hub") in refusal
    assert "hf download org/other" in refusal


@pytest.mark.parametrize("name", ["a..b/c", "a--b/c"])
def test_a_name_that_the_hub_cannot_have_is_refused(name: str):
    with pytest.raises(RequestError, match=r"^model: "):
        load(name)


def test_what_is_no_name_is_no_source(tmp_path: Path):
    assert find_source("nothing") is None
    assert find_source(tmp_path) == Source(str(tmp_path), folder=tmp_path)


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae"])
def test_a_pipeline_that_lacks_a_part_is_refused_by_the_parts_name(tmp_path: Path, part: str):
    tiny_stable_diffusion(tmp_path)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(RequestError, match=rf"^model: .*no {part}/"):
        load(tmp_path)
