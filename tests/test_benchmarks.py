"""The benchmarks run, tiny: what they measure then means nothing, that they run does."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_families  # noqa: E402
import tables  # noqa: E402
from shifts import SHIFTS, shifted  # noqa: E402

from handful.data.parquet import read_labelled  # noqa: E402


@pytest.mark.slow
def test_every_family_of_the_gpu_benchmark_runs_tiny_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "rows.json"
    words = ["gpu_families.py", "--tiny", "--steps", "4", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    gpu_families.main()
    rows = json.loads(out.read_text())
    assert [row["family"] for row in rows] == ["sd15", "sdxl", "sd35-medium", "dit-xl-2-256"]
    for row in rows:
        assert row["throughput_ratio"] > 0
        assert (row["resolution"], row["images"], row["steps"]) == (128, 2, 4)


# --- the tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_tables(monkeypatch):
    """The tables' module with few images and short trainings; real data, the packaged model and judges."""
    if not tables.DATA.is_dir():
        pytest.skip(f"needs CIFAR-10 at {tables.DATA}")
    monkeypatch.setattr(tables, "REAL", 6)
    monkeypatch.setattr(tables, "TRAINING_IMAGES", 20)
    monkeypatch.setattr(tables, "USEFUL_STEPS", 3)
    small = {name: replace(table, per_class=2, steps=10) for name, table in tables.TABLES.items()}
    monkeypatch.setattr(tables, "TABLES", small)

    def test_images(bench):
        return read_labelled(tables.DATA / "test.parquet", channels=3, size=tables.SIZE, limit=8)[0]

    monkeypatch.setattr(tables.Bench, "test", property(test_images))
    return tables


@pytest.mark.slow
def test_a_table_is_made_once_and_printed_with_what_both_judges_see(small_tables, tmp_path, monkeypatch, capsys):
    words = [
        "tables.py",
        "useful",
        "--out",
        str(tmp_path),
        "--seeds",
        "0",
        "--only",
        "real;Chamfer + energy",
        "--trainings",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", words)
    small_tables.main()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("*.json")}
    assert [path.name for path in sorted(made)] == ["Chamfer-+-energy-seed-0.json", "real-seed-0.json"]
    told = capsys.readouterr().out
    assert "Chamfer + energy, seed 0: " in told
    assert "| |" not in told, "not all rows are there"
    monkeypatch.setattr(sys, "argv", [*words, "--print"])
    small_tables.main()
    table = capsys.readouterr().out.splitlines()
    assert {path: path.stat().st_mtime_ns for path in made} == made, "nothing is made twice"
    assert "in distribution" in table[0]
    assert "SimCLR F1" in table[0]
    assert [line.split(" |")[0] for line in table[2:]] == ["| real", "| Chamfer + energy"]
    row = json.loads((tmp_path / "rows/useful-2/Chamfer-+-energy-seed-0.json").read_text())
    assert [len(row[name]) for name in ("as is", "shifted", *SHIFTS)] == [2] * (2 + len(SHIFTS))
    for training in range(2):
        assert row["shifted"][training] == pytest.approx(sum(row[name][training] for name in SHIFTS) / len(SHIFTS))
    assert 1 < row["operations"] < 1.3


def test_shifts_change_images_and_keep_their_size_and_range():
    images = 2 * torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    for name, seen in shifted(images).items():
        assert seen.shape == images.shape
        assert seen.abs().max() <= 1
        assert torch.equal(seen, images) == (name == "as is")
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(SHIFTS["contrast"](flat), flat)
    centre = torch.full((1, 1, 8, 8), -1.0)
    centre[..., 1:7, 1:7] = 1.0
    torch.testing.assert_close(SHIFTS["crop"](centre), torch.ones(1, 1, 8, 8))
