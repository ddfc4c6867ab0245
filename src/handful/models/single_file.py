"""Single files of whole pipelines (`.safetensors`, `.ckpt`): which pipeline one holds, by the names of its tensors.

Only names and shapes are read. The names are those of the original releases, which diffusers converts at load; what a
single file does not hold, configs and tokenizers, comes from a directory or from the hub.
"""

from __future__ import annotations

import importlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from handful.errors import RequestError, first_line
from handful.models.door import no_weights, what_tensors_say
from handful.models.options import ModelOptions
from handful.models.pipelines import load_pipeline
from handful.models.source import Source

Shapes = dict[str, tuple[int, ...]]
LONGEST_HEADER = 100_000_000  # bytes; the format allows no more
PREFIX = "model.diffusion_model."
TO_CONVERT = "If you trust the file, convert it to .safetensors; or use the model's own .safetensors file."
# Files of a network alone, by a tensor that only it has; their text encoders mark whole pipelines of SD and SDXL.
TRANSFORMERS = {
    "joint_blocks.0.context_block.adaLN_modulation.1.bias": "StableDiffusion3Pipeline",
    "double_blocks.0.img_attn.norm.key_norm.scale": "FluxPipeline",
}
OTHERS = {"distilled_guidance_layer.in_proj.bias": "Chroma", "single_stream_modulation.lin.weight": "FLUX.2"}


def identified(source: Source, options: ModelOptions) -> tuple[str, Source, ModelOptions]:
    """What a single file is, and where its configs are.

    Returns:
        The pipeline's class; the source of its configs; the options with `config` filled in. Of Stable Diffusion 3 and
        Flux the source is the file's own, and the options are as they were: their families read them.

    Raises:
        RequestError: If it is no pipeline that is known, or its configs can't be had.
    """
    assert source.file is not None
    shapes = read_shapes(source.file)
    kind = pipeline_of(source.name, shapes)
    if kind in TRANSFORMERS.values():
        return kind, source, options
    name = str(options.config or default_config(shapes))
    folder = Path(name).expanduser()
    configs = Source(name, folder=folder if folder.is_dir() else None, parts=source.parts)
    try:
        found = configs.read_json("model_index.json")
    except (RequestError, ValueError) as error:  # ValueError: the hub's client, for what can't be a name there
        problem = error.problem if isinstance(error, RequestError) else first_line(error)
        raise _no_config(source, name, problem) from error
    if found is None:
        raise _no_config(source, name, "it has no model_index.json")
    if found.get("_class_name") != kind:
        raise _no_config(source, name, f"it is for a {found.get('_class_name')}, but the file holds a {kind}")
    return kind, configs, replace(options, config=name)


def load_pipeline_file(source: Source, options: ModelOptions, kind: str) -> Any:
    """`load_pipeline` of a single file; its errors say where the configs came from."""
    try:
        return load_pipeline(source, options, kind)
    except RequestError as error:
        remedy = (
            "Copy the file again, and check that config names the configs "
            f"and tokenizers of its own model (now {options.config})."
        )
        raise RequestError("model", source.name, error.problem, remedy) from error


def family_of_kind(kind: str) -> ModuleType:
    """The module of the family that a pipeline's class belongs to."""
    from handful.models import PIPELINES

    return importlib.import_module(f"handful.models.{PIPELINES[kind]}")


def read_shapes(file: Path) -> Shapes:
    """The shapes of a file's tensors by name; the tensors are not read.

    Raises:
        RequestError: If the file is damaged, or is a pickle of more than tensors.
    """
    if error := no_weights(file, str(file)):
        raise error
    if file.suffix == ".safetensors":
        return _header_shapes(file)
    try:
        held: Any = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # the unpickler's own kinds, and whatever damaged files lead to
        raise RequestError("model", str(file), "it is a pickle that can't be read as tensors alone", TO_CONVERT) from error
    while isinstance(held, dict) and "state_dict" in held:
        held = held["state_dict"]
    if not isinstance(held, dict):
        raise RequestError("model", str(file), f"it holds a {type(held).__name__}, not named tensors", TO_CONVERT)
    return {str(name): tuple(value.shape) for name, value in held.items() if isinstance(value, torch.Tensor)}


def _header_shapes(file: Path) -> Shapes:
    """From a safetensors file's header: its length in 8 bytes, then JSON. Opening it by the library would map all of it."""
    try:
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(length, LONGEST_HEADER)))
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if file.stat().st_size != 8 + length + max(ends, default=0):
            raise ValueError("its length differs from what its header says, so it is damaged or incomplete")
        return {name: tuple(entry["shape"]) for name, entry in header.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise RequestError("model", str(file), f"it can't be read ({first_line(error)})", "Copy the file again.") from error


def pipeline_of(name: str, shapes: Shapes) -> str:
    """The class of the pipeline that a file of these tensors holds."""
    network = {key.removeprefix(PREFIX) for key in shapes}
    for key, other in OTHERS.items():
        if key in network:
            problem = f"it is a {other} model, which handful can't read from a single file"
            raise RequestError("model", name, problem, "Use a model of Stable Diffusion or FLUX.1.")
    for key, kind in TRANSFORMERS.items():
        if key in network:
            return kind
    first = shapes.get(f"{PREFIX}input_blocks.0.0.weight")
    if first is None and (told := what_tensors_say(shapes)) is not None:
        raise RequestError("model", name, f"it is {told[0]}", told[1])
    if first is None:
        one = next(iter(sorted(shapes)), "none")
        problem = f"its tensors are not those of a whole pipeline ({len(shapes)}, first {one})"
        raise RequestError("model", name, problem, "Give a file of a whole Stable Diffusion, or the directory of a pipeline.")
    latents = shapes.get("first_stage_model.decoder.conv_in.weight", (0, 4))[1]
    if first[1] != latents:
        problem = (
            f"its UNet takes {first[1]} channels and its latents have {latents}: it also needs an image, as inpainting "
            f"models do"
        )
        raise RequestError("model", name, problem, "Use the family's base model for text to image.")
    if any(key.startswith("conditioner.embedders.1.") for key in shapes):
        return "StableDiffusionXLPipeline"
    if any(key.startswith("conditioner.embedders.0.") for key in shapes):
        problem = "it is a refiner of SDXL, which also needs an aesthetic score"
        raise RequestError("model", name, problem, "Use the family's base model for text to image.")
    if not any(key.startswith("cond_stage_model.") for key in shapes):
        raise RequestError("model", name, "it holds a UNet and no text encoder", "Give a file of the whole pipeline.")
    return "StableDiffusionPipeline"


def default_config(shapes: Shapes) -> str:
    """The hub's model whose configs diffusers takes for a file of these tensors."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    return fetch_diffusers_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})[
        "pretrained_model_name_or_path"
    ]


def _no_config(source: Source, name: str, problem: str) -> RequestError:
    return RequestError(
        "model.config",
        name,
        f"'{source.name}' is a single file without configs, and the configs that it needs can't be used ({problem})",
        "Give config: a directory with the pipeline's configs and tokenizers, as "
        "save_pretrained writes them (model_index.json, unet/config.json, scheduler/, ...).",
    )
