"""Throughput and peak memory: Chamfer guidance at its default against the diffusers pipeline with classifier-free guidance.

    python benchmarks/gpu_families.py                                  full size on a GPU (an H200, say), bfloat16, 40 steps
    python benchmarks/gpu_families.py --tiny --steps 4                 the same code on a CPU with tiny networks, in a minute

For each family both ways sample the same number of images at the same steps, resolution and precision, by the same networks
with random weights (speed does not depend on their values), one after the other in one run, repeated in turn; medians. The
pipeline is called as its users call it, with the prompts' embeddings given, so that neither side pays for text encoders.
Prints a Markdown table; the ratio is images per second of Chamfer guidance over the pipeline's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import diffusers
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from handful.core.denoiser import shrunk
from handful.core.samplers import dpmpp_2m, start
from handful.data.images import write_atomically
from handful.features.registry import FeatureExtractor, extractor_skeleton
from handful.guidance import Guided
from handful.guidance.chamfer import ChamferRequest
from handful.guidance.method import Context, make_terms
from handful.models import skeleton
from handful.models.architectures import packaged_configs
from handful.models.latent import LatentDenoiser
from handful.models.source import Source
from handful.recipe.schema import for_model

FAMILIES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "dit-xl-2-256": "facebook/DiT-XL-2-256",
}
# The same architectures, small enough for a CPU: fields of their configs that are replaced.
TINY_VAE = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
TINY: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": {
            "sample_size": 16,
            "block_out_channels": [8, 16, 16, 16],
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "layers_per_block": 1,
        }
    },
    "sdxl": {
        "unet": {
            "sample_size": 16,
            "block_out_channels": [8, 16, 16],
            "attention_head_dim": [1, 2, 2],
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "layers_per_block": 1,
            "transformer_layers_per_block": [1, 1, 1],
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
        },
        "text_encoder_2": {"projection_dim": 16},
    },
    "sd35-medium": {
        "transformer": {
            "sample_size": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 24,
            "dual_attention_layers": [0],
        }
    },
    "dit-xl-2-256": {"transformer": {"sample_size": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}},
}
CFG_SCALE = {"sd15": 7.5, "sdxl": 5.0, "sd35-medium": 4.5, "dit-xl-2-256": 4.0}  # diffusers' guidance_scale


def source_of(family: str, tiny: bool) -> Source:
    found = packaged_configs(FAMILIES[family])
    if found is None or found.configs is None:
        raise SystemExit(f"the configs of {FAMILIES[family]} are not packaged")
    if not tiny:
        return found
    smaller = {**TINY[family], "vae": TINY_VAE}
    return Source(
        found.name,
        configs={
            path: {**config, **smaller.get(path.removesuffix("/config.json"), {})} for path, config in found.configs.items()
        },
    )


def tiny_extractor() -> FeatureExtractor:
    """DINOv2's architecture, small enough that the rest of a tiny run shows."""
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    network = Dinov2Model(config)
    return FeatureExtractor("tiny", network, size=(28, 28), features=lambda x: network(pixel_values=x).pooler_output)


@torch.no_grad()
def materialized(network: nn.Module, device: torch.device) -> nn.Module:
    """A network of the meta device with small random weights on a real one."""
    network.to_empty(device=device)
    for weight in network.parameters():
        weight.normal_(std=0.02)
    for buffer in network.buffers():
        buffer.zero_()
    return network


def chamfer_run(denoiser: LatentDenoiser, extractor: FeatureExtractor, images: int, steps: int) -> Callable[[], Tensor]:
    """Sampling and decoding of one cohort with handful's default Chamfer guidance."""
    device = denoiser.device
    term = for_model(ChamferRequest(features="dinov2"), "", steps)
    term = term.model_copy(update={"reduce": denoiser.preview_factor})
    exemplars = torch.rand(32, *denoiser.image_shape, device=device) * 2 - 1
    denoiser.fit_preview(exemplars[:4])
    with torch.no_grad():
        features = torch.cat([extractor(part) for part in shrunk(exemplars, denoiser.preview_factor).split(8)])
    told: Any = ["a photo"] * images if denoiser.prompted else [1] * images
    levels = denoiser.levels.spacing(steps)

    @torch.no_grad()
    def run() -> Tensor:
        terms = make_terms([term], Context({"dinov2": extractor}, {("dinov2", denoiser.preview_factor): features}))
        guided = Guided(denoiser, terms)
        noise = torch.randn(images, *denoiser.shape, device=device)
        x0 = dpmpp_2m(guided, start(noise, levels), levels, guided.condition(told))
        return torch.cat([denoiser.decode(part) for part in x0.split(4)])

    return run


