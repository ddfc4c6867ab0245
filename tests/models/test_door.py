"""The things that people have in hand and that are no model to sample from: each is named, with its next step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from handful.errors import RequestError
from handful.models import load


def written(files: dict[str, Any]) -> Callable[[Path], Path]:
    """Makes a folder of these files: dictionaries become JSON."""

    def make(folder: Path) -> Path:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return folder

    return make


def one(name: str, content: bytes = b"x") -> Callable[[Path], Path]:
    return lambda folder: written({name: content})(folder) / name


def tensors(*names: str, file: str = "x.safetensors") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        held = {name: torch.zeros(2, 2) for name in names}
        save_file(held, folder / file) if file.endswith(".safetensors") else torch.save(held, folder / file)
        return folder / file

    return make


def network(kind: str) -> dict[str, Any]:
    return {"config.json": {"_class_name": kind}}


def pipeline(kind: str, **parts: list[str]) -> dict[str, Any]:
    return {"model_index.json": {"_class_name": kind, **parts}}


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "checkpoint of training": (
        written({"optimizer.bin": b"x", "model.safetensors": b"x"}),
        "a checkpoint of a training.*--lora",
    ),
    "only unet": (written({"unet/config.json": {"_class_name": "UNet2DConditionModel"}}), r"parts .*unet/.*model_index\.json"),
    "a unet's own": (written(network("UNet2DConditionModel")), "UNet of a pipeline alone.*model_index"),
    "lora, kohya": (tensors("lora_unet_down_blocks_0.lora_down.weight"), "a LoRA.*--lora FILE"),
    "lora, peft": (tensors("unet.down_blocks.0.to_q.lora_A.weight"), "a LoRA.*--lora FILE"),
    "lora, a folder": (written({"pytorch_lora_weights.safetensors": b"x"}), "a LoRA.*--lora FILE"),
    "lora, .pt": (tensors("lora_unet_x.lora_down.weight", file="x.pt"), "a LoRA.*--lora FILE"),
    "textual inversion": (tensors("emb_params"), "textual inversion.*--embedding"),
    "GGUF": (one("flux1-dev-Q4.gguf", b"GGUF"), "GGUF.*safetensors"),
    "ONNX": (one("model.onnx"), "ONNX"),
    "ControlNet": (written(network("ControlNetModel")), "a ControlNet.*the model that it steers"),
    "ControlNet, a file": (tensors("control_model.input_blocks.0.0.weight"), "a ControlNet"),
    "IP-Adapter": (tensors("ip_adapter.1.to_k_ip.weight"), "an IP-Adapter"),
    "video pipeline": (written(pipeline("WanPipeline")), "WanPipeline, which makes videos.*text to image"),
    "image-to-image pipeline": (written(pipeline("StableDiffusionUpscalePipeline")), "needs an image"),
    "sound pipeline": (written(pipeline("StableAudioPipeline")), "makes sound"),
    "a class that diffusers lacks": (written(pipeline("MyPipeline")), r"MyPipeline.*\n.*from diffusers import MyPipeline"),
    "flax": (written({"unet/diffusion_flax_model.msgpack": b"x"}), "parts of a pipeline"),
    "flax, a file": (one("diffusion_flax_model.msgpack"), "flax"),
    "VAE": (written(network("AutoencoderKL")), "an autoencoder.*--vae"),
    "VAE, a file": (tensors("encoder.down.0.block.0.conv1.weight"), "an autoencoder.*--vae"),
    "text encoder": (
        written({"config.json": {"architectures": ["CLIPTextModel"]}}),
        r"text encoder or classifier \(CLIPTextModel\)",
    ),
    "text encoder, a file": (tensors("text_model.encoder.layers.0.mlp.fc1.weight"), "a text encoder"),
    "half a download": (written({"model.safetensors.incomplete": b"x"}), "an incomplete download"),
    "a pointer of LFS": (one("x.bin", b"version https://git-lfs.github.com/spec/v1"), "pointer of Git LFS.*git lfs pull"),
    "a web page": (one("x.bin", b"<!DOCTYPE html>"), "a web page"),
    "a pickle of weights": (one("pytorch_model.bin", b"PK"), "a pickle of weights"),
    "a pickle of code": (one("x.pt", b"\x80\x04cos\nsystem\n."), "reading it would run code|can't be read"),
    "an empty file": (one("x.xyz", b""), "an empty file"),
    "a network's file": (tensors("transformer_blocks.0.attn.to_q.weight"), "a network without the rest"),
    "images": (written({"cat/1.png": b"x"}), "a folder of images.*--exemplars"),
    "an empty folder": (written({}), "an empty folder"),
    "a folder of models": (written({"a/model_index.json": {}}), r"a folder of models.*/a\."),
    "loose files": (written({"a.ckpt": b"x"}), r"loose files.*a\.ckpt"),
    "a recipe": (one("recipe.yaml", b"model: {}"), "a recipe"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_model_is_named_with_its_next_step(tmp_path: Path, case: str):
    make, said = WRONG[case]
    with pytest.raises(RequestError, match=rf"(?s)^model: .*{said}"):
        load(make(tmp_path))
