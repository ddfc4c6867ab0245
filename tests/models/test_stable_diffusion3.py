"""Stable Diffusion 3 against diffusers' own pipeline, on tiny random weights: latents, images, levels, text encoders."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.pipelines_flow import PROMPTS, distance, noise, sampled, tiny_sd3
from torch import Tensor

from handful.core.noise import Flow
from handful.errors import RequestError
from handful.models import from_pipeline, load, skeleton

SD35 = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}  # what the transformer of 3.5 Medium has more


def pipelines_own(pipeline: Any, steps: int, w: float = 0.0, **words: Any) -> Tensor:
    """The pipeline's sample from the same noise; `guidance_scale` is w + 1."""
    denoiser = from_pipeline(pipeline, resolution=(words.get("height", 64), words.get("width", 64)))
    words = {"height": 64, "width": 64, "output_type": "latent", **words}
    return pipeline(PROMPTS, num_inference_steps=steps, guidance_scale=w + 1, latents=noise(denoiser), **words).images


@pytest.mark.parametrize(("steps", "w"), [(4, 0.0), (12, 4.0)])
@pytest.mark.parametrize("t5", [True, False])
def test_latents_are_the_pipelines_own(t5, steps, w):
    pipeline = tiny_sd3(t5=t5)
    denoiser = from_pipeline(pipeline)
    wanted = pipelines_own(pipeline, steps, w)
    assert distance(sampled(denoiser, steps, w), wanted) < 1e-5  # measured: below 1e-6
    # prompts, guidance and levels weigh far more than the tolerance, in this small network too
    assert distance(sampled(denoiser, steps, w, PROMPTS[::-1]), wanted) > 1e-3
    assert distance(sampled(denoiser, steps, w + 4), wanted) > 1e-3
    assert distance(sampled(denoiser, steps, w, spacing="linspace"), wanted) > 1e-3


def test_latents_are_the_pipelines_own_with_the_blocks_of_version_3_5():
    pipeline = tiny_sd3(transformer=SD35)
    assert distance(sampled(from_pipeline(pipeline), 4, 4.0), pipelines_own(pipeline, 4, 4.0)) < 1e-5


@pytest.mark.parametrize(("kind", "shift"), [("exponential", 2.2819), ("linear", 0.825)])
def test_a_scheduler_that_shifts_by_resolution_gets_its_resolution(kind, shift):
    pipeline = tiny_sd3(use_dynamic_shifting=True, time_shift_type=kind, base_image_seq_len=16, max_image_seq_len=32)
    denoiser: Any = from_pipeline(pipeline, resolution=(64, 96))
    assert distance(sampled(denoiser, 4), pipelines_own(pipeline, 4, width=96)) < 1e-5
    assert denoiser.levels.shift == pytest.approx(shift, abs=1e-4)  # at 24 tokens, mu = 0.825
    small: Any = from_pipeline(pipeline)
    assert not torch.allclose(small.levels.spacing(4).sigma, denoiser.levels.spacing(4).sigma, atol=1e-2)


def test_decoded_images_are_the_pipelines_own():
    pipeline = tiny_sd3()
    denoiser = from_pipeline(pipeline)
    wanted = pipelines_own(pipeline, 4, 4.0, output_type="pt")
    with torch.no_grad():
        found = denoiser.decode(sampled(denoiser, 4, 4.0))
    assert found.shape == (2, *denoiser.image_shape) == (2, 3, 64, 64)
    assert float(wanted.std()) > 0.05
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), wanted, rtol=0, atol=1e-4)


def test_another_resolution_is_the_pipelines_own():
    pipeline = tiny_sd3()
    denoiser = from_pipeline(pipeline, resolution=(48, 80))
    assert denoiser.shape == (4, 6, 10)
    assert distance(sampled(denoiser, 4, 4.0), pipelines_own(pipeline, 4, 4.0, height=48, width=80)) < 1e-5


def test_a_negative_prompt_is_the_pipelines_own():
    pipeline = tiny_sd3()
    wanted = pipelines_own(pipeline, 4, 4.0, negative_prompt=["bad", "bad"])
    assert distance(sampled(from_pipeline(pipeline, negative_prompt="bad"), 4, 4.0), wanted) < 1e-5
    assert distance(sampled(from_pipeline(pipeline), 4, 4.0), wanted) > 1e-4


def test_the_pipelines_path_is_the_default_and_not_that_of_equal_times():
    levels = from_pipeline(tiny_sd3()).levels
    assert isinstance(levels, Flow)
    assert (levels.shift, levels.time_scale, levels.spacings) == (3.0, 1000, ("model", "linspace"))
    equal, own = levels.spacing(4, "linspace").sigma, levels.spacing(4).sigma
    assert torch.equal(own, levels.spacing(4, "model").sigma)
    assert float((own - equal).abs().max()) > 0.05


def test_a_shift_set_on_the_scheduler_itself_counts():
    pipeline: Any = tiny_sd3()
    pipeline.scheduler.set_shift(6.0)
    denoiser: Any = from_pipeline(pipeline)
    assert denoiser.levels.shift == 6.0
    assert distance(sampled(denoiser, 4), pipelines_own(pipeline, 4)) < 1e-5


