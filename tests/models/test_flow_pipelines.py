"""What holds for Stable Diffusion 3 and Flux alike: directories, prompts, precision, guidance, refusals."""

import json
import shutil
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from support.pipelines_flow import PROMPTS, distance, noise, sampled, tiny_flux, tiny_sd3

from handful.core.samplers import ddim, start
from handful.errors import RequestError
from handful.features.extractor import pixels
from handful.guidance.base import Pull
from handful.guidance.cfg import CFG
from handful.guidance.chamfer import Chamfer
from handful.guidance.guided import Guided
from handful.models import from_pipeline, load, skeleton

MAKERS = {"sd3": tiny_sd3, "flux": tiny_flux}
SIZE: dict[str, Any] = {"resolution": (64, 80)}
ENCODERS = {"sd3": ("text_encoder", "text_encoder_2", "text_encoder_3"), "flux": ("text_encoder", "text_encoder_2")}
families = pytest.mark.parametrize("family", MAKERS)


# --- directories -------------------------------------------------------------------------------------------------------


@families
def test_a_saved_pipeline_loads_as_it_was(tmp_path, family):
    pipeline = MAKERS[family](tmp_path)
    assert torch.equal(sampled(load(tmp_path, **SIZE), 4, 4.0), sampled(from_pipeline(pipeline, **SIZE), 4, 4.0))


