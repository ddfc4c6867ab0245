"""Single files of Stable Diffusion: written here in the layout of the original releases, read by `load`."""

import json
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.pipelines import tiny_sdxl, tiny_stable_diffusion
from torch import Tensor

from handful.core.samplers import ddim, start
from handful.errors import RequestError
from handful.models import load, single_file, skeleton
from handful.models.single_file import pipeline_of, read_shapes

LAYERS = 1  # a block of the tiny UNet
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
V = "model.diffusion_model."


def replaced(name: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        name = re.sub(rf"(^|\.){re.escape(old)}\.", rf"\g<1>{new}.", name)
    return name


def unet_name(name: str) -> str:
    """diffusers' name of a UNet's tensor -> the original release's."""
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        side, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        place = int(side == "down") + block * (LAYERS + 1) + (layer if kind in ("resnets", "attentions") else LAYERS)
        where = f"{'input' if side == 'down' else 'output'}_blocks.{place}"
        if kind == "downsamplers":
            return f"{where}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"{where}.1.{rest}"  # the tiny UNet's only upsampler follows a block without attention
        return f"{where}.1.{rest}" if kind == "attentions" else f"{where}.0.{replaced(rest, RESNET)}"
    if found := re.match(r"mid_block\.(\w+)\.(\d+)\.(.*)", name):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}.{found[3] if place == 1 else replaced(found[3], RESNET)}"
    return replaced(name, TOP)


def vae_name(name: str) -> str:
    """The same of an autoencoder of four blocks."""
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{3 - int(found[1])}", name).replace("down_blocks.", "down.")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets.", "block.")
    return replaced(
        name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample"),
        {
            "conv_shortcut": "nin_shortcut",
            "conv_norm_out": "norm_out",
            "group_norm": "norm",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
            "to_out.0": "proj_out",
        },
    )


def original(pipeline: Any) -> dict[str, Tensor]:
    """The weights of a tiny Stable Diffusion as the original release names them."""
    weights = {V + unet_name(name): value for name, value in pipeline.unet.state_dict().items()}
    for name, value in pipeline.vae.state_dict().items():
        kernel = "attentions" in name and value.ndim == 2  # linear there, a convolution of one pixel here
        weights[f"first_stage_model.{vae_name(name)}"] = value[:, :, None, None] if kernel else value
    for name, value in pipeline.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: value.contiguous() for name, value in weights.items()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Path, Path]:
    """A single file, and the directory of its pipeline's configs, without weights."""
    folder = tmp_path_factory.mktemp("single")
    pipeline = tiny_stable_diffusion(folder / "configs")
    for weights in (folder / "configs").rglob("*.safetensors"):
        weights.unlink()
    save_file(original(pipeline), folder / "tiny.safetensors")
    return folder / "tiny.safetensors", folder / "configs"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub, and an empty cache of it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_single_file_samples_as_the_pipeline_it_was_made_of(stored, tmp_path, offline, ending):
    file, configs = stored
    pipeline: Any = tiny_stable_diffusion()
    if ending == ".ckpt":
        file = tmp_path / "tiny.ckpt"
        torch.save({"state_dict": original(pipeline), "global_step": 3}, file)
    denoiser: Any = load(file, config=configs)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted = pipeline("a cat", num_inference_steps=4, guidance_scale=1, latents=noise, output_type="latent").images
    levels = denoiser.levels.spacing(4, "model")
    with torch.no_grad():
        found = ddim(denoiser, start(noise, levels), levels, denoiser.condition(["a cat"]))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_skeleton_of_a_single_file_comes_from_its_configs(stored, offline):
    file, configs = stored
    outline = skeleton(file, config=configs)
    assert (outline.shape, outline.image_shape, outline.device.type) == ((4, 8, 8), (3, 64, 64), "meta")


def test_without_config_and_hub_the_error_asks_for_config(stored, offline):
    for call in (skeleton, load):
        with pytest.raises(RequestError, match=r"^model\.config: .*v1-5.*hub can't be reached.* Give config: a directory"):
            call(stored[0])


def test_a_config_that_is_no_pipelines_is_refused(stored, tmp_path, offline):
    with pytest.raises(RequestError, match=r"^model\.config: .*no model_index\.json"):
        load(stored[0], config=tmp_path)
    tiny_sdxl(tmp_path / "xl")
    with pytest.raises(RequestError, match=r"for a StableDiffusionXLPipeline, but the file holds a StableDiffusionPipeline"):
        load(stored[0], config=tmp_path / "xl")
    with pytest.raises(RequestError, match=r"^model\.config: .*Give config"):
        load(stored[0], config="no such/folder/at all")


