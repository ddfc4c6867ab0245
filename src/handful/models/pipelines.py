"""What the families of diffusers pipelines share: their parts on the meta device, and with their weights."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from handful.errors import RequestError, counted, first_line
from handful.models.libraries import hide_loading_bars
from handful.models.options import ModelOptions
from handful.models.source import Source

# diffusers' and transformers' names of weights: model.safetensors, model.fp16.safetensors, model-00001-of-00002.safetensors,
# model.fp16-00001-of-00002.safetensors and model-00001-of-00002.fp16.safetensors
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<behind>\w+))?\.safetensors"
)
DECIDING = ("unet", "transformer", "vae")  # and text encoders and tokenizers: parts that images depend on


def on_meta(kind: str, config: dict[str, Any]) -> nn.Module:
    """A network of diffusers by its class's name and config, without weights or memory.

    Raises:
        RequestError: If diffusers has no such class, or the config is not one of it.
    """
    import diffusers

    cls: Any = getattr(diffusers, kind, None)
    if cls is None:
        raise RequestError("model", kind, f"diffusers {diffusers.__version__} has no such network", "Update diffusers.")
    try:
        with torch.device("meta"):
            return cls.from_config(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        problem = f"no network can be made from it ({first_line(error)})"
        raise RequestError("model", f"{kind}'s config", problem, "Copy config.json again: it is damaged.") from error


def component_on_meta(source: Source, component: str, default: str) -> nn.Module:
    """A component of a pipeline on the meta device; `default` is its class where its config names none."""
    config = source.config(component)
    return on_meta(str(config.get("_class_name", default)), config)


def check_components(source: Source, options: ModelOptions) -> None:
    """Refuses a pipeline's directory that lacks a component which its model_index.json names.

    transformers makes an empty tokenizer of a folder that is not there, and images of nothing.
    """
    if source.folder is None:
        return
    for name, value in (source.read_json("model_index.json") or {}).items():
        decides = name in DECIDING or name.startswith(("text_encoder", "tokenizer"))
        there = isinstance(value, list) and bool(value) and value[0] is not None and name not in options.without
        if decides and there and not any((source.folder / name).glob("*")):
            problem = f"it has no {name}/, which its model_index.json names"
            raise RequestError("model", source.name, problem, "Copy the whole pipeline, as its save_pretrained wrote it.")


def load_pipeline(source: Source, options: ModelOptions, kind: str, transformer: nn.Module | None = None) -> Any:
    """The pipeline with its weights, by diffusers itself; safetensors only, since other files can run code.

    Args:
        transformer: Its denoising network, where that is loaded already.
    """
    import diffusers

    preview_decoder(options)  # a few MB: a wrong name is said before the large files are read
    cls: Any = getattr(diffusers, kind)
    words: dict[str, Any] = {"torch_dtype": options.dtype} if options.dtype else {}
    words |= dict.fromkeys(options.without)
    words |= {} if transformer is None else {"transformer": transformer}
    words |= _other_parts(source, options)
    if kind == "StableDiffusionPipeline":
        words |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        with _quiet():
            if source.file is not None:
                config = {} if options.config is None else {"config": str(options.config)}
                pipeline = cls.from_single_file(str(source.file), **config, **words)
            else:
                words |= {"variant": options.variant} if options.variant else {}
                words |= {"revision": source.revision} if source.revision else {}
                pipeline = cls.from_pretrained(str(source.folder or source.name), use_safetensors=True, **words)
    except Exception as error:  # diffusers raises many kinds for files that are missing or damaged; all mean the same
        raise RequestError("model", source.name, f"it can't be loaded ({first_line(error)})", remedy(source)) from error
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            _refuse_lacking(part, "model", source.name, f" of its {name}")
    add_to(pipeline, options)
    return pipeline


def _other_parts(source: Source, options: ModelOptions) -> dict[str, Any]:
    """The autoencoder and the scheduler that stand in for the pipeline's own."""
    import diffusers

    made: dict[str, Any] = {}
    if (there := source.parts.get("vae")) is not None:
        inside = "" if there.read_json("config.json") else "vae"
        made["vae"] = load_component(there, options, inside, str(source.config("vae").get("_class_name", "AutoencoderKL")))
    if "scheduler" in source.parts:
        config = source.scheduler()
        cls: Any = getattr(diffusers, str(config.get("_class_name")), None)
        if cls is None:
            raise RequestError("model.scheduler", options.scheduler, "diffusers has no such scheduler", "Give another.")
        made["scheduler"] = cls.from_config(config)
    return made