def pipeline_run(family: str, denoiser: LatentDenoiser, source: Source, images: int, steps: int) -> Callable[[], Tensor]:
    """The diffusers pipeline with classifier-free guidance on the same networks."""
    index = source.read_json("model_index.json") or {}
    scheduler_config = source.read_json("scheduler/scheduler_config.json") or {}
    scheduler = getattr(diffusers, scheduler_config["_class_name"]).from_config(scheduler_config)
    cls: Any = getattr(diffusers, index["_class_name"])
    words: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": CFG_SCALE[family], "output_type": "pt"}
    if not denoiser.prompted:
        pipeline = cls(transformer=denoiser.network, vae=denoiser.vae, scheduler=scheduler)
        words["class_labels"] = [1] * images
    else:
        part = "unet" if "unet" in index else "transformer"
        names = [name for name in index if name.startswith(("text_encoder", "tokenizer"))]
        parts: dict[str, Any] = {part: denoiser.network, "vae": denoiser.vae, "scheduler": scheduler, **dict.fromkeys(names)}
        if family == "sd15":
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = cls(**parts)
        told = denoiser.condition(["a photo"] * images).embeddings  # type: ignore[arg-type]
        dtype = next(denoiser.network.parameters()).dtype
        words |= {
            "prompt_embeds": told["text"].to(dtype),
            "negative_prompt_embeds": torch.zeros_like(told["text"], dtype=dtype),
        }
        if "pooled" in told:
            pooled = told["pooled"].to(dtype)
            words |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": torch.zeros_like(pooled)}
        words |= dict(zip(("height", "width"), denoiser.image_shape[1:], strict=True))
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "vae") and hasattr(pipeline.vae, "enable_slicing"):
        pipeline.vae.enable_slicing()  # as ours, which decodes four at once: all at once would only cost memory
    return lambda: torch.as_tensor(pipeline(**words).images)


def measured(run: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """Seconds, and peak bytes on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0.0


def compare(family: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    source = source_of(family, args.tiny)
    denoiser = skeleton(source)
    if not isinstance(denoiser, LatentDenoiser):
        raise SystemExit(f"{family} is no model of latents")
    materialized(denoiser, device)
    denoiser.place(device, getattr(torch, args.dtype))
    extractor = tiny_extractor() if args.tiny else extractor_skeleton("dinov2")
    materialized(extractor, device)
    runs = {
        "chamfer": chamfer_run(denoiser, extractor, args.images, args.steps),
        "pipeline": pipeline_run(family, denoiser, source, args.images, args.steps),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(args.repeats + 1):
        for name, run in runs.items():
            seen = measured(run, device)
            if turn:  # the first is for warming up
                found[name].append(seen)
    seconds = {name: statistics.median(each[0] for each in seen) for name, seen in found.items()}
    peak = {name: max(each[1] for each in seen) for name, seen in found.items()}
    ratios = [b[0] / a[0] for a, b in zip(found["chamfer"], found["pipeline"], strict=True)]
    return {
        "family": family,
        "resolution": denoiser.image_shape[1],
        "images": args.images,
        "steps": args.steps,
        "dtype": args.dtype,
        "chamfer_images_per_second": args.images / seconds["chamfer"],
        "pipeline_images_per_second": args.images / seconds["pipeline"],
        "throughput_ratio": statistics.median(ratios),
        "chamfer_peak_bytes": peak["chamfer"],
        "pipeline_peak_bytes": peak["pipeline"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny networks, in float32, for a CPU")
    parser.add_argument("--families", default=",".join(FAMILIES), help="names with commas")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=None, help="at once; 8, tiny 2")
    parser.add_argument("--dtype", default=None, help="bfloat16; tiny float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON too")
    args = parser.parse_args()
    args.images = args.images or (2 if args.tiny else 8)
    args.dtype = args.dtype or ("float32" if args.tiny else "bfloat16")
    device = torch.device(args.device)
    torch.manual_seed(0)
    print("| | images/s, Chamfer | images/s, pipeline, CFG | ratio | peak, Chamfer | peak, pipeline |\n" + "|---" * 6 + "|")
    rows = []
    for family in args.families.split(","):
        row = compare(family, args, device)
        rows.append(row)
        print(
            f"| {family}, {row['resolution']} px | {row['chamfer_images_per_second']:.3g} "
            f"| {row['pipeline_images_per_second']:.3g} | {row['throughput_ratio']:.2f} "
            f"| {row['chamfer_peak_bytes'] / 1e9:.1f} GB "
            f"| {row['pipeline_peak_bytes'] / 1e9:.1f} GB |",
            flush=True,
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"\n{name}, torch {torch.__version__}, diffusers {diffusers.__version__}, {args.images} images, {args.steps} steps, "
        f"{args.dtype}; medians of {args.repeats}"
    )
    if args.out:
        write_atomically(args.out, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
