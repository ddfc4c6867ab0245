"""Stable Diffusion and SDXL against diffusers' own pipelines, on tiny random weights: latents, images, prompts, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from support.pipelines import TRAINED, tiny_sdxl, tiny_stable_diffusion
from support.pipelines_flow import tiny_flux
from torch import Tensor

from handful.core.denoiser import Denoiser
from handful.core.samplers import ddim, start
from handful.errors import RequestError
from handful.guidance.cfg import CFG
from handful.guidance.guided import Guided
from handful.models import from_pipeline, load, skeleton

PROMPTS = ["a red cat", "two dogs"]
MAKERS = {
    "sd-epsilon": tiny_stable_diffusion,
    "sd-v": lambda folder=None: tiny_stable_diffusion(folder, "v_prediction"),
    "sdxl": tiny_sdxl,
}
families = pytest.mark.parametrize("family", MAKERS)


def noise(n: int = 2, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(n, 4, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def sampled(denoiser: Any, steps: int, w: float = 0.0, prompts: list[str] = PROMPTS) -> Tensor:
    levels = denoiser.levels.spacing(steps, "model")
    guided: Denoiser = Guided(denoiser, [CFG(w)]) if w else denoiser
    return ddim(guided, start(noise(len(prompts), *denoiser.shape[1:]), levels), levels, denoiser.condition(prompts))


def pipelines_own(pipeline: Any, steps: int, w: float = 0.0, latents: Tensor | None = None, **words: Any) -> Tensor:
    words = {"output_type": "latent", **words}
    latents = noise() if latents is None else latents
    return pipeline(PROMPTS, num_inference_steps=steps, guidance_scale=w + 1, latents=latents, **words).images


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((found - wanted).norm() / wanted.norm())


# --- parity with the pipelines -----------------------------------------------------------------------------------------
# Stable Diffusion 1.5 ships PNDM, which is multistep and has no spacing "model": it is replaced by DDIM here, as its users
# do. SDXL's own Euler is DDIM without noise in other variables.


@families
@pytest.mark.parametrize(("steps", "w"), [(4, 0.0), (12, 4.0)])
def test_latents_are_the_pipelines_own(family, steps, w):
    pipeline: Any = MAKERS[family]()
    denoiser = from_pipeline(pipeline)
    wanted = pipelines_own(pipeline, steps, w)
    assert distance(sampled(denoiser, steps, w), wanted) < 1e-5  # measured: below 1e-6
    # the prompts and the guidance weigh far more than the tolerance, in these small networks too
    assert distance(sampled(denoiser, steps, w, PROMPTS[::-1]), wanted) > 1e-3
    assert distance(sampled(denoiser, steps, w + 4), wanted) > 1e-3


@families
def test_decoded_images_are_the_pipelines_own(family):
    pipeline: Any = MAKERS[family]()
    denoiser = from_pipeline(pipeline)
    wanted = pipelines_own(pipeline, 4, 4.0, output_type="pt")
    with torch.no_grad():
        found = denoiser.decode(sampled(denoiser, 4, 4.0))
    assert found.shape == (2, *denoiser.image_shape) == (2, 3, 64, 64)
    assert float(wanted.std()) > 0.05
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), wanted, rtol=0, atol=1e-4)


@families
def test_another_resolution_is_the_pipelines_own_also_where_the_unet_halves_odd_sides(family):
    pipeline: Any = MAKERS[family]()
    denoiser = from_pipeline(pipeline, resolution=(72, 40))
    assert denoiser.shape == (4, 9, 5)
    wanted = pipelines_own(pipeline, 4, 4.0, noise(2, 9, 5), height=72, width=40)
    assert distance(sampled(denoiser, 4, 4.0), wanted) < 1e-5


def test_sdxl_is_told_its_sizes():
    pipeline: Any = tiny_sdxl()
    denoiser = from_pipeline(pipeline)
    other = pipelines_own(pipeline, 4, original_size=(512, 512), target_size=(64, 64))
    assert distance(sampled(denoiser, 4), other) > 1e-3
    assert distance(sampled(denoiser, 4), pipelines_own(pipeline, 4, original_size=(64, 64), target_size=(64, 64))) < 1e-5


@families
def test_a_negative_prompt_is_the_pipelines_own(family):
    pipeline: Any = MAKERS[family]()
    denoiser = from_pipeline(pipeline, negative_prompt="bad")
    wanted = pipelines_own(pipeline, 4, 4.0, negative_prompt=["bad", "bad"])
    assert distance(sampled(denoiser, 4, 4.0), wanted) < 1e-5
    assert distance(sampled(from_pipeline(pipeline), 4, 4.0), wanted) > 1e-4


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_makes_of_no_negative_prompt_what_its_pipeline_makes(zeros):
    pipeline: Any = tiny_sdxl(force_zeros_for_empty_prompt=zeros)
    null = from_pipeline(pipeline).condition(["a"]).null().embeddings
    assert bool((null["text"] == 0).all()) == bool((null["pooled"] == 0).all()) == zeros
    assert null["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    assert distance(sampled(from_pipeline(pipeline), 4, 4.0), pipelines_own(pipeline, 4, 4.0)) < 1e-5


def test_a_multistep_scheduler_gives_its_levels_and_no_path():
    pipeline: Any = tiny_stable_diffusion(scheduler=PNDMScheduler(**TRAINED, skip_prk_steps=True))
    denoiser, usual = from_pipeline(pipeline), from_pipeline(tiny_stable_diffusion())
    assert "model" in usual.levels.spacings
    assert "model" not in denoiser.levels.spacings
    assert torch.equal(denoiser.levels.spacing(4, "leading").alpha, usual.levels.spacing(4, "leading").alpha)


def test_an_older_config_is_mended_as_the_pipeline_mends_it(tmp_path):
    pipeline: Any = tiny_stable_diffusion(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "steps_offset": 0}))
    wanted = from_pipeline(pipeline).levels.spacing(5, "model")
    for denoiser in (skeleton(tmp_path), load(tmp_path)):
        assert torch.equal(denoiser.levels.spacing(5, "model").alpha, wanted.alpha)


# --- directories -------------------------------------------------------------------------------------------------------


@families
def test_a_saved_pipeline_loads_as_it_was(tmp_path, family):
    pipeline: Any = MAKERS[family](tmp_path)
    assert torch.equal(sampled(load(tmp_path), 4, 4.0), sampled(from_pipeline(pipeline), 4, 4.0))


@families
def test_a_skeleton_is_the_loaded_denoiser_without_its_weights(tmp_path, family):
    MAKERS[family](tmp_path / "whole")
    loaded: Any = load(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    outline: Any = skeleton(tmp_path / "bare")
    for name in ("shape", "image_shape", "prediction", "prompted", "has_null"):
        assert getattr(outline, name) == getattr(loaded, name)
    for kind in loaded.levels.spacings:
        assert torch.equal(outline.levels.spacing(7, kind).alpha, loaded.levels.spacing(7, kind).alpha)
    assert all(weight.is_meta for weight in outline.parameters())
    mine, theirs = outline.condition(PROMPTS), loaded.condition(PROMPTS)
    for one, other in ((mine, theirs), (mine.null(), theirs.null())):
        assert {name: each.shape for name, each in one.embeddings.items()} == {
            name: each.shape for name, each in other.embeddings.items()
        }
    x_t = torch.empty(2, *outline.shape, device="meta")
    assert outline.decode(outline(x_t, loaded.levels.spacing(4)[1], mine)).shape == (2, 3, 64, 64)
    with pytest.raises(RequestError, match=r"^model: .*bare.*can't be loaded"):
        load(tmp_path / "bare")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_lack_a_tensor_are_refused(tmp_path, part):
    from safetensors.torch import load_file, save_file

    tiny_stable_diffusion(tmp_path)
    file = tmp_path / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights[sorted(weights)[3]]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(RequestError, match=rf"^model: .*it lacks 1 tensor of its {part}"):
        load(tmp_path)


def test_the_digest_names_every_network():
    assert set(from_pipeline(tiny_stable_diffusion()).components()) == {"network", "vae", "text_encoder"}
    denoiser: Any = from_pipeline(tiny_sdxl())
    assert set(denoiser.components()) == {"network", "vae", "text_encoder", "text_encoder_2"}
    denoiser.free_text_encoders()
    assert set(denoiser.components()) == {"network", "vae"}


# --- prompts -----------------------------------------------------------------------------------------------------------


def test_text_encoders_run_once_a_prompt_and_once_for_none():
    pipeline: Any = tiny_sdxl()
    runs = [0, 0]

    def count(which: int) -> Any:
        def hook(*_: Any) -> None:
            runs[which] += 1

        return hook

    pipeline.text_encoder.register_forward_hook(count(0))
    pipeline.text_encoder_2.register_forward_hook(count(1))
    denoiser: Any = from_pipeline(pipeline)
    denoiser.encode_prompts(["a", "b", "a"])
    for _ in range(3):
        denoiser.condition(["b", "a", "b"]).null()
    assert runs == [3, 3]  # a, b, and the empty one


@families
def test_freed_encoders_leave_what_they_said(family):
    pipeline: Any = MAKERS[family]()
    denoiser: Any = from_pipeline(pipeline)
    before = sampled(denoiser, 4, 4.0)
    denoiser.free_text_encoders()
    assert pipeline.text_encoder is None
    assert pipeline.tokenizer is None
    assert torch.equal(sampled(denoiser, 4, 4.0), before)
    with pytest.raises(RequestError, match=r"^prompt: 'a new one'.*freed"):
        denoiser.condition(["a new one"])


@families
def test_prompts_in_one_batch_equal_each_alone(family):
    denoiser: Any = from_pipeline(MAKERS[family]())
    x_t, at = noise(3), denoiser.levels.spacing(4)[1]
    prompts = ["a", "a much longer one of many words", "b"]
    together = denoiser.condition(prompts)
    with torch.no_grad():
        batch = denoiser(x_t, at, together)
        for i, prompt in enumerate(prompts):
            alone = denoiser(x_t[i : i + 1], at, denoiser.condition([prompt]))
            torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(denoiser(x_t[i : i + 1], at, together[i : i + 1]), alone, rtol=1e-5, atol=1e-5)
        assert distance(denoiser(x_t, at, denoiser.condition(prompts[::-1])), batch) > 1e-4


def test_chunks_of_a_cohort_give_the_same_sample():
    denoiser: Any = from_pipeline(tiny_sdxl())
    levels, prompts = denoiser.levels.spacing(4, "model"), ["a", "b", "c"]
    with torch.no_grad():
        whole, parts = (
            ddim(Guided(denoiser, [CFG(4.0)], chunk), start(noise(3), levels), levels, denoiser.condition(prompts))
            for chunk in (None, 2)
        )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("labels", [[0, 1], torch.tensor([0, 1])])
def test_labels_are_refused(labels):
    with pytest.raises(RequestError, match=r"^prompt: .*takes prompts, not labels"):
        from_pipeline(tiny_stable_diffusion()).condition(labels)


# --- precision ---------------------------------------------------------------------------------------------------------


@families
def test_half_precision_keeps_the_state_in_float32_and_near_to_float32s_sample(family):
    wanted = sampled(from_pipeline(MAKERS[family]()), 4, 4.0)
    denoiser: Any = from_pipeline(MAKERS[family]())
    denoiser.place("cpu", torch.bfloat16)
    assert denoiser.network.dtype == denoiser.vae.dtype == torch.bfloat16
    found = sampled(denoiser, 4, 4.0)
    with torch.no_grad():
        images = denoiser.decode(found)
    assert found.dtype == images.dtype == torch.float32
    assert bool(images.isfinite().all())
    assert 1e-5 < distance(found, wanted) < 0.1


def test_sdxl_keeps_its_autoencoder_in_float32_where_the_weights_are_float16(tmp_path):
    tiny_sdxl(tmp_path)
    placed: Any = from_pipeline(tiny_sdxl())
    placed.place("cpu", torch.float16)
    for denoiser in (load(tmp_path, dtype=torch.float16), placed):
        network, vae = denoiser.components()["network"], denoiser.components()["vae"]
        assert (next(network.parameters()).dtype, next(vae.parameters()).dtype) == (torch.float16, torch.float32)
    loaded: Any = load(tmp_path, dtype=torch.float16)
    assert loaded.vae is loaded.pipeline.vae  # so that offloading the pipeline offloads it too
    half = load(tmp_path, dtype=torch.bfloat16).components()
    assert next(half["network"].parameters()).dtype == next(half["vae"].parameters()).dtype == torch.bfloat16


def test_a_pipeline_in_float16_keeps_its_own_autoencoder_as_it_was():
    pipeline: Any = tiny_sdxl().to(torch.float16)
    denoiser: Any = from_pipeline(pipeline)
    assert (denoiser.vae.dtype, pipeline.vae.dtype) == (torch.float32, torch.float16)
    assert denoiser.network is pipeline.unet


@families
def test_parts_that_are_offloaded_compute_where_their_hooks_say(family):
    accelerate = pytest.importorskip("accelerate")
    pipeline: Any = MAKERS[family]()
    denoiser: Any = from_pipeline(pipeline)
    wanted = denoiser.decode(sampled(from_pipeline(MAKERS[family]()), 4, 4.0))
    for part in denoiser.components().values():
        accelerate.cpu_offload(part, execution_device="cpu")  # the weights are on meta between calls
    denoiser.offloaded_to = torch.device("cpu")
    assert pipeline.text_encoder.device.type == "meta"
    torch.testing.assert_close(denoiser.decode(sampled(denoiser, 4, 4.0)), wanted)


# --- encode, decode, preview -------------------------------------------------------------------------------------------


@families
def test_encode_scales_latents_as_the_pipelines_do(family):
    pipeline: Any = MAKERS[family]()
    denoiser = from_pipeline(pipeline)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    vae: Any = pipeline.vae
    with torch.no_grad():
        wanted = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
        found = denoiser.encode(images)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(denoiser.decode(found), vae.decode(wanted / vae.config.scaling_factor).sample)
        assert denoiser.encode(denoiser.decode(found)).shape == found.shape == (2, *denoiser.shape)


@families
def test_decode_and_the_estimate_are_differentiable_and_the_weights_frozen(family):
    denoiser = from_pipeline(MAKERS[family]())
    x_t = noise().requires_grad_()
    denoiser.decode(denoiser(x_t, denoiser.levels.spacing(4)[1], denoiser.condition(PROMPTS))).square().sum().backward()
    assert x_t.grad is not None
    assert float(x_t.grad.abs().sum()) > 0
    assert not any(weight.requires_grad for weight in denoiser.parameters())


def test_a_preview_has_half_the_resolution_and_a_tiny_decoder_can_make_it(tmp_path):
    pipeline: Any = tiny_stable_diffusion()
    denoiser = from_pipeline(pipeline)
    with torch.no_grad():
        assert denoiser.preview(noise(), reduce=2).shape == (2, 3, 32, 32)
        assert torch.equal(denoiser.preview(noise()), denoiser.decode(noise()))
        blocks = {"encoder_block_out_channels": (4, 4, 4, 4), "decoder_block_out_channels": (4, 4, 4, 4)}
        tiny: Any = AutoencoderTiny(**blocks, latent_channels=4).eval()
        tiny.save_pretrained(tmp_path)
        small = from_pipeline(pipeline, preview_decoder=tmp_path)
        torch.testing.assert_close(small.preview(noise()), tiny.decode(noise()).sample)
        assert torch.equal(small.decode(noise()), denoiser.decode(noise()))


# --- refusals ----------------------------------------------------------------------------------------------------------


def refused(folder: Path, problem: str, **words: Any) -> None:
    """From the configs alone, before weights are read: there are none."""
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    for call in (skeleton, load):
        with pytest.raises(RequestError, match=problem):
            call(folder, **words)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"in_channels": 9}, r"^model: .*9 channels and its latents have 4.*inpainting"),
        ({"num_class_embeds": 5}, r"^model: .*needs a class or a level of noise"),
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 2}, r"^model: .*addition_embed_type text"),
    ],
)
def test_unets_that_are_told_more_than_a_prompt_are_refused_by_name(tmp_path, config, problem):
    pipeline = tiny_stable_diffusion(tmp_path, unet=config)
    with pytest.raises(RequestError, match=problem):
        from_pipeline(pipeline)
    refused(tmp_path, problem)


def test_refiners_are_refused_by_name(tmp_path):
    tiny_sdxl(tmp_path / "said")
    index = tmp_path / "said" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "requires_aesthetics_score": True}))
    refused(tmp_path / "said", r"^model: .*refiner of SDXL")
    wanting = {"projection_class_embeddings_input_dim": 16 + 5 * 4}  # five numbers beside the pooled embedding
    pipeline = tiny_sdxl(tmp_path / "five", unet=wanting)
    with pytest.raises(RequestError, match=r"^model: .*refiner of SDXL"):
        from_pipeline(pipeline)
    refused(tmp_path / "five", r"^model: .*refiner of SDXL")


def test_a_pipeline_without_text_encoder_is_refused(tmp_path):
    pipeline: Any = tiny_sdxl()
    pipeline.text_encoder = pipeline.tokenizer = None
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"^model: .*no text_encoder and no tokenizer"):
        from_pipeline(pipeline)
    refused(tmp_path, r"^model: .*no text_encoder and no tokenizer")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"classes": ["cat", "dog"]}, r"^model\.classes: .*takes prompts, not labels"),
        ({"null_class": 0}, r"^model\.null_class: 0: .*takes prompts, not labels"),
        ({"without": ("vae",)}, r"^model\.without: 'vae': .*needs this part"),
        ({"without": ("safety_checker", "text_encoder_3")}, r"^model\.without: 'text_encoder_3'"),
        ({"resolution": (64, 60)}, r"^model\.resolution: \[64, 60\]: 60 is not a multiple of 8"),
        ({"resolution": (0, 64)}, r"^model\.resolution: "),
    ],
)
def test_options_that_can_not_be_followed_are_refused(tmp_path, words, problem):
    pipeline = tiny_stable_diffusion(tmp_path)
    with pytest.raises(RequestError, match=problem):
        from_pipeline(pipeline, **words)
    refused(tmp_path, problem, **words)


def test_what_no_latent_depends_on_can_be_left_out(tmp_path):
    tiny_stable_diffusion(tmp_path)
    assert load(tmp_path, without=("safety_checker", "feature_extractor", "image_encoder")).shape == (4, 8, 8)


def test_a_directory_without_scheduler_is_refused(tmp_path):
    tiny_stable_diffusion(tmp_path)
    shutil.rmtree(tmp_path / "scheduler")
    refused(tmp_path, r"^model: .*no scheduler/scheduler_config\.json")


def test_an_ancestral_scheduler_gives_its_path():
    pipeline = tiny_stable_diffusion(scheduler=EulerAncestralDiscreteScheduler(**TRAINED))
    assert "model" in from_pipeline(pipeline).levels.spacings


def test_what_a_text_encoder_does_not_read_of_a_prompt_is_said():
    long = "a cat " + "b c " * 40  # a letter is a token here
    sd, flux = from_pipeline(tiny_stable_diffusion()), from_pipeline(tiny_flux(guidance_embeds=False), resolution=(32, 32))
    (note,) = sd.unread(["short", long, long])
    assert "reads only 77 tokens, and ignores the end 'c b c b c b c b c'" in note
    assert sd.condition([long]).embeddings["text"].equal(sd.condition([long + "z"]).embeddings["text"])
    (note,) = flux.unread([long])  # T5 reads it all
    assert "1 of 2 text encoders reads only 77 tokens" in note
    assert len(flux.unread(["word " * 80])) == 2
    sd.free_text_encoders()
    assert sd.unread([long])


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionPAGPipeline", "MyOwnPipeline"])
def test_pipelines_of_the_same_parts_are_the_same_model(tmp_path, kind):
    pipeline = tiny_stable_diffusion(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
    assert type(skeleton(tmp_path)) is type(load(tmp_path))
    x, at = torch.randn(1, 4, 8, 8), from_pipeline(pipeline).levels.spacing(4)[1]
    answers = [made(x, at, made.condition(["a"])) for made in (load(tmp_path), from_pipeline(pipeline))]
    torch.testing.assert_close(*answers)


def test_a_pipeline_that_is_steered_by_pictures_is_refused(tmp_path):
    tiny_stable_diffusion(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    more = {"_class_name": "StableDiffusionControlNetPipeline", "controlnet": ["diffusers", "ControlNetModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **more}))
    with pytest.raises(RequestError, match=r"StableDiffusionControlNetPipeline.*controlnet/"):
        load(tmp_path)
    del more["controlnet"]  # its own parts alone were saved under its name
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **more}))
    with pytest.raises(RequestError, match=r"ControlNet, not saved with it"):
        load(tmp_path)