@families
def test_a_skeleton_is_the_loaded_denoiser_without_its_weights(tmp_path, family):
    MAKERS[family](tmp_path / "whole")
    loaded: Any = load(tmp_path / "whole", **SIZE)
    shutil.copytree(tmp_path / "whole", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    outline: Any = skeleton(tmp_path / "bare", **SIZE)
    for name in ("shape", "image_shape", "prediction", "prompted", "has_null", "learns_variance"):
        assert getattr(outline, name) == getattr(loaded, name)
    assert outline.levels.spacings == loaded.levels.spacings
    for kind in loaded.levels.spacings:
        assert torch.equal(outline.levels.spacing(7, kind).alpha, loaded.levels.spacing(7, kind).alpha)
    assert all(weight.is_meta for weight in outline.parameters())
    mine, theirs = outline.condition(PROMPTS), loaded.condition(PROMPTS)
    for one, other in ((mine, theirs), (mine.null(), theirs.null())):
        assert {name: each.shape for name, each in one.embeddings.items()} == {
            name: each.shape for name, each in other.embeddings.items()
        }
    x_t = torch.empty(2, *outline.shape, device="meta")
    assert outline.decode(outline(x_t, loaded.levels.spacing(4)[1], mine)).shape == (2, 3, 64, 80)
    with pytest.raises(RequestError, match=r"^model: .*bare.*can't be loaded"):
        load(tmp_path / "bare", **SIZE)


@families
def test_the_digest_names_every_network_that_is_there(family):
    denoiser: Any = from_pipeline(MAKERS[family]())
    assert set(denoiser.components()) == {"network", "vae", *ENCODERS[family]}
    denoiser.free_text_encoders()
    assert set(denoiser.components()) == {"network", "vae"}


# --- prompts -----------------------------------------------------------------------------------------------------------


@families
def test_text_encoders_run_once_a_prompt_and_once_for_none(family):
    pipeline: Any = MAKERS[family]()
    runs = dict.fromkeys(ENCODERS[family], 0)

    def counting(name: str) -> Any:
        def hook(*_: Any) -> None:
            runs[name] += 1

        return hook

    for name in runs:
        getattr(pipeline, name).register_forward_hook(counting(name))
    denoiser: Any = from_pipeline(pipeline)
    denoiser.encode_prompts(["a", "b", "a"])
    for _ in range(3):
        denoiser.condition(["b", "a", "b"]).null()
    assert set(runs.values()) == {3}  # a, b, and the empty one


@families
def test_freed_encoders_leave_what_they_said(family):
    pipeline: Any = MAKERS[family]()
    denoiser: Any = from_pipeline(pipeline, **SIZE)
    before = sampled(denoiser, 4, 4.0)
    denoiser.free_text_encoders()
    for name in ENCODERS[family]:
        assert getattr(pipeline, name) is None
        assert getattr(pipeline, name.replace("text_encoder", "tokenizer")) is None
    assert torch.equal(sampled(denoiser, 4, 4.0), before)
    with pytest.raises(RequestError, match=r"^prompt: 'a new one'.*freed"):
        denoiser.condition(["a new one"])


@families
def test_prompts_in_one_batch_equal_each_alone(family):
    denoiser: Any = from_pipeline(MAKERS[family](), **SIZE)
    x_t, at = noise(denoiser, 3), denoiser.levels.spacing(4)[1]
    prompts = ["a", "a much longer one of many words", "b"]
    together = denoiser.condition(prompts)
    with torch.no_grad():
        batch = denoiser(x_t, at, together)
        for i, prompt in enumerate(prompts):
            alone = denoiser(x_t[i : i + 1], at, denoiser.condition([prompt]))
            torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(denoiser(x_t[i : i + 1], at, together[i : i + 1]), alone, rtol=1e-5, atol=1e-5)
        assert distance(denoiser(x_t, at, denoiser.condition(prompts[::-1])), batch) > 1e-4


@families
@pytest.mark.parametrize("labels", [[0, 1], torch.tensor([0, 1])])
def test_labels_are_refused(family, labels):
    with pytest.raises(RequestError, match=r"^prompt: .*takes prompts, not labels"):
        from_pipeline(MAKERS[family]()).condition(labels)


# --- precision and place -----------------------------------------------------------------------------------------------


@families
def test_half_precision_keeps_the_state_in_float32_and_near_to_float32s_sample(family):
    wanted = sampled(from_pipeline(MAKERS[family](), **SIZE), 4, 4.0)
    denoiser: Any = from_pipeline(MAKERS[family](), **SIZE)
    denoiser.encode_prompts(PROMPTS)
    denoiser.place("cpu", torch.bfloat16)
    found = sampled(denoiser, 4, 4.0)
    assert next(denoiser.network.parameters()).dtype == next(denoiser.vae.parameters()).dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert bool(found.isfinite().all())
    assert 0 < distance(found, wanted) < 0.1  # measured: 0.011 (sd3), 0.034 (flux)
    images = denoiser.decode(found)
    assert images.dtype == torch.float32
    assert bool(images.isfinite().all())


@families
def test_weights_load_in_the_precision_asked_for(tmp_path, family):
    MAKERS[family](tmp_path)
    denoiser: Any = load(tmp_path, dtype=torch.bfloat16, **SIZE)
    kinds = {weight.dtype for part in denoiser.components().values() for weight in part.parameters()}
    assert torch.bfloat16 in kinds
    assert {weight.dtype for weight in denoiser.network.parameters()} == {torch.bfloat16}
    assert bool(sampled(denoiser, 4).isfinite().all())


@families
def test_parts_that_are_offloaded_compute_where_their_hooks_say(family):
    accelerate = pytest.importorskip("accelerate")
    pipeline: Any = MAKERS[family]()
    denoiser: Any = from_pipeline(pipeline, **SIZE)
    wanted = denoiser.decode(sampled(from_pipeline(MAKERS[family](), **SIZE), 4, 4.0))
    for part in denoiser.components().values():
        accelerate.cpu_offload(part, execution_device="cpu")  # the weights are on meta between calls
    denoiser.offloaded_to = torch.device("cpu")
    assert pipeline.text_encoder.device.type == "meta"
    torch.testing.assert_close(denoiser.decode(sampled(denoiser, 4, 4.0)), wanted)


# --- the autoencoder ---------------------------------------------------------------------------------------------------


@families
def test_encode_and_decode_scale_and_shift_latents_as_the_pipeline_does(family):
    pipeline: Any = MAKERS[family]()
    denoiser: Any = from_pipeline(pipeline, **SIZE)
    images = torch.rand(2, 3, 64, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = pipeline.vae.config
    assert config.shift_factor > 0
    with torch.no_grad():
        raw = pipeline.vae.encode(images).latent_dist.mode()
        torch.testing.assert_close(
            denoiser.encode(images), (raw - config.shift_factor) * config.scaling_factor, rtol=1e-5, atol=3e-5
        )
        torch.testing.assert_close(
            denoiser.decode(denoiser.encode(images)), pipeline.vae.decode(raw).sample, rtol=1e-5, atol=3e-5
        )


# --- guidance ----------------------------------------------------------------------------------------------------------


@families
def test_chamfer_through_decoder_and_network_is_finite_and_brings_the_exemplars_nearer(family):
    denoiser: Any = from_pipeline(MAKERS[family](), **SIZE)
    images = torch.rand(3, 3, 64, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    term = Chamfer(pixels(), images.flatten(1), 0.2, pull=Pull(jacobian="exact"))
    levels, condition = denoiser.levels.spacing(4), denoiser.condition(PROMPTS)
    x_t = noise(denoiser)
    for at in (levels[0], levels[2]):  # the first is pure noise: alpha = 0
        with torch.no_grad():
            plain = denoiser(x_t, at, condition)
        guided = Guided(denoiser, [term])(x_t, at, condition)
        assert bool(guided.isfinite().all())
        with torch.no_grad():
            before, after = (float(term.energy(denoiser.decode(x0).flatten(1))) for x0 in (plain, guided))
        assert after < before


@families
def test_chunks_of_a_cohort_give_the_same_sample(family):
    denoiser: Any = from_pipeline(MAKERS[family](), **SIZE)
    levels, prompts = denoiser.levels.spacing(4), ["a", "b", "c"]
    with torch.no_grad():
        whole, parts = (
            ddim(Guided(denoiser, [CFG(4.0)], chunk), start(noise(denoiser, 3), levels), levels, denoiser.condition(prompts))
            for chunk in (None, 2)
        )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


# --- refusals ----------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"classes": ["a", "b"]}, r"^model\.classes: .*takes prompts, not labels"),
        ({"null_class": 3}, r"^model\.null_class: 3: .*takes prompts, not labels"),
        ({"resolution": (64, 72)}, r"^model\.resolution: \[64, 72\]: 72 is not a multiple of 16.*Use"),
        ({"resolution": (0, 64)}, r"^model\.resolution: \[0, 64\]"),
        ({"without": ("vae",)}, r"^model\.without: 'vae'"),
        ({"trust_pickle": True}, r"^model\.trust_pickle"),
    ],
)
def test_options_that_can_not_be_followed_are_refused(tmp_path, family, words, problem):
    pipeline = MAKERS[family](tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()  # so that what is refused is refused before they are read
    for make in (
        lambda: skeleton(tmp_path, **words),
        lambda: load(tmp_path, **words),
        lambda: from_pipeline(pipeline, **words),
    ):
        with pytest.raises(RequestError, match=problem):
            make()


@families
def test_what_no_prompt_needs_can_be_left_out(tmp_path, family):
    MAKERS[family](tmp_path)
    assert load(tmp_path, without=("image_encoder", "feature_extractor"), **SIZE).shape == (4, 8, 10)


@families
def test_schedulers_without_a_known_path_are_refused(tmp_path, family):
    pipeline: Any = MAKERS[family](tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "_class_name": "FlowMatchHeunDiscreteScheduler"}))
    with pytest.raises(RequestError, match=r"^model: 'FlowMatchHeunDiscreteScheduler'.*FlowMatchEulerDiscreteScheduler"):
        load(tmp_path, **SIZE)
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(RequestError, match=r"^model: 'FlowMatchHeunDiscreteScheduler'"):
        from_pipeline(pipeline)
    file.write_text(json.dumps({**told, "time_shift_type": "odd"}))
    with pytest.raises(RequestError, match=r"^model: .*no scheduler can be made.*damaged"):
        skeleton(tmp_path, **SIZE)
    file.unlink()
    with pytest.raises(RequestError, match=r"^model: .*scheduler_config\.json"):
        skeleton(tmp_path, **SIZE)


@families
def test_a_pipeline_without_its_text_encoders_is_refused(tmp_path, family):
    pipeline: Any = MAKERS[family](tmp_path)
    pipeline.text_encoder_2 = None
    with pytest.raises(RequestError, match=r"no text_encoder_2"):
        from_pipeline(pipeline)
    file = tmp_path / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer": [None, None]}))
    with pytest.raises(RequestError, match=r"no tokenizer\b"):
        skeleton(tmp_path)


@families
def test_levels_do_not_touch_the_pipelines_own_scheduler(family):
    pipeline: Any = MAKERS[family]()
    before = pipeline.scheduler.timesteps.clone()
    denoiser = from_pipeline(pipeline, **SIZE)
    denoiser.levels.spacing(7)
    assert torch.equal(pipeline.scheduler.timesteps, before)
