"""A broken torchvision beside diffusers and transformers is named plainly, wherever the libraries are first needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.vision import save_vision_model

CODE = """
import sys
from handful.errors import RequestError
from handful.features.registry import load_extractor
from handful.models import load

for call in (load_extractor, load):
    try:
        call(sys.argv[1])
    except RequestError as error:
        print(error)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With a torchvision that was built for another torch."""
    package, facts = tmp_path / "site" / "torchvision", tmp_path / "site" / "torchvision-0.21.0.dist-info"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.21.0\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_loading_a_model_or_an_extractor_names_torchvision_and_the_remedy(tmp_path, environment):
    save_vision_model(tmp_path / "model", "Dinov2Model")
    done = run(environment, "-c", CODE, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "'torchvision 0.21.0': it is installed, but does not work with torch" in line
        assert "operator torchvision::nms does not exist" in line
        assert "pip uninstall torchvision" in line


@pytest.mark.slow
def test_the_command_line_says_so_and_exits_with_2(tmp_path, environment):
    save_vision_model(tmp_path / "model", "Dinov2Model")
    (tmp_path / "real" / "cat").mkdir(parents=True)
    for place in range(2):
        Image.fromarray(np.full((8, 8, 3), place, np.uint8)).save(tmp_path / "real" / "cat" / f"{place}.png")
    done = run(
        environment,
        "-m",
        "handful.cli",
        "generate",
        "--model",
        tmp_path / "model",
        "--exemplars",
        tmp_path / "real",
        "--out",
        tmp_path / "out",
    )
    assert done.returncode == 2, done.stderr
    assert "pip uninstall torchvision" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
