"""UNet2DModel directories: what is read from them, and what is refused of them."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LDMPipeline, VQModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from handful.core.noise import VP, Flow, level
from handful.core.samplers import ddim, start
from handful.errors import RequestError
from handful.models import load, skeleton
from handful.models.schedulers import schedule_of
from handful.models.unet2d import UNet2DDenoiser

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (4, 8),
    "norm_num_groups": 2,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


def network(classes: int | None = 5, **config: Any) -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**{**SMALL, **config}, num_class_embeds=classes).eval()


def save(folder: Path, unet: UNet2DModel | None = None, scheduler: Any = None, **words: Any) -> Path:
    (unet or network()).save_pretrained(folder / "unet", **words)
    (scheduler or DDPMScheduler()).save_pretrained(folder / "scheduler")
    return folder


def noise(n: int = 3) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


# --- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_saved_model_denoises_as_its_own_scheduler_does(tmp_path, kind):
    scheduler: Any = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    denoiser = load(save(tmp_path, scheduler=scheduler))
    assert denoiser.shape == (1, 8, 8)
    x_t, labels, unet = noise(), torch.tensor([0, 2, 4]), network()
    for t in (3, 250, 700):
        with torch.no_grad():
            out = unet(x_t, torch.tensor([t] * 3), class_labels=labels, return_dict=False)[0]
            wanted = scheduler.step(out, t, x_t).pred_original_sample
            assert isinstance(denoiser.levels, VP)
            found = denoiser(x_t, denoiser.levels.at(t), denoiser.condition(labels))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_unets_own_directory_with_its_scheduler_beside_loads_alike(tmp_path):
    network().save_pretrained(tmp_path / "flat")
    DDPMScheduler().save_pretrained(tmp_path / "flat")
    flat, nested = load(tmp_path / "flat"), load(save(tmp_path / "nested"))
    x_t, at = noise(), level(0.8, 0.6)
    assert torch.equal(flat(x_t, at, flat.condition([0, 1, 2])), nested(x_t, at, nested.condition([0, 1, 2])))


def test_a_flow_model_is_told_a_thousand_times_s(tmp_path):
    denoiser = load(save(tmp_path, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)))
    assert isinstance(denoiser.levels, Flow)
    assert (denoiser.levels.shift, denoiser.prediction) == (3.0, "flow")
    x_t, labels, s = noise(), torch.tensor([0, 2, 4]), 0.75
    with torch.no_grad():
        v = network()(x_t, torch.tensor([750.0] * 3), class_labels=labels, return_dict=False)[0]
        found = denoiser(x_t, level(1 - s, s), denoiser.condition(labels))
    torch.testing.assert_close(found, x_t - s * v, rtol=1e-5, atol=1e-5)


def test_of_twice_the_channels_the_first_half_is_the_image_and_the_second_the_learned_variance(tmp_path):
    denoiser, unet = load(save(tmp_path, network(out_channels=2))), network(out_channels=2)
    x_t, labels, at = noise(), torch.tensor([0, 2, 4]), VP.linear().at(250)
    assert denoiser.learns_variance
    assert denoiser.shape == (1, 8, 8)
    with torch.no_grad():
        eps, variance = unet(x_t, torch.tensor([250.0] * 3), class_labels=labels, return_dict=False)[0].chunk(2, dim=1)
        found = denoiser(x_t, at, denoiser.condition(labels))
    torch.testing.assert_close(found, (x_t - at.sigma * eps) / at.alpha, rtol=1e-4, atol=1e-4)
    assert denoiser.learned_variance is not None
    torch.testing.assert_close(denoiser.learned_variance, variance, rtol=1e-4, atol=1e-5)


def test_a_model_of_the_image_alone_learned_no_variance(tmp_path):
    denoiser = load(save(tmp_path))
    denoiser(noise(), VP.linear().at(250), denoiser.condition([0, 2, 4]))
    assert not denoiser.learns_variance
    assert denoiser.learned_variance is None


def test_the_levels_are_those_of_diffusers_betas():
    schedulers: list[Any] = [
        DDPMScheduler(),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        DDPMScheduler(beta_schedule="scaled_linear", num_train_timesteps=300),
    ]
    for scheduler in schedulers:
        levels, prediction = schedule_of(dict(scheduler.config))
        assert isinstance(levels, VP)
        assert prediction == "eps"
        torch.testing.assert_close((levels.alpha**2).float(), scheduler.alphas_cumprod)


def test_weights_of_the_older_format_load_without_running_anything(tmp_path):
    denoiser = load(save(tmp_path, safe_serialization=False))
    assert (tmp_path / "unet" / "diffusion_pytorch_model.bin").is_file()
    for mine, theirs in zip(denoiser.network.parameters(), network().parameters(), strict=True):
        assert torch.equal(mine, theirs)


class Payload:
    """What a pickle may hold: a call, made while it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    folder, mark = save(tmp_path / "model", safe_serialization=False), tmp_path / "it-ran"
    weights = folder / "unet" / "diffusion_pytorch_model.bin"
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # the payload works where it is let
    mark.unlink()
    torch.save({**network().state_dict(), "extra": Payload(mark)}, weights)
    with pytest.raises(RequestError, match=r"^model: .*can't be loaded"):
        load(folder)
    weights.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(RequestError, match=r"^model: .*can't be loaded"):
        load(folder)
    assert not mark.exists()


