"""Peak memory on the CPU against what `handful cost` predicts, for a network of pixels and one of latents at several chunks.

    python benchmarks/memory.py [--default-allocator]

A process for each model makes a tiny run first, so that all code is imported. Then for each case it resets the kernel's
high-water mark of its memory (VmHWM), runs `handful.generate` whole, loading included, and reads it again. glibc's malloc
is set to give every tensor a block of its own: so tensors are measured without the gaps between them, which its default keeps
(`--default-allocator`). The models have random weights: a UNet of pixels with 50 M parameters, a Stable Diffusion
whose UNet has 57 M, its autoencoder 22 M.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHAMFER = {"method": "chamfer", "features": "pixels", "every": 1, "jacobian": "exact"}
THROUGH = {**CHAMFER, "reduce": 1}  # looks through the decoder
# name -> the model, and what the recipe says beyond the usual
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pixels, plain, 8 at once": ("pixels", {"guidance": []}),
    "pixels, Chamfer, 8 at once": ("pixels", {}),
    "pixels, Chamfer, chunk 4": ("pixels", {"chunk": 4}),
    "pixels, Chamfer, chunk 2": ("pixels", {"chunk": 2}),
    "pixels, Chamfer, chunk 1": ("pixels", {"chunk": 1}),
    "pixels, Chamfer, 8 at once, bfloat16": ("pixels", {"dtype": "bfloat16"}),
    "latents, CFG, 8 at once": ("latents", {"guidance": [{"method": "cfg", "scale": 2.0}]}),
    "latents, CFG, 8 at once, slices": ("latents", {"guidance": [{"method": "cfg", "scale": 2.0}], "vae_slicing": True}),
    "latents, Chamfer, chunk 2": ("latents", {"chunk": 2}),
    "latents, Chamfer through the decoder, chunk 4": ("latents", {"chunk": 4, "guidance": [THROUGH]}),
    "latents, Chamfer through the decoder, chunk 1": ("latents", {"chunk": 1, "guidance": [THROUGH]}),
}


def make_models(folder: Path) -> None:
    """Both models, and a tiny one of each kind, with two exemplars of one class."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel, UNet2DModel
    from PIL import Image
    from support.pipelines import tiny_stable_diffusion

    torch.manual_seed(0)
    pixels: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "layers_per_block": 2, "attention_head_dim": 32}
    pixels |= {"down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")}
    pixels |= {"up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D")}
    for name, widths, size in (("pixels", (96, 192, 288, 384), 64), ("pixels-tiny", (32, 32, 32, 32), 16)):
        UNet2DModel(sample_size=size, block_out_channels=widths, **pixels).save_pretrained(folder / name / "unet")
        DDPMScheduler().save_pretrained(folder / name / "scheduler")
    tiny_stable_diffusion(folder / "latents-tiny")
    pipeline = tiny_stable_diffusion()
    pipeline.unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(96, 192, 320, 320), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8
    )
    pipeline.vae = AutoencoderKL(
        block_out_channels=(64, 128, 256, 256),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
        sample_size=256,
    )
    pipeline.save_pretrained(folder / "latents")
    for number in range(2):
        file = folder / "exemplars" / "cat" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((256, 256), 60).convert("RGB").save(file)


def recipe_of(folder: Path, model: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a case as plain data."""
    changes = dict(changes)
    how = {name: changes.pop(name) for name in ("dtype", "vae_tiling", "vae_slicing") if name in changes}
    data: dict[str, Any] = {"model": {"name": str(folder / model), "device": "cpu", **how}, "cohort": 8, "guidance": [CHAMFER]}
    data |= {"exemplars": {"path": str(folder / "exemplars")}, "sampler": {"name": "ddim", "steps": 1}}
    data |= changes
    return {**data, "per_class": data["cohort"]}


def kilobytes(field: str) -> int:
    """Of this process, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def measured(folder: Path, model: str) -> None:
    """In this process, for each case: what is predicted, and the high-water mark over what Python and the libraries hold."""
    from handful.cost.estimate import cost_of
    from handful.generate.job import prepare
    from handful.generate.run import run
    from handful.recipe.schema import recipe_from

    for case, (of, changes) in CASES.items():
        if of != model:
            continue
        with tempfile.TemporaryDirectory() as out:
            asked = recipe_from(recipe_of(folder, model, changes))
            predicted = cost_of(asked).recipe.peak_bytes
            run(prepare(recipe_from(recipe_of(folder, f"{model}-tiny", changes)), f"{out}/tiny"))
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = kilobytes("VmRSS")
            run(prepare(asked, f"{out}/run"))
            seen = 1024 * (kilobytes("VmHWM") - before)
        print(f"| {case} | {predicted / 1e9:.2f} | {seen / 1e9:.2f} | {predicted / seen:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="One of the models, in this process.")
    parser.add_argument("--models", type=Path, help="Where the models lie, or shall lie.")
    parser.add_argument("--default-allocator", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.models or Path(temporary)
        if asked.model:
            measured(folder, asked.model)
            return
        if not (folder / "latents").exists():
            make_models(folder)
        print("| case | predicted, GB | measured, GB | predicted over measured |\n|---|---|---|---|", flush=True)
        own_blocks = {} if asked.default_allocator else {"MALLOC_MMAP_THRESHOLD_": "65536"}
        for model in ("pixels", "latents"):
            words = [sys.executable, __file__, "--models", str(folder), "--model", model]
            subprocess.run(words, check=True, env={**os.environ, **own_blocks})


if __name__ == "__main__":
    main()