def add_to(pipeline: Any, options: ModelOptions) -> None:
    """Merges LoRAs into a pipeline's networks, and teaches its text encoders new words.

    Raises:
        RequestError: If a file can't be read, or does not fit this model.
    """
    for given in options.lora:
        path, weight = given if isinstance(given, tuple) else (given.path, given.weight)
        _merge_lora(pipeline, Path(path).expanduser(), float(weight))
    for word, path in (options.embeddings or {}).items():
        _teach(pipeline, word, Path(path).expanduser())


def _merge_lora(pipeline: Any, path: Path, weight: float) -> None:
    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    kind = type(pipeline).__name__
    if not file.is_file() or file.suffix != ".safetensors":
        problem = "there is no such file, or it is no .safetensors"
        raise RequestError("model.lora", str(path), problem, "Give the file of a LoRA, FILE.safetensors.")
    if not hasattr(pipeline, "load_lora_weights"):
        raise RequestError("model.lora", str(path), f"diffusers can't add a LoRA to a {kind}", "Leave it out.")
    if importlib.util.find_spec("peft") is None:
        raise RequestError("model.lora", str(path), "diffusers needs the package peft for it", "Install it: pip install peft.")
    before = _sums(pipeline)
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="handful")
        pipeline.fuse_lora(lora_scale=weight, adapter_names=["handful"])
        pipeline.unload_lora_weights()
    except Exception as error:  # diffusers and peft raise many kinds for what does not fit
        problem = f"it does not fit this {kind} ({first_line(error)})"
        raise RequestError("model.lora", str(path), problem, "Give the LoRA's own base model, or leave it out.") from error
    if weight and _sums(pipeline) == before:
        problem = f"none of its weights fit a part of this {kind}"
        raise RequestError("model.lora", str(path), problem, "Give the LoRA's own base model, or leave it out.")


def _sums(pipeline: Any) -> list[float]:
    """Of each parameter of the pipeline: a LoRA that fits changes some."""
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return [float(each.detach().double().sum()) for network in networks for each in network.parameters()]


def _teach(pipeline: Any, word: str, path: Path) -> None:
    if not path.is_file() or path.suffix != ".safetensors":
        problem = "there is no such file, or it is no .safetensors"
        raise RequestError("model.embeddings", str(path), problem, "Give WORD: FILE.safetensors, of textual inversion.")
    if not hasattr(pipeline, "load_textual_inversion"):
        problem = f"diffusers can't add words to a {type(pipeline).__name__}"
        raise RequestError("model.embeddings", word, problem, "Leave it out.")
    try:
        held: Any = load_file(path)
        if "clip_l" in held and "clip_g" in held:  # of SDXL's two encoders
            for key, number in (("clip_l", ""), ("clip_g", "_2")):
                parts = {"text_encoder": getattr(pipeline, f"text_encoder{number}")}
                parts |= {"tokenizer": getattr(pipeline, f"tokenizer{number}")}
                pipeline.load_textual_inversion(held[key], token=word, **parts)
        else:
            pipeline.load_textual_inversion(held, token=word)
    except Exception as error:
        problem = f"it does not fit this {type(pipeline).__name__} ({first_line(error)})"
        remedy = "Give an embedding trained with this model's text encoders, and a word that its tokenizer does not have yet."
        raise RequestError("model.embeddings", f"{word}: {path}", problem, remedy) from error


def load_component(source: Source, options: ModelOptions, part: str, kind: str) -> nn.Module:
    """One network of diffusers with its weights.

    Args:
        part: Its folder in the model; "" for the model's own.

    Raises:
        RequestError: If it can't be loaded, or its weights do not fit its config.
    """
    import diffusers

    where: Any = source.name if source.folder is None else source.folder / part
    words: dict[str, Any] = {"variant": options.variant}
    if source.folder is None:
        words |= {"subfolder": part, "revision": source.revision}
    else:
        words |= {"use_safetensors": any(where.glob("*.safetensors")) or None}
        words |= {"variant": None} if _plain(where.glob("*")) else {}
    try:
        with _quiet():
            # cast afterwards, diffusers would warn of modules to keep in float32 even where it names none
            loaded: Any = getattr(diffusers, kind).from_pretrained(
                where, output_loading_info=True, torch_dtype=options.dtype, **words
            )
    except Exception as error:  # diffusers raises many kinds for a damaged file; all mean the same to the user
        raise RequestError("model", source.name, f"it can't be loaded ({first_line(error)})", remedy(source)) from error
    network, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
        problem = f"its weights don't fit its config ({counted(len(wrong), 'tensor')}, first {wrong[0]})"
        raise RequestError("model", str(where), problem, "Copy config.json and weights from the same checkpoint.")
    return network


