"""How each family of pretrained networks is loaded and called: one file a family; `load` finds the right one.

    unet2d.py            UNet2DModel: DDPM-style networks of pixels
    adm.py               guided-diffusion checkpoints (.pt), converted into UNet2DModel
    edm.py               EDM-preconditioned networks: net(x, sigma, class_labels)
    dit.py, dit_file.py  DiTPipeline, and DiT's own checkpoints (.pt)
    stable_diffusion.py  Stable Diffusion 1.5, 2.1 and SDXL
    stable_diffusion3.py Stable Diffusion 3 and 3.5
    flux.py              Flux
    mnist.py             the zoo's mnist

Each of them offers `skeleton(source, options)`, the denoiser on the meta device from its configs alone, so that a wrong
request is refused before anything large is read, and `load(source, options)`, the same with its weights.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from handful.core.denoiser import NetworkDenoiser
from handful.errors import RequestError
from handful.models.door import wrong_file, wrong_folder
from handful.models.libraries import check_libraries
from handful.models.options import ModelOptions
from handful.models.pipelines import check_components, with_variant
from handful.models.source import Source, find_source
from handful.zoo import ZOO, zoo_path

# The class that a pipeline's model_index.json names -> the family's file.
PIPELINES = {
    "DDPMPipeline": "unet2d",
    "DDIMPipeline": "unet2d",
    "LDMPipeline": "unet2d",
    "DiTPipeline": "dit",
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion",
    "StableDiffusion3Pipeline": "stable_diffusion3",
    "FluxPipeline": "flux",
}
# The class of a pipeline's transformer -> the family's file, whatever the pipeline is called.
TRANSFORMERS = {"DiTTransformer2DModel": "dit", "SD3Transformer2DModel": "stable_diffusion3", "FluxTransformer2DModel": "flux"}
STEERED = ("ControlNet", "Adapter", "AnimateDiff", "GLIGEN")  # words in the classes of such pipelines
BASE = "Use the family's base model for text to image."
# A single file's ending -> the family's file, where the ending decides.
FILES = {".pt": "adm", ".pth": "adm", ".pkl": "edm"}


def load(name_or_path: str | Path, options: ModelOptions | None = None, **words: Any) -> NetworkDenoiser:
    """Loads a pretrained model as a `Denoiser`.

    Args:
        name_or_path: A name of the zoo (`mnist`), a directory that diffusers wrote, a hub name, a single file
            (guided-diffusion's `.pt`, a pipeline's `.safetensors`, NVIDIA's `.pkl`), or `FILE.py:FUNCTION`, which runs that
            file and takes the `Denoiser` that the function returns.
        options: What else is said of it.
        words: Fields of `ModelOptions`, instead of or over `options`.

    Raises:
        RequestError: If it can't be loaded as asked, saying what was looked for.
    """
    source, options, family = _found(name_or_path, options, words)
    options, notes = with_variant(source, options)
    denoiser = family.load(source, options)
    denoiser.notes = (*denoiser.notes, *notes)
    return denoiser


def skeleton(name_or_path: str | Path | Source, options: ModelOptions | None = None, **words: Any) -> NetworkDenoiser:
    """The same denoiser without its weights, on the meta device: shapes, schedule and which conditions it takes.

    For single files it may be the loaded denoiser itself. A `Source` may also be configs alone.

    Raises:
        RequestError: As `load`, where the configs show it.
    """
    if isinstance(name_or_path, Source):
        check_libraries()
        return _family(family_of(name_or_path)).skeleton(name_or_path, replace(options or ModelOptions(), **words))
    source, options, family = _found(name_or_path, options, words)
    return family.skeleton(source, options)


def from_pipeline(pipeline: Any, options: ModelOptions | None = None, **words: Any) -> NetworkDenoiser:
    """A denoiser from a diffusers pipeline at hand; it shares the pipeline's networks.

    Raises:
        RequestError: If the pipeline is of no known family.
    """
    check_libraries()
    kind = type(pipeline).__name__
    parts = {name: [None, type(part).__name__] for name, part in pipeline.components.items()}
    family = PIPELINES.get(kind) or _by_parts(parts) or "any_pipeline"
    if family == "unet2d":
        raise RequestError("pipeline", kind, "it is loaded from its directory", "Use handful.load(DIRECTORY).")
    return _family(family).from_pipeline(pipeline, replace(options or ModelOptions(), **words))


def _found(
    name_or_path: str | Path, options: ModelOptions | None, words: dict[str, Any]
) -> tuple[Source, ModelOptions, ModuleType]:
    check_libraries()
    options = replace(options or ModelOptions(), **words)
    name = str(name_or_path)
    path, _, function = name.rpartition(":")
    if path.endswith(".py") and function:
        return Source(name), options, _family("edm")
    source = Source(name, folder=zoo_path(name)) if name in ZOO else find_source(name_or_path, options.revision)
    if source is None and Path(name).expanduser().is_file():
        raise wrong_file(Path(name).expanduser(), name)
    if source is None:
        remedy = (
            "Give a directory that diffusers wrote, a checkpoint file, a hub name such as org/model, or one of: "
            f"{', '.join(ZOO)}."
        )
        raise RequestError("model", name, "there is no such directory, and the zoo has no such model", remedy)
    source = replace(source, parts={name: _part(options, name) for name in ("vae", "scheduler") if getattr(options, name)})
    family = family_of(source)
    check_components(source, options)
    return source, options, _family(family)


def _part(options: ModelOptions, name: str) -> Source:
    """Where another autoencoder or scheduler lies."""
    given, file = str(getattr(options, name)), "scheduler_config.json" if name == "scheduler" else "config.json"
    found = find_source(given)
    if found is None or found.file is not None or not (found.read_json(file) or found.read_json(f"{name}/{file}")):
        problem = f"it holds no {file}, or it is neither a directory nor a hub name"
        raise RequestError(f"model.{name}", given, problem, f"Give the directory of a {name} as diffusers saves it.")
    return found


def family_of(source: Source) -> str:
    """Which family's file knows a source."""
    if source.file is not None:
        if source.file.suffix in (".pt", ".pth") and _family("dit_file").is_dit(source):
            return "dit"
        return FILES.get(source.file.suffix, "stable_diffusion")
    if source.name in ZOO and (own := (source.read_json("handful.json") or {}).get("family")):
        return own
    index = source.read_json("model_index.json")
    kind = "" if index is None else str(index.get("_class_name"))
    if kind in PIPELINES:
        return PIPELINES[kind]
    for path in ("unet/config.json", "config.json"):
        if (source.read_json(path) or {}).get("_class_name") == "UNet2DModel":
            return "unet2d"
    if index is None:
        raise wrong_folder(source)
    return _by_parts(index) or "any_pipeline"


def _by_parts(index: dict[str, Any]) -> str | None:
    """The family of a pipeline by the classes of its parts: one for image to image, or a subclass, has the same."""
    kind = str(index.get("_class_name"))
    parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    more = [f"{name}/" for name in parts if name in ("controlnet", "adapter", "motion_adapter", "prior")]
    if more or (more := [f"{word}, not saved with it" for word in STEERED if word in kind]):
        raise RequestError("model", kind, f"it needs more inputs than a prompt ({', '.join(more)})", BASE)
    if parts.get("transformer") in TRANSFORMERS:
        return TRANSFORMERS[parts["transformer"]]
    clip = str(parts.get("text_encoder")).startswith("CLIPText")
    return "stable_diffusion" if parts.get("unet") == "UNet2DConditionModel" and clip else None


def _family(name: str) -> ModuleType:
    return importlib.import_module(f"handful.models.{name}")