@pytest.mark.parametrize(
    "name",
    [
        V + "out.0.weight",
        "first_stage_model.decoder.norm_out.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
def test_a_file_that_lacks_a_tensor_is_refused(stored, tmp_path, offline, name):
    weights = original(tiny_stable_diffusion())
    del weights[name]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(RequestError, match=r"^model: .*part\.safetensors.* config names the configs"):
        load(tmp_path / "part.safetensors", config=stored[1])


def test_a_file_with_another_models_configs_is_refused(stored, tmp_path, offline):
    tiny_stable_diffusion(tmp_path / "wide", unet={"block_out_channels": (16, 32)})
    with pytest.raises(RequestError, match=r"^model: .*can't be loaded .* config names the configs"):
        load(stored[0], config=tmp_path / "wide")


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / "it-ran"

    class Payload:
        def __reduce__(self):
            return Path.touch, (mark,)

    pickle.loads(pickle.dumps(Payload()))
    assert mark.exists()  # the payload works where it is let
    mark.unlink()
    torch.save({"state_dict": original(tiny_stable_diffusion()), "more": Payload()}, tmp_path / "bad.ckpt")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Payload()))
    for name in ("bad.ckpt", "bare.ckpt"):
        with pytest.raises(RequestError, match=r"^model: .*pickle .*convert it to \.safetensors"):
            load(tmp_path / name)
    assert not mark.exists()


def test_a_damaged_file_is_refused(stored, tmp_path):
    whole = stored[0].read_bytes()
    broken = {
        "cut": whole[:-1],
        "shorter": whole[:100],
        "no header": struct.pack("<Q", 2) + b"[]",
        "no offsets": struct.pack("<Q", 8) + b'{"a":{}}',
        "no json": struct.pack("<Q", 2**60) + b"x",
    }
    for name, content in broken.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(RequestError, match=rf"^model: .*{name}\.safetensors.* can't be read"):
            load(tmp_path / f"{name}.safetensors")


def test_shapes_are_read_without_the_tensors(stored, tmp_path):
    shapes = read_shapes(stored[0])
    assert shapes == {name: tuple(value.shape) for name, value in original(tiny_stable_diffusion()).items()}
    torch.save({"state_dict": {"a": torch.zeros(2, 3)}}, tmp_path / "a.ckpt")
    assert read_shapes(tmp_path / "a.ckpt") == {"a": (2, 3)}
    size = 2**38  # a hole of 256 GB, which nothing here could hold
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**36], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    assert read_shapes(tmp_path / "large.safetensors") == {"a": (2**36,)}


UNET = {f"{V}input_blocks.0.0.weight": (320, 4, 3, 3), "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}
XL = {
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
    "conditioner.embedders.1.model.ln_final.weight": (1280,),
}
SD3 = "joint_blocks.0.context_block.adaLN_modulation.1.bias"
FLUX = "double_blocks.0.img_attn.norm.key_norm.scale"


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({**UNET, "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,)}, "StableDiffusionPipeline"),
        ({**UNET, "cond_stage_model.model.ln_final.weight": (1024,)}, "StableDiffusionPipeline"),
        ({**UNET, **XL}, "StableDiffusionXLPipeline"),
        ({V + SD3: (9216,)}, "StableDiffusion3Pipeline"),
        ({SD3: (9216,)}, "StableDiffusion3Pipeline"),
        ({FLUX: (128,)}, "FluxPipeline"),
        ({V + FLUX: (128,)}, "FluxPipeline"),
    ],
)
def test_a_pipeline_is_known_by_the_names_of_its_tensors(shapes, kind):
    assert pipeline_of("x", shapes) == kind


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        ({**UNET, **XL, f"{V}input_blocks.0.0.weight": (320, 9, 3, 3)}, "9 channels .* inpainting"),
        ({**UNET, "conditioner.embedders.0.model.ln_final.weight": (1280,)}, "refiner"),
        (UNET, "no text encoder"),
        ({"lora_unet_down_blocks_0.alpha": ()}, "not those of a whole pipeline|it is a LoRA"),
        ({}, "not those of a whole pipeline|it is a LoRA"),
        ({FLUX: (1,), "distilled_guidance_layer.in_proj.bias": (1,)}, "Chroma"),
        ({FLUX: (1,), "single_stream_modulation.lin.weight": (1,)}, r"FLUX\.2"),
    ],
)
def test_what_is_no_known_pipeline_is_refused_by_name(shapes, problem):
    with pytest.raises(RequestError, match=problem):
        pipeline_of("x", shapes)


@pytest.mark.parametrize(("key", "module"), [(SD3, "stable_diffusion3"), (FLUX, "flux")])
def test_files_of_the_other_families_go_to_them(tmp_path, offline, key, module):
    pytest.importorskip(f"handful.models.{module}")
    save_file({key: torch.zeros(3)}, tmp_path / "x.safetensors")
    kind, source, _ = single_file.identified(
        single_file.Source("x", file=tmp_path / "x.safetensors"), single_file.ModelOptions()
    )
    assert single_file.family_of_kind(kind).__name__ == f"handful.models.{module}"
    assert source.file == tmp_path / "x.safetensors"
    with pytest.raises(RequestError):  # theirs to say what is missing of it
        load(tmp_path / "x.safetensors")