def _plain(files: Iterable[Path]) -> bool:
    """Whether weights without a variant are among them."""
    found = [_WEIGHTS.fullmatch(file.name) for file in files]
    return any(one is not None and one["variant"] is None and one["behind"] is None for one in found)


def with_variant(source: Source, options: ModelOptions) -> tuple[ModelOptions, list[str]]:
    """The options with the variant of the weights (`*.fp16.safetensors`) filled in where a part has no others; and notes.

    Raises:
        RequestError: If there are several variants and none is chosen.
    """
    if options.variant or source.file is not None:
        return options, []
    plain: set[str] = set()
    variants: dict[str, set[str]] = {}
    for file in source.files():
        if (found := _WEIGHTS.fullmatch(Path(file).name)) is None:
            continue
        part, variant = str(Path(file).parent), found["variant"] or found["behind"]
        plain.add(part) if variant is None else variants.setdefault(part, set()).add(variant)
    needed = {part: kinds for part, kinds in variants.items() if part not in plain and part not in options.without}
    if not needed:
        return options, []
    shared = sorted(set.intersection(*needed.values()))
    if len(shared) != 1:
        choices = ", ".join(sorted(set.union(*needed.values())))
        raise RequestError(
            "model.variant", None, f"it holds weights in several variants ({choices})", "Choose one: --set model.variant=NAME."
        )
    note = f"model.variant is {shared[0]}, since there are no other weights of {', '.join(sorted(needed))}"
    return replace(options, variant=shared[0]), [note.replace(" of .", "")]


def _refuse_lacking(network: nn.Module, field: str, name: str, which: str = "") -> None:
    """Refuses a network whose file lacked tensors; diffusers only warns of them."""
    if absent := [key for key, value in network.state_dict().items() if value.is_meta]:
        problem = f"it lacks {counted(len(absent), 'tensor')}{which}, first {absent[0]}"
        raise RequestError(field, name, problem, "Copy weights and configs from the same model.")


def preview_decoder(options: ModelOptions, *, meta: bool = False, channels: int = 4) -> nn.Module | None:
    """The tiny autoencoder that guidance decodes with, where one is asked for.

    Args:
        meta: Without weights, on the meta device; a hub name is taken to fit the model.
    """
    if options.preview_decoder is None:
        return None
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    name = str(options.preview_decoder)
    is_path = Path(name).is_dir() or name.startswith((".", "/", "~"))
    if meta and not is_path:  # its config is always this one; the hub need not be asked
        return on_meta("AutoencoderTiny", {"latent_channels": channels})
    try:
        with _quiet():
            tiny: Any = AutoencoderTiny.from_pretrained(name, torch_dtype=options.dtype or torch.float32, use_safetensors=True)
    except Exception as error:
        get = (
            ""
            if is_path
            else f" If it is a hub name that is not in the cache ({hub_cache()}), download it once online: hf download {name}."
        )
        raise RequestError(
            "model.preview_decoder",
            name,
            f"it can't be loaded ({first_line(error)})",
            f"Name an AutoencoderTiny for these latents, such as madebyollin/taesd.{get}",
        ) from error
    _refuse_lacking(tiny, "model.preview_decoder", name)
    return tiny


def remedy(source: Source) -> str:
    """What to do about a model that can't be loaded."""
    if source.folder or source.file:
        return "Copy the whole model again, with its safetensors weights."
    return f"Download the whole model into the hub's cache ({hub_cache()}) once online: hf download {source.name}."


def hub_cache() -> str:
    """Where the hub keeps what it gave."""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' word on `torch_dtype`, which older versions that we support know by no other name, and outside a
    terminal without bars."""
    if not sys.stderr.isatty():
        hide_loading_bars()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        yield