# --- classes -----------------------------------------------------------------------------------------------------------


def test_class_names_and_null_class_come_from_handful_json(tmp_path):
    folder = save(tmp_path)
    (folder / "handful.json").write_text(json.dumps({"classes": ["a", "b", "c", "d"], "null_class": 4}))
    denoiser = load(folder)
    assert list(denoiser.classes) == ["a", "b", "c", "d"]
    null = denoiser.condition([0, 1]).null()
    assert null.labels is not None
    assert null.labels.tolist() == [4, 4]


def test_arguments_go_before_handful_json(tmp_path):
    folder = save(tmp_path)
    (folder / "handful.json").write_text(json.dumps({"classes": ["a", "b", "c", "d"], "null_class": 4}))
    denoiser = load(folder, null_class=0, classes=["w", "x", "y", "z"])
    assert list(denoiser.classes) == ["w", "x", "y", "z"]
    assert denoiser.condition([1]).null_label == 0


def test_without_handful_json_there_are_neither_names_nor_null_class(tmp_path):
    denoiser = load(save(tmp_path))
    assert list(denoiser.classes) == []
    with pytest.raises(RequestError, match="no null class"):
        denoiser.condition([0]).null()


def test_labels_reach_the_network(tmp_path):
    denoiser = load(save(tmp_path))
    x_t, at = noise(1), level(0.8, 0.6)
    one, other = (denoiser(x_t, at, denoiser.condition([label])) for label in (0, 1))
    assert float((one - other).abs().max()) > 1e-3


def test_an_unconditional_model_takes_any_labels_and_tells_its_network_none(tmp_path):
    denoiser, unet = load(save(tmp_path, network(None))), network(None)
    condition = denoiser.condition([0, 7, 99])
    assert condition.labels is None
    x_t, at = noise(), denoiser.levels.spacing(4)[1]
    with torch.no_grad():
        eps = unet(x_t, denoiser.levels.time(at).float().expand(3), return_dict=False)[0]
    torch.testing.assert_close(denoiser(x_t, at, condition), (x_t - at.sigma * eps) / at.alpha, rtol=1e-5, atol=1e-5)
    with pytest.raises(RequestError, match=r"null_class: 0: the model takes no class labels"):
        UNet2DDenoiser(unet, "eps", VP.linear(), null_class=0)


@pytest.mark.parametrize("labels", [[5], [-1], [0, 1, 17]])
def test_labels_that_the_model_does_not_know_are_refused_by_name(labels):
    with pytest.raises(RequestError, match=r"^labels: .*0 to 4"):
        UNet2DDenoiser(network(), "eps", VP.linear()).condition(labels)


@pytest.mark.parametrize("null_class", [5, -1])
def test_a_null_class_outside_the_labels_is_refused_by_name(tmp_path, null_class):
    with pytest.raises(RequestError, match=r"^null_class: -?\d: .*0 to 4"):
        load(save(tmp_path), null_class=null_class)


def test_names_that_do_not_fit_the_labels_are_refused_by_name(tmp_path):
    folder = save(tmp_path)
    with pytest.raises(RequestError, match=r"^classes: '4 names': the model has 5 classes"):
        load(folder, classes=["a", "b", "c", "d"])
    with pytest.raises(RequestError, match=r"^classes: '5 names': the model has 4 classes"):
        load(folder, classes=["a", "b", "c", "d", "e"], null_class=4)


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_a_directory_that_is_not_there_or_holds_no_model_is_refused_by_name(tmp_path):
    with pytest.raises(RequestError, match=r"^model: .*no such directory.*digits"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", "null", b"\xff\xfe\x00"])
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", "handful.json"])
def test_a_damaged_json_file_is_refused_by_name(tmp_path, file, text):
    folder = save(tmp_path)
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RequestError, match=r"^model: "):
        load(folder)


@pytest.mark.parametrize(
    "notes", [{"null_class": "4"}, {"null_class": True}, {"classes": "abcde"}, {"classes": [1, 2, 3, 4, 5]}]
)
def test_a_handful_json_of_wrong_types_is_refused_by_name(tmp_path, notes):
    folder = save(tmp_path)
    (folder / "handful.json").write_text(json.dumps(notes))
    with pytest.raises(RequestError, match=rf"^{next(iter(notes))}: "):
        load(folder)