def test_positions_bound_the_resolution(tmp_path):
    tiny_sd3(tmp_path)
    assert skeleton(tmp_path, resolution=(128, 128)).shape == (4, 16, 16)
    for make in (skeleton, load):
        with pytest.raises(RequestError, match=r"^model\.resolution: \[64, 144\].*for 128 pixels per side.*Use 128 or less"):
            make(tmp_path, resolution=(64, 144))


# --- fewer text encoders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without", [("text_encoder_3", "tokenizer_3"), ("text_encoder_3",), ("tokenizer_3",)])
def test_without_t5_the_pipeline_without_it_is_loaded_and_its_weights_are_not_read(tmp_path, without):
    tiny_sd3(tmp_path)
    (tmp_path / "text_encoder_3" / "model.safetensors").unlink()
    denoiser: Any = load(tmp_path, without=without)
    wanted = pipelines_own(tiny_sd3(t5=False), 4, 4.0)
    assert distance(sampled(denoiser, 4, 4.0), wanted) < 1e-5
    assert distance(sampled(from_pipeline(tiny_sd3()), 4, 4.0), wanted) > 1e-3
    assert set(denoiser.components()) == {"network", "vae", "text_encoder", "text_encoder_2"}
    text = skeleton(tmp_path, without=without).condition(PROMPTS).embeddings["text"]
    assert text.shape == denoiser.condition(PROMPTS).embeddings["text"].shape == (2, 77 + 256, 32)
    assert bool((denoiser.condition(PROMPTS).embeddings["text"][:, 77:] == 0).all())


def test_a_pipeline_saved_without_t5_loads(tmp_path):
    pipeline = tiny_sd3(tmp_path, t5=False)
    assert skeleton(tmp_path).shape == (4, 8, 8)
    assert torch.equal(sampled(load(tmp_path), 4, 4.0), sampled(from_pipeline(pipeline), 4, 4.0))


def test_its_first_text_encoders_can_not_be_left_out(tmp_path):
    tiny_sd3(tmp_path)
    with pytest.raises(RequestError, match=r"^model\.without: 'text_encoder_2'.*only these.*text_encoder_3"):
        skeleton(tmp_path, without=("text_encoder_2",))


# --- single files ------------------------------------------------------------------------------------------------------

BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}


def original(weights: dict[str, Tensor], layers: int = 2) -> dict[str, Tensor]:
    """The transformer's tensors in the layout of the original release: q, k, v in one, and (shift, scale) for (scale, shift)
    where the last block and the output have no gate."""
    out = {"pos_embed": weights["pos_embed.pos_embed"]}
    for kind in ("weight", "bias"):
        out |= {f"{new}.{kind}": weights[f"{old}.{kind}"] for old, new in TOP.items()}
        for i in range(layers):
            held = {name: weights.get(f"transformer_blocks.{i}.{name}.{kind}") for name in BLOCK}
            out |= {f"joint_blocks.{i}.{BLOCK[name]}.{kind}": value for name, value in held.items() if value is not None}
            for side, names in (("x", ("to_q", "to_k", "to_v")), ("context", ("add_q_proj", "add_k_proj", "add_v_proj"))):
                joined = torch.cat([weights[f"transformer_blocks.{i}.attn.{name}.{kind}"] for name in names])
                out[f"joint_blocks.{i}.{side}_block.attn.qkv.{kind}"] = joined
        swapped = (
            f"joint_blocks.{layers - 1}.context_block.adaLN_modulation.1.{kind}",
            f"final_layer.adaLN_modulation.1.{kind}",
        )
        out |= {name: torch.cat(out[name].chunk(2)[::-1]) for name in swapped}
    return {f"model.diffusion_model.{name}": value.contiguous() for name, value in out.items()}


def test_a_single_files_transformer_is_put_into_the_pipeline_of_its_config(tmp_path):
    pipeline: Any = tiny_sd3(tmp_path / "whole")
    wanted = sampled(from_pipeline(pipeline), 4, 4.0)
    save_file(original(pipeline.transformer.state_dict()), tmp_path / "x.safetensors")
    (tmp_path / "whole" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()  # nobody needs it
    words: Any = {"config": tmp_path / "whole"}
    assert skeleton(tmp_path / "x.safetensors", **words).shape == (4, 8, 8)
    assert distance(sampled(load(tmp_path / "x.safetensors", **words), 4, 4.0), wanted) < 1e-6


def test_a_single_file_that_lacks_a_tensor_or_a_pipeline_is_refused(tmp_path):
    pipeline: Any = tiny_sd3(tmp_path / "whole")
    weights = original(pipeline.transformer.state_dict())
    del weights["model.diffusion_model.final_layer.linear.bias"]
    save_file(weights, tmp_path / "x.safetensors")
    words: Any = {"config": tmp_path / "whole"}
    with pytest.raises(RequestError, match=r"^model: .*x\.safetensors'.*SD3Transformer2DModel"):
        load(tmp_path / "x.safetensors", **words)
    (tmp_path / "empty").mkdir()
    for config in (tmp_path / "empty", tmp_path / "absent", tmp_path / "x.safetensors"):
        words = {"config": config}
        with pytest.raises(RequestError, match=r"^model\.config: .*no such pipeline"):
            skeleton(tmp_path / "x.safetensors", **words)
