"""Pipelines that were only listened to: their samples are the pipelines' own, and what can't be followed is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.pipelines_flow import distance, noise
from support.pipelines_more import MORE, tiny
from torch import Tensor

from handful.core.samplers import ddim, dpmpp_2m, start
from handful.errors import RequestError
from handful.guidance.cfg import CFG
from handful.guidance.guided import Guided
from handful.models import from_pipeline, load
from handful.models.any_pipeline import PipelineDenoiser, _same
from handful.models.latent import packed, unpacked

PROMPTS = ["a red cat", "a dog"]
SIZE = (32, 32)
RENORMALISED = ("qwen",)  # its classifier-free guidance rescales the sum, which ours does not
MULTISTEP = ("pixart", "sana")


def listened(name: str, **options: Any) -> tuple[Any, PipelineDenoiser]:
    pipeline = tiny(name)
    options = {"resolution": None if name == "pixart" else SIZE, **options}
    denoiser = from_pipeline(pipeline, **options)
    assert isinstance(denoiser, PipelineDenoiser)
    return pipeline, denoiser


@torch.no_grad()
def own(pipeline: Any, denoiser: PipelineDenoiser, name: str, steps: int, w: float, **words: Any) -> Tensor:
    latents = noise(denoiser)
    scale = "true_cfg_scale" if name == "qwen" else "guidance_scale"
    words = {scale: w + 1, "output_type": "latent", **words}
    words |= {"cfg_normalization": False} if name == "lumina2" else {}
    words |= {"use_resolution_binning": False} if name in MULTISTEP else {}
    of_tokens = denoiser.heard.packed
    height, width = denoiser.resolution
    given = packed(latents) if of_tokens else latents
    # one at a time, since some encode a prompt otherwise beside a longer one
    found = torch.cat(
        [
            pipeline([prompt], num_inference_steps=steps, latents=one[None], height=height, width=width, **words).images
            for prompt, one in zip(PROMPTS, given, strict=True)
        ]
    )
    return unpacked(found, height // 16, width // 16) if of_tokens and words["output_type"] == "latent" else found


@torch.no_grad()
def ours(denoiser: PipelineDenoiser, name: str, steps: int, w: float) -> Tensor:
    levels = denoiser.levels.spacing(steps, "model")
    guided = Guided(denoiser, [CFG(w)]) if w else denoiser
    walk = dpmpp_2m if name in MULTISTEP else ddim
    return walk(guided, start(noise(denoiser), levels), levels, denoiser.condition(PROMPTS))


@pytest.mark.parametrize("name", MORE)
def test_samples_with_and_without_guidance_and_images_are_the_pipelines_own(name: str):
    pipeline, denoiser = listened(name)
    for steps in (4, 20):
        plain = own(pipeline, denoiser, name, steps, 0)
        assert distance(ours(denoiser, name, steps, 0), plain) < 1e-4
    if name not in RENORMALISED:
        wanted = own(pipeline, denoiser, name, 4, 3)
        off = distance(ours(denoiser, name, 4, 3), wanted)
        assert off < 1e-4
        # guidance weighs far more than what is left, in networks that hear little of their prompts too
        assert distance(wanted, own(pipeline, denoiser, name, 4, 0)) > 20 * off
    images = own(pipeline, denoiser, name, 4, 0, output_type="pt")
    with torch.no_grad():
        found = denoiser.decode(ours(denoiser, name, 4, 0))
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), images, rtol=0, atol=2e-4)


def test_prompts_count_encoders_can_go_and_new_paths_are_still_known(tmp_path: Path):
    tiny("auraflow").save_pretrained(tmp_path)
    denoiser = load(tmp_path, resolution=SIZE, negative_prompt="bad")
    assert denoiser.image_shape == (3, 32, 32)
    denoiser.encode_prompts(["a", "a long prompt"])
    denoiser.free_text_encoders()
    told = denoiser.condition(["a", "a long prompt"])
    assert not torch.equal(*told.embeddings["encoder_hidden_states"])
    assert not torch.equal(told.null().embeddings["encoder_hidden_states"][:1], told.embeddings["encoder_hidden_states"][:1])
    assert denoiser.levels.spacing(7).steps == 7


def test_prompts_of_several_lengths_fill_up_with_zeros():
    _, denoiser = listened("qwen")
    short, long = (denoiser.condition([prompt]).embeddings["encoder_hidden_states"] for prompt in ("a", "a long prompt"))
    both = denoiser.condition(["a", "a long prompt"]).embeddings["encoder_hidden_states"]
    assert torch.equal(both[:1, : short.shape[1]], short)
    assert not both[0, short.shape[1] :].any()
    assert torch.equal(both[1:], long)


def test_what_can_not_be_followed_is_refused_with_the_lines_of_a_file(monkeypatch: pytest.MonkeyPatch):
    pipeline = tiny("auraflow")
    step = type(pipeline.scheduler).step
    monkeypatch.setattr(type(pipeline.transformer), "forward", lambda self, x, **_: x)
    with pytest.raises(
        RequestError, match=r"can't be used outside the pipeline.*\n.*\n *from diffusers import AuraFlowPipeline"
    ):
        from_pipeline(pipeline)
    assert type(pipeline.scheduler).step is step
    assert "step" not in pipeline.scheduler.__dict__
    assert type(pipeline).__name__ == "AuraFlowPipeline"


def test_pipelines_of_tokens_are_refused_and_positions_in_pairs_are_constant(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "AmusedPipeline"}')
    with pytest.raises(RequestError, match="predicts tokens"):
        load(tmp_path)
    ones, twos = (torch.ones(2), torch.zeros(2)), (torch.ones(2), torch.ones(2))
    assert _same(ones, (torch.ones(2), torch.zeros(2)))
    assert not _same(ones, twos)
