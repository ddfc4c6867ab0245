"""The GPU benchmark runs, tiny, where there is no GPU: what it measures there means nothing, that it runs does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_families.py"


@pytest.mark.slow
def test_every_family_of_the_gpu_benchmark_runs_tiny_on_a_cpu(tmp_path: Path):
    out = tmp_path / "rows.json"
    command = [sys.executable, SCRIPT, "--tiny", "--steps", "4", "--repeats", "1", "--device", "cpu", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [row["family"] for row in rows] == ["sd15", "sdxl", "sd35-medium", "dit-xl-2-256"]
    for row in rows:
        assert row["throughput_ratio"] > 0
        assert (row["resolution"], row["images"], row["steps"]) == (128, 2, 4)
