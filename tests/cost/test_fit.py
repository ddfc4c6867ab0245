"""`--fit`: what is chosen fits by the whole count too; and the prediction against the kernel's own measure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from support.pipelines import tiny_stable_diffusion
from typer.testing import CliRunner

from handful.cli import app
from handful.cost.estimate import cost_of
from handful.cost.fit import GAPS, OWN, Settings, Way, chosen, fitted, outline, parse_bytes, ways_of
from handful.errors import RequestError
from handful.recipe.schema import Recipe, recipe_from

EXACT = {"method": "chamfer", "features": "pixels", "every": 1, "jacobian": "exact", "reduce": 1}


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "sd"
    tiny_stable_diffusion(folder)
    return str(folder)


def asked(name: str, *guidance: dict[str, Any], cohort: int = 6, chunk: int | None = None, **model: Any) -> Recipe:
    data: dict[str, Any] = {"model": {"name": name, **model}, "exemplars": {"path": "nowhere"}, "classes": ["cat"]}
    data |= {"cohort": cohort, "chunk": chunk, "sampler": {"steps": 2}, "guidance": list(guidance)}
    return recipe_from(data)


@pytest.fixture(scope="module")
def settings(latents: str) -> Settings:
    return Settings(outline(asked(latents, EXACT)))


@pytest.mark.parametrize(("chunk", "tiling"), [(None, False), (2, True)])
def test_five_small_counts_tell_what_the_whole_count_says(chunk: int | None, tiling: bool, latents: str, settings: Settings):
    whole = cost_of(asked(latents, EXACT, chunk=chunk, vae_tiling=tiling)).recipe.peak_bytes
    assert settings.peak(Way(chunk, vae_tiling=tiling)) == pytest.approx(whole, rel=0.03)


def test_less_memory_gives_smaller_chunks_and_too_little_is_refused_with_the_least_that_would_do(
    latents: str, settings: Settings
):
    recipe = asked(latents, EXACT)
    needs = {way.chunk: settings.peak(way) * GAPS + OWN for way in (Way(None), Way(4))}
    for chunk, need in needs.items():
        made, (note,) = chosen([settings], recipe, need, False)
        assert (made.chunk, made.model.vae_tiling, made.model.offload) == (chunk, False, "none")
        assert made.model_copy(update={"chunk": None, "model": recipe.model}) == recipe
        assert ("whole cohort at once would take" in note) == (chunk is not None)
    with pytest.raises(
        RequestError, match=r"the smallest need is \d.* GB \(chunk .*Give .* GB or more; or use --dtype bfloat16.*offload"
    ):
        chosen([settings], recipe, 0.7e9, False)


def test_offload_serves_guidance_without_an_exact_jacobian_on_an_accelerator_alone(latents: str):
    recipe = asked(latents, {**EXACT, "jacobian": "gaussian"})
    parts = [Settings(outline(recipe))]
    assert {way.offload for way in ways_of(parts, recipe, on_cpu=False)} == {"none", "model", "sequential"}
    assert {way.offload for way in ways_of(parts, recipe, on_cpu=True)} == {"none"}
    peaks = [parts[0].peak(Way(1, offload=offload)) for offload in ("none", "model", "sequential")]
    assert peaks[0] >= peaks[1] > peaks[2]


def test_what_the_recipe_states_stays_and_processes_share(latents: str):
    recipe = asked(latents, {"method": "cfg"}, chunk=3, vae_slicing=True)
    for sharing in (1, 4):
        made, (note,) = fitted(recipe, f"{2 * sharing}GB", sharing=sharing)
        assert (made.chunk, made.model.vae_slicing) == (3, True)
        assert "of 2 GB" in note
    assert "a 4th of 8GB for each process" in note


@pytest.mark.parametrize(("text", "count"), [("24GB", 24e9), ("16 GiB", 16 * 2**30), ("800mb", 800e6), ("1.5T", 1.5e12)])
def test_amounts_of_memory(text: str, count: float):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "24", "0GB", "24 Bananas", "-3GB"])
def test_what_is_no_amount_is_refused(text: str):
    with pytest.raises(RequestError, match="not an amount"):
        parse_bytes(text)


def test_generate_says_what_was_chosen_and_why(tmp_path: Path):
    words = [
        "generate",
        "--model",
        "digits",
        "--per-class",
        "8",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--dry-run",
        "--fit",
    ]
    said = CliRunner().invoke(app, [*words, "2GB"])
    assert said.exit_code == 0
    assert "fit: the whole cohort at once" in said.stderr
    refused = CliRunner().invoke(app, [*words, "0.5GB"])
    assert isinstance(refused.exception, RequestError)
    assert "nothing fits" in str(refused.exception)


MEASURE = """
import ctypes, sys
from pathlib import Path
import torch
from handful.core.noise import Level
from handful.features.extractor import pixels
from handful.guidance import Guided
from handful.guidance.base import Pull
from handful.guidance.chamfer import Chamfer
from handful.models import load

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])

ctypes.CDLL("libc.so.6").mallopt(-3, 65536)  # M_MMAP_THRESHOLD: a block of its own for each tensor
torch.set_num_threads(1)
term = Chamfer(pixels(), torch.randn(4, 3 * 32 * 32), 0.2, pull=Pull(jacobian="exact", reduce=1))
model = load(sys.argv[1])
half = torch.tensor(0.5, dtype=torch.float64).sqrt()
for n, chunk in ((1, None), (16, 2), (16, None)):  # first alone: what is compiled and imported is there then
    guided = Guided(model, [term], chunk)
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    with torch.no_grad():
        guided(torch.randn(n, 3, 32, 32), Level(half, half), guided.condition([0] * n))
    print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.slow
def test_the_prediction_is_within_a_fifth_of_the_kernel_s_high_water_mark(tmp_path: Path):
    """benchmarks/memory.py measures whole runs; this one guided estimate, in its own process, whose malloc keeps no gaps."""
    net = UNet2DModel(sample_size=32, block_out_channels=(64, 128), norm_num_groups=8, **BLOCKS)
    net.save_pretrained(tmp_path / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for chunk, held in zip((2, None), done.stdout.split()[1:], strict=True):
        recipe = asked(str(tmp_path), EXACT, cohort=16, chunk=chunk, device="cpu").model_copy(update={"classes": None})
        assert cost_of(recipe).recipe.peak_bytes - weights == pytest.approx(int(held), rel=0.2), chunk


BLOCKS: dict[str, Any] = {
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
