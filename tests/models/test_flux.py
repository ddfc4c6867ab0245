"""Flux against diffusers' own pipeline, on tiny random weights: latents, images, levels, embedded guidance."""

from typing import Any

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from support.pipelines_flow import PROMPTS, distance, noise, sampled, tiny_flux
from torch import Tensor

from handful.core.noise import Flow
from handful.errors import RequestError
from handful.models import from_pipeline, load, skeleton
from handful.models.flux import load as load_flux
from handful.models.flux import positions
from handful.models.latent import packed, unpacked
from handful.models.options import ModelOptions
from handful.models.source import Source

SIZE = (64, 96)


def pipelines_own(pipeline: Any, steps: int, w: float = 0.0, size: tuple[int, int] = SIZE, **words: Any) -> Tensor:
    """The pipeline's sample from the same noise, unpacked by its own helper; `true_cfg_scale` is w + 1."""
    height, width = size
    tokens = 512 if pipeline.transformer.config.guidance_embeds else 256
    words = {"output_type": "latent", "negative_prompt": ["", ""], "true_cfg_scale": w + 1, **words}
    latents = noise(from_pipeline(pipeline, resolution=size))
    found = pipeline(
        PROMPTS,
        num_inference_steps=steps,
        latents=FluxPipeline._pack_latents(latents, *latents.shape),
        height=height,
        width=width,
        max_sequence_length=tokens,
        **words,
    ).images
    if words["output_type"] != "latent":
        return found
    return FluxPipeline._unpack_latents(found, height, width, pipeline.vae_scale_factor)


@pytest.mark.parametrize(("steps", "w"), [(4, 0.0), (12, 4.0)])
@pytest.mark.parametrize("dynamic_shift", [True, False])
@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_latents_are_the_pipelines_own(guidance_embeds, dynamic_shift, steps, w):
    pipeline = tiny_flux(guidance_embeds=guidance_embeds, dynamic_shift=dynamic_shift)
    denoiser = from_pipeline(pipeline, resolution=SIZE)
    assert denoiser.shape == (4, 8, 12)
    wanted = pipelines_own(pipeline, steps, w)
    assert distance(sampled(denoiser, steps, w), wanted) < 1e-5  # measured: below 1e-6
    # prompts and guidance weigh far more than the tolerance, in this small network too
    assert distance(sampled(denoiser, steps, w, PROMPTS[::-1]), wanted) > 1e-3
    assert distance(sampled(denoiser, steps, w + 4), wanted) > 1e-3


def test_embedded_guidance_is_the_pipelines_guidance_scale():
    pipeline = tiny_flux()
    wanted = pipelines_own(pipeline, 4, guidance_scale=7.0)
    assert distance(sampled(from_pipeline(pipeline, resolution=SIZE, embedded_guidance=7.0), 4), wanted) < 1e-5
    assert distance(sampled(from_pipeline(pipeline, resolution=SIZE), 4), wanted) > 1e-4


def test_decoded_images_are_the_pipelines_own():
    pipeline = tiny_flux()
    denoiser = from_pipeline(pipeline, resolution=SIZE)
    wanted = pipelines_own(pipeline, 4, 4.0, output_type="pt")
    with torch.no_grad():
        found = denoiser.decode(sampled(denoiser, 4, 4.0))
    assert found.shape == (2, *denoiser.image_shape) == (2, 3, 64, 96)
    assert float(wanted.std()) > 0.05
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), wanted, rtol=0, atol=1e-4)


def test_a_negative_prompt_is_the_pipelines_own():
    pipeline = tiny_flux()
    wanted = pipelines_own(pipeline, 4, 4.0, negative_prompt=["bad", "bad"])
    assert distance(sampled(from_pipeline(pipeline, resolution=SIZE, negative_prompt="bad"), 4, 4.0), wanted) < 1e-5
    assert distance(sampled(from_pipeline(pipeline, resolution=SIZE), 4, 4.0), wanted) > 1e-4


def test_tokens_and_positions_are_in_the_pipelines_order():
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    assert torch.equal(packed(latents), FluxPipeline._pack_latents(latents, *latents.shape))
    assert torch.equal(unpacked(packed(latents), 2, 3), latents)
    like = torch.zeros(1)
    assert torch.equal(positions(2, 3, like), FluxPipeline._prepare_latent_image_ids(1, 2, 3, "cpu", like.dtype))


@pytest.mark.parametrize(("size", "shift"), [((256, 256), 1.6487), ((1024, 1024), 3.1582)])
def test_the_shift_grows_with_the_resolution(tmp_path, size, shift):
    tiny_flux(tmp_path)
    levels = skeleton(tmp_path, resolution=size).levels
    assert isinstance(levels, Flow)
    assert levels.shift == pytest.approx(shift, abs=1e-4)  # e^0.5 at 256 tokens, e^1.15 at 4096
    assert (levels.time_scale, levels.spacings) == (1.0, ("model", "linspace"))
    # Flux gives its scheduler equal times, so that its path is ours of that shift; Stable Diffusion 3 does not
    torch.testing.assert_close(levels.spacing(7, "model").sigma, levels.spacing(7, "linspace").sigma, rtol=1e-6, atol=1e-6)


def test_without_another_wish_images_are_128_latent_pixels_a_side(tmp_path):
    pipeline: Any = tiny_flux(tmp_path)
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    assert skeleton(tmp_path).image_shape == (3, side, side)


def test_a_transformer_that_is_not_told_guidance_refuses_it(tmp_path):
    pipeline = tiny_flux(tmp_path, guidance_embeds=False)
    for make in (skeleton, load):
        with pytest.raises(RequestError, match=r"^model\.embedded_guidance: 5\.0: .*does not use it"):
            make(tmp_path, embedded_guidance=5.0)
    with pytest.raises(RequestError, match=r"^model\.embedded_guidance"):
        from_pipeline(pipeline, embedded_guidance=5.0)


def test_prompts_are_512_tokens_or_256_where_no_guidance_is_told():
    for guidance_embeds, tokens in ((True, 512), (False, 256)):
        text = from_pipeline(tiny_flux(guidance_embeds=guidance_embeds)).condition(PROMPTS).embeddings["text"]
        assert text.shape == (2, tokens, 32)


def test_t5_can_not_be_left_out(tmp_path):
    tiny_flux(tmp_path)
    with pytest.raises(RequestError, match=r"^model\.without: 'text_encoder_2'"):
        skeleton(tmp_path, without=("text_encoder_2",))


def test_a_transformer_that_is_told_an_image_too_is_refused():
    with pytest.raises(RequestError, match=r"takes 24 channels and its latents have 16.*inpainting"):
        from_pipeline(tiny_flux(transformer={"in_channels": 24}))


def test_a_single_files_transformer_is_put_into_the_pipeline_of_its_config(tmp_path):
    # in diffusers' own layout: its conversion of the original one fits a transformer of 3072 channels only
    pipeline: Any = tiny_flux(tmp_path)
    wanted = sampled(from_pipeline(pipeline, resolution=SIZE), 4)
    file = (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "x.safetensors")
    options = ModelOptions(config=tmp_path, resolution=SIZE)
    assert distance(sampled(load_flux(Source("x", file=file), options), 4), wanted) < 1e-6