def test_a_model_without_scheduler_is_refused(tmp_path):
    network().save_pretrained(tmp_path / "unet")
    with pytest.raises(RequestError, match=r"^model: .*no scheduler_config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5])
def test_truncated_weights_are_refused(tmp_path, keep):
    folder = save(tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(RequestError, match=r"^model: .*can't be loaded"):
        load(folder)


def test_missing_weights_are_refused(tmp_path):
    folder = save(tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RequestError, match=r"^model: .*can't be loaded"):
        load(folder)


def test_weights_that_lack_tensors_are_refused_and_not_left_random(tmp_path):
    folder, unet = save(tmp_path), network()
    state = {key: value for key, value in unet.state_dict().items() if "conv_out" not in key}
    unet.save_pretrained(folder / "unet", state_dict=state)
    from safetensors.torch import save_file

    save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(RequestError, match=r"^model: .*don't fit its config \(2 tensors, first conv_out"):
        load(folder)


def test_weights_of_another_shape_are_refused(tmp_path):
    folder = save(tmp_path)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_class_embeds": 9}))
    with pytest.raises(RequestError, match=r"^model: "):
        load(folder)


def test_a_model_of_more_channels_than_image_and_variance_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"^model: 'out_channels 3': .*neither the image alone nor image and variance"):
        load(save(tmp_path, network(out_channels=3)))


def test_a_model_of_unknown_resolution_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"^model: 'sample_size': "):
        load(save(tmp_path, network(sample_size=None)))


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "ScoreSdeVeScheduler", "sigma_max": 1348.0},
        {"_class_name": "DDPMScheduler", "prediction_type": "noise", "beta_schedule": "linear"},
        {"_class_name": "DDPMScheduler", "prediction_type": "epsilon", "beta_schedule": "of tomorrow"},
        {
            "_class_name": "DDPMScheduler",
            "prediction_type": "epsilon",
            "beta_schedule": "linear",
            "num_train_timesteps": "many",
        },
        {"_class_name": 5},
    ],
)
def test_an_unknown_scheduler_is_refused_by_name(config):
    with pytest.raises(RequestError, match=r"^model: .*scheduler"):
        schedule_of(config)


def test_a_raw_network_with_edm_preconditioning_is_refused_and_not_taken_for_a_preconditioned_one(tmp_path):
    """diffusers keeps EDM's c_skip, c_out, c_in and c_noise in the scheduler; run without them, the network gives noise."""
    with pytest.raises(RequestError, match=r"^model: 'EDMEulerScheduler.*"):
        load(save(tmp_path, scheduler=EDMEulerScheduler()))


# --- UNets of latents, and other UNets --------------------------------------------------------------------------------


def ldm(folder: Path | None = None) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vqvae = VQModel(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=3,
            norm_num_groups=2,
            num_vq_embeddings=8,
        ).eval()
        unet = UNet2DModel(**{**SMALL, "in_channels": 3, "out_channels": 3}).eval()
    pipeline = LDMPipeline(vqvae, unet, DDIMScheduler(clip_sample=False, set_alpha_to_one=False))
    pipeline.set_progress_bar_config(disable=True)
    if folder is not None:
        pipeline.save_pretrained(folder)
    return pipeline


@pytest.mark.parametrize("steps", [4, 20])
def test_an_ldm_pipelines_sample_is_decoded_as_the_pipeline_does(tmp_path, steps):
    pipeline, made = ldm(tmp_path), load(tmp_path)
    assert (made.shape, made.image_shape, skeleton(tmp_path).image_shape) == ((3, 8, 8), (3, 16, 16), (3, 16, 16))
    wanted = torch.from_numpy(pipeline(2, torch.Generator().manual_seed(1), num_inference_steps=steps, output_type="np").images)
    path = made.levels.spacing(steps, "model")
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = made.decode(ddim(made, start(noise, path), path, made.condition([0, 0])))
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1).movedim(1, -1), wanted, rtol=0, atol=1e-4)


def test_a_unet_of_latents_alone_and_pipelines_that_are_told_more_are_refused_by_name(tmp_path):
    ldm(tmp_path / "ldm")
    index = json.loads((tmp_path / "ldm" / "model_index.json").read_text())
    more = {**index, "_class_name": "LDMTextToImagePipeline", "bert": ["latent_diffusion", "LDMBertModel"]}
    (tmp_path / "ldm" / "model_index.json").write_text(json.dumps(more))
    with pytest.raises(RequestError, match=r"LDMTextToImagePipeline.*bert"):
        load(tmp_path / "ldm")
    four = network(in_channels=4, out_channels=4)
    with pytest.raises(RequestError, match=r"^model: 'in_channels 4'.*UNet of latents"):
        load(save(tmp_path / "four", four))


@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_a_unet_that_is_told_vectors_instead_of_labels_is_refused(tmp_path, kind):
    with pytest.raises(RequestError, match=rf"class_embed_type {kind}.*not class labels.*FILE\.py:FUNCTION"):
        load(save(tmp_path, network(None, class_embed_type=kind)))


def test_weights_of_a_variant_alone_are_found_and_used_with_a_note(tmp_path):
    plain, half = load(save(tmp_path / "plain")), load(save(tmp_path / "half", variant="fp16"))
    assert plain.notes == ()
    assert half.notes == ("model.variant is fp16, since there are no other weights of unet",)
    assert torch.equal(plain.network.conv_in.weight, half.network.conv_in.weight)
    save(tmp_path / "half", variant="ema")
    with pytest.raises(RequestError, match=r"^model\.variant: .*\(ema, fp16\)"):
        load(tmp_path / "half")
    assert load(tmp_path / "half", variant="ema").notes == ()
