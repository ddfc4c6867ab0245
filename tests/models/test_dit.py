"""DiT: our samples against `DiTPipeline`'s own, and what is read from its directory and refused of it.

Exceptions to the parity with the pipeline: Euler schedulers, because `DiTPipeline` does not scale its first latents by
their `init_noise_sigma`, so that its own images with them are not DiT's.
"""

import json
from typing import Any

import pytest
import torch
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import load_file, save_file
from support.pipelines_dit import tiny_dit
from torch import Tensor

from handful.core.noise import level
from handful.core.samplers import ddim, ddpm, start
from handful.errors import RequestError
from handful.guidance.cfg import CFG
from handful.guidance.guided import Guided
from handful.models import from_pipeline, load, skeleton
from handful.models.dit import class_names

LABELS = [3, 998, 417]


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert found.shape == wanted.shape
    assert float(wanted.std()) > 1e-2  # a constant would prove nothing
    return float((found - wanted).abs().max() / wanted.abs().max())


def drawn(n: int = 3) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def peer(pipeline: DiTPipeline, steps: int, scale: float, labels: list[int]) -> tuple[Tensor, Tensor]:
    """The latents that the pipeline hands to its autoencoder, and its decoded images in [0, 1], from `drawn()`."""
    held: list[Tensor] = []
    vae: Any = pipeline.vae
    handle = vae.post_quant_conv.register_forward_pre_hook(lambda _, given: held.append(given[0]))
    images = pipeline(
        labels, guidance_scale=scale, num_inference_steps=steps, output_type="pt", generator=torch.Generator().manual_seed(5)
    ).images  # type: ignore[union-attr]
    handle.remove()
    return held[0] * vae.config.scaling_factor, images  # type: ignore[return-value]


# --- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_our_sample_is_the_pipelines_own(steps, scale):
    pipeline = tiny_dit()
    latents, images = peer(pipeline, steps, scale, LABELS)
    denoiser = from_pipeline(pipeline)
    guided = Guided(denoiser, [CFG(scale - 1)])
    levels = denoiser.levels.spacing(steps, "model")
    with torch.no_grad():
        found = ddim(guided, start(drawn(), levels), levels, denoiser.condition(LABELS))
        decoded = (denoiser.decode(found) / 2 + 0.5).clamp(0, 1)
    assert 0.1 < float(images.mean()) < 0.9  # not clamped away
    assert off(found, latents) < 1e-4
    assert off(decoded, images) < 1e-4


def test_guidance_moves_the_pipelines_sample():
    """What the test above compares with CFG is not the unguided sample."""
    plain, guided = (peer(tiny_dit(), 4, scale, LABELS)[0] for scale in (1.0, 4.0))
    assert off(guided, plain) > 1e-2


@pytest.mark.parametrize("steps", [4, 20])
def test_our_ancestral_sample_is_the_pipelines_own(steps):
    pipeline = tiny_dit(scheduler=DDPMScheduler(clip_sample=False))
    torch.manual_seed(7)  # the pipeline draws its later noise from the global generator
    latents, _ = peer(pipeline, steps, 1.0, LABELS)
    denoiser = from_pipeline(pipeline)
    levels = denoiser.levels.spacing(steps, "model")
    torch.manual_seed(7)
    with torch.no_grad():
        found = ddpm(
            denoiser, start(drawn(), levels), levels, denoiser.condition(LABELS), noise=lambda: torch.randn(3, 4, 8, 8)
        )
    assert off(found, latents) < 1e-4


def test_a_network_without_learned_variance_and_of_few_classes_samples_as_its_pipeline():
    pipeline = tiny_dit(classes=10, out_channels=4)
    latents, _ = peer(pipeline, 4, 1.0, [0, 9, 4])
    denoiser = from_pipeline(pipeline)
    levels = denoiser.levels.spacing(4, "model")
    with torch.no_grad():
        found = ddim(denoiser, start(drawn(), levels), levels, denoiser.condition([0, 9, 4]))
    assert off(found, latents) < 1e-4
    assert denoiser.learned_variance is None
    assert not denoiser.learns_variance


