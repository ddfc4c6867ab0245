"""Networks distilled for few steps: latent consistency models against diffusers' own, and guidance at 1 to 8 steps."""

from typing import Any

import diffusers
import pytest
import torch
from support.pipelines import TRAINED, tiny_stable_diffusion
from torch import Tensor

from handful.core.samplers import lcm, start
from handful.features.extractor import pixels
from handful.guidance import CFG, Chamfer, Guided, Pull
from handful.guidance.chamfer import ChamferRequest
from handful.models import from_pipeline
from handful.recipe.schema import for_model


def tiny_lcm() -> Any:
    pipeline = tiny_stable_diffusion(scheduler=diffusers.LCMScheduler(**TRAINED), unet={"time_cond_proj_dim": 8})
    pipeline.unet.time_embedding.cond_proj.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    parts = {name: part for name, part in pipeline.components.items() if name not in ("image_encoder",)}
    made: Any = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def sampled(denoiser: Any, steps: int) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    path = denoiser.levels.spacing(steps, "model")
    told = denoiser.condition(["a cat", "a dog"])
    return lcm(denoiser, start(noise(), path), path, told, noise=lambda: torch.randn(2, 4, 8, 8, generator=draw))


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_latent_consistency_models_sample_is_the_pipelines_own(steps: int):
    pipeline = tiny_lcm()
    found = sampled(from_pipeline(pipeline, embedded_guidance=8.5), steps)
    words = {"num_inference_steps": steps, "latents": noise(), "guidance_scale": 8.5, "output_type": "latent"}
    wanted = pipeline(["a cat", "a dog"], generator=torch.Generator().manual_seed(5), **words).images
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    other = sampled(from_pipeline(pipeline, embedded_guidance=2.0), steps)
    assert float((other - wanted).norm() / wanted.norm()) > 1e-3, "the scale it is told counts"


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (2, 1), (4, 1), (7, 1), (8, 2), (18, 4)])
def test_four_guided_steps_are_all_of_fewer(steps: int, every: int):
    assert for_model(ChamferRequest(features="dinov2"), "sd", steps).every == every


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_guidance_acts_at_few_steps_and_stays_finite(steps: int):
    denoiser = from_pipeline(tiny_lcm())
    real = torch.rand(3, *denoiser.image_shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    plain = sampled(denoiser, steps)
    for term in (CFG(1.0), Chamfer(pixels(), real.flatten(1), 0.4, pull=Pull("exact"))):
        guided = sampled(Guided(denoiser, [term]), steps)
        assert guided.isfinite().all()
        assert not torch.allclose(guided, plain, atol=1e-4)