def test_the_second_half_of_the_output_is_the_learned_variance():
    pipeline = tiny_dit()
    denoiser = from_pipeline(pipeline)
    at = denoiser.levels.spacing(10, "model")[3]
    time = denoiser.levels.time(at).float().expand(3)
    with torch.no_grad():
        denoiser(drawn(), at, denoiser.condition(LABELS))
        out = pipeline.transformer(drawn(), time, torch.tensor(LABELS)).sample
    torch.testing.assert_close(denoiser.learned_variance, out[:, 4:])
    assert denoiser.learns_variance


def test_a_pipeline_left_in_training_mode_drops_no_labels():
    pipeline = tiny_dit()
    pipeline.transformer.train()
    denoiser = from_pipeline(pipeline)
    condition = denoiser.condition([3] * 64)
    x_t = drawn(1).expand(64, -1, -1, -1)
    x0 = denoiser(x_t, level(0.8, 0.6), condition)
    torch.testing.assert_close(x0, x0[:1].expand_as(x0))


# --- loading -----------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_loads_as_it_was(tmp_path):
    here = from_pipeline(tiny_dit(tmp_path))
    there = load(tmp_path)
    x_t, at = drawn(), level(0.8, 0.6)
    assert torch.equal(there(x_t, at, there.condition(LABELS)), here(x_t, at, here.condition(LABELS)))
    assert torch.equal(there.decode(x_t), here.decode(x_t))
    assert not any(parameter.requires_grad for parameter in there.parameters())


def test_the_skeleton_needs_no_weights_and_tells_what_the_loaded_one_does(tmp_path):
    names = {str(label): f"class {label}" for label in range(1000)}
    tiny_dit(tmp_path, id2label=names)
    loaded = load(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    outline = skeleton(tmp_path)
    assert {each.device.type for each in outline.parameters()} == {"meta"}
    for name in ("shape", "image_shape", "label_count", "null_class", "classes", "prediction", "learns_variance", "has_null"):
        assert getattr(outline, name) == getattr(loaded, name), name
    assert (loaded.shape, loaded.image_shape, loaded.label_count, loaded.null_class) == ((4, 8, 8), (3, 16, 16), 1001, 1000)
    for kind in outline.levels.spacings:
        ours, theirs = outline.levels.spacing(7, kind), loaded.levels.spacing(7, kind)
        assert torch.equal(ours.alpha, theirs.alpha)
        assert torch.equal(ours.sigma, theirs.sigma)
    with pytest.raises(RequestError, match=r"^model: .*can't be loaded"):
        load(tmp_path)


def test_the_published_config_with_its_former_class_name_is_read(tmp_path):
    tiny_dit(tmp_path)
    wanted = load(tmp_path)
    config, index = tmp_path / "transformer" / "config.json", tmp_path / "model_index.json"
    said = {**json.loads(config.read_text()), "_class_name": "Transformer2DModel", "num_vector_embeds": None}
    config.write_text(json.dumps(said))
    index.write_text(json.dumps({**json.loads(index.read_text()), "transformer": ["diffusers", "Transformer2DModel"]}))
    assert skeleton(tmp_path).shape == (4, 8, 8)
    found = load(tmp_path)
    x_t, at = drawn(), level(0.8, 0.6)
    assert torch.equal(found(x_t, at, found.condition(LABELS)), wanted(x_t, at, wanted.condition(LABELS)))


def test_in_bfloat16_the_state_stays_float32_and_near(tmp_path):
    tiny_dit(tmp_path)
    half, full = load(tmp_path, dtype=torch.bfloat16), load(tmp_path)
    assert {each.dtype for each in half.parameters()} == {torch.bfloat16}
    levels = half.levels.spacing(6)
    with torch.no_grad():
        ours, theirs = (ddim(Guided(one, [CFG(1.0)]), drawn(), levels, one.condition(LABELS)) for one in (half, full))
        images = half.decode(ours)
    assert ours.dtype == images.dtype == torch.float32
    assert bool(images.isfinite().all())
    assert 0 < off(ours, theirs) < 0.1


# --- classes -----------------------------------------------------------------------------------------------------------


def test_the_null_condition_is_the_last_label():
    null = from_pipeline(tiny_dit(classes=10)).condition([0, 9]).null()
    assert null.labels is not None
    assert null.labels.tolist() == [10, 10]


def test_another_null_class_can_be_stated():
    denoiser = from_pipeline(tiny_dit(classes=10), null_class=4)
    assert denoiser.condition([1]).null_label == 4


def test_classes_are_named_in_full_by_the_model_index(tmp_path):
    tiny_dit(tmp_path, classes=3, id2label={"0": "tench, Tinca tinca", "2": "cock", "1": "goldfish, Carassius auratus"})
    assert list(load(tmp_path).classes) == ["tench, Tinca tinca", "goldfish, Carassius auratus", "cock"]
    assert list(load(tmp_path, classes=["a", "b", "c"]).classes) == ["a", "b", "c"]
    assert list(load(tmp_path, null_class=0).classes) == []  # the names are of labels 0 to 2


def test_names_of_several_classes_get_their_label():
    assert class_names({"0": "crane", "1": "hen", "2": "Crane", "3": "crane, derrick"}, 4) == (
        "crane (0)",
        "hen",
        "Crane (2)",
        "crane, derrick",
    )


@pytest.mark.parametrize("id2label", [None, {}, {"0": "hen"}, {"0": "hen", "1": 7}, ["hen", "cock"]])
def test_names_that_do_not_name_every_class_are_left_out(id2label):
    assert class_names(id2label, 2) == ()


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[11], [-1], [0, 1, 17]])
def test_labels_that_the_model_does_not_know_are_refused_by_name(labels):
    with pytest.raises(RequestError, match=r"^labels: .*0 to 10"):
        from_pipeline(tiny_dit(classes=10)).condition(labels)


def test_prompts_are_refused_by_name():
    with pytest.raises(RequestError, match=r"^labels: .*labels, not prompts"):
        from_pipeline(tiny_dit(classes=10)).condition(["a hen"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"null_class": 11}, r"^null_class: 11: the model's labels are 0 to 10"),
        ({"null_class": -1}, r"^null_class: -1: the model's labels are 0 to 10"),
        ({"classes": ["a", "b"]}, r"^classes: '2 names': the model has 10 classes"),
        ({"resolution": (32, 32)}, r"^model\.resolution: \[32, 32\]: this model's images are 16 x 16"),
        ({"negative_prompt": "ugly"}, r"^model\.negative_prompt: "),
        ({"without": ("vae",)}, r"^model\.without: "),
    ],
)
def test_wrong_requests_are_refused_before_weights_are_read(tmp_path, words, said):
    tiny_dit(tmp_path, classes=10)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    for call in (load, skeleton):
        with pytest.raises(RequestError, match=said):
            call(tmp_path, **words)


def test_the_models_own_resolution_may_be_stated(tmp_path):
    tiny_dit(tmp_path, classes=10)
    assert load(tmp_path, resolution=(16, 16)).image_shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("transformer", {"out_channels": 5}, r"^model: 'out_channels 5': "),
        ("transformer", {"in_channels": 3, "out_channels": 3}, r"^model: 'in_channels 3': its autoencoder's latents have 4"),
        ("transformer", {"norm_type": "layer_norm"}, r"^model: .*config"),
        ("scheduler", {"prediction_type": "of tomorrow"}, r"^model: .*scheduler"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path, part, changes, said):
    tiny_dit(tmp_path, classes=10)
    file = tmp_path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(RequestError, match=said):
        load(tmp_path)


@pytest.mark.parametrize("file", ["transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_config_is_refused_by_name(tmp_path, file):
    tiny_dit(tmp_path, classes=10)
    (tmp_path / file).unlink()
    with pytest.raises(RequestError, match=rf"^model: .*{file.rpartition('/')[2]}"):
        load(tmp_path)


def test_weights_that_lack_tensors_are_refused_and_not_left_empty(tmp_path):
    tiny_dit(tmp_path, classes=10)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    held = {key: value for key, value in load_file(weights).items() if "proj_out_2" not in key}
    save_file(held, weights, {"format": "pt"})
    with pytest.raises(RequestError, match=r"^model: .*it lacks 2 tensors of its transformer"):
        load(tmp_path)
