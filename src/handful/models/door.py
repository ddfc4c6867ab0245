"""What is wrong with a model that can't be used: the twenty things that people have in hand, named, each with its next step.

Only names and headers are read: of a folder its files and configs, of a file its first bytes and the names of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from handful.errors import RequestError
from handful.models.source import Source

WHOLE = "Give the directory that a diffusers pipeline's save_pretrained wrote (it holds model_index.json), or a hub name."
OWN = "Build the denoiser in FILE.py:FUNCTION, which may return any handful.core.denoiser.Denoiser (docs/your-model.md)."
# The class that a config.json alone names (its beginning) -> what it is, and what to do.
CLASSES = {
    "AutoencoderKL": ("an autoencoder (a VAE), a part of a pipeline", "Give the pipeline, and this as --vae DIR."),
    "AutoencoderTiny": ("a tiny autoencoder", "Give the pipeline, and this as model.preview_decoder."),
    "Autoencoder": ("an autoencoder, a part of a pipeline", "Give the pipeline, and this as --vae DIR."),
    "VQModel": ("an autoencoder, a part of a pipeline", "Give the pipeline that it belongs to."),
    "ControlNet": ("a ControlNet, which steers another model by pictures", "Give the model that it steers, alone."),
    "T2IAdapter": ("a T2I-Adapter, which steers another model by pictures", "Give the model that it steers, alone."),
    "UNet2DConditionModel": ("the UNet of a pipeline alone, without its text encoder and autoencoder", WHOLE),
    "PriorTransformer": ("a prior, the first part of a two-stage model", "Use a model of one stage."),
    "MotionAdapter": ("a motion adapter, a part of a model of videos", "Use a model of images."),
}
# Names of tensors (a part of them) -> what the file is, and what to do; the first that fits counts.
LORA = "a LoRA, an addition to a model", "Give the model that it was trained on, and this file as --lora FILE."
WORD = (
    "an embedding of textual inversion, an addition to a model",
    "Give the model that it was trained on, and this file as --embedding TOKEN=FILE.",
)
TENSORS = {
    (".lora_down.", ".lora_A.", ".lora_B.", "lora_unet_", "lora_te_", ".lora.down.", "hada_w1"): LORA,
    ("emb_params", "string_to_param", "clip_g"): WORD,
    ("control_model.", "controlnet_", "controlnet_cond_embedding", "input_hint_block"): CLASSES["ControlNet"],
    ("ip_adapter.", "image_proj.", "to_k_ip"): ("an IP-Adapter, which steers a model by pictures", "Give the model alone."),
    ("motion_modules.",): CLASSES["MotionAdapter"],
    ("optimizer_state", "exp_avg"): ("the optimizer's state, saved during training", "Give the weights saved beside it."),
    ("temporal_transformer", "time_stack", "time_mix_", "patch_embedding.weight"): (
        "a model of videos",
        "Use a model of images.",
    ),
    ("encoder.down.0.", "decoder.up.0.", "decoder.up_blocks.0."): CLASSES["AutoencoderKL"],
    ("text_model.encoder.", "encoder.block.0.layer.0.SelfAttention", "model.layers.0.self_attn"): (
        "a text encoder, a part of a pipeline",
        WHOLE,
    ),
    ("down_blocks.0.", "transformer_blocks.0.", "joint_transformer_blocks.0."): (
        "a network without the rest of its pipeline",
        WHOLE,
    ),
}
SUFFIXES = {
    ".gguf": ("quantised weights (GGUF)", "Use the model's .safetensors files instead. " + OWN),
    ".onnx": ("an ONNX graph, which gives no gradients", "Take the model's safetensors in diffusers' layout."),
    ".msgpack": ("weights of flax", "Convert them once: from_pretrained(..., from_flax=True).save_pretrained(DIR)."),
    ".h5": ("weights of TensorFlow", "Take the model's safetensors."),
    ".tflite": ("a TensorFlow Lite graph", "Take the model's safetensors."),
    ".mlmodelc": ("a Core ML model", "Take the model's safetensors in diffusers' layout."),
    ".engine": ("a TensorRT engine", "Take the model's safetensors in diffusers' layout."),
    ".npz": ("arrays of numpy or JAX", OWN),
    **dict.fromkeys((".zip", ".tar", ".gz"), ("an archive", "Unpack it, and give the directory or file in it.")),
    **dict.fromkeys((".part", ".crdownload"), ("an incomplete download", "Download it again.")),
    **dict.fromkeys((".incomplete", ".lock"), ("an incomplete download", "Download it again; hf download continues it.")),
}


def wrong_file(path: Path, name: str) -> RequestError:
    """What a file is that no family reads, by its ending and its first bytes."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return _error(name, *SUFFIXES[suffix])
    if error := no_weights(path, name):
        return error
    if suffix == ".bin":
        remedy = "Use the model's .safetensors file instead: a .bin file can run any code when it is loaded."
        return _error(name, "a pickle of weights (.bin)", remedy)
    if suffix in (".yaml", ".yml"):
        return _error(name, "a recipe or a config", "Give a recipe without --model: handful generate recipe.yaml.")
    known = "a directory of diffusers, .safetensors, .ckpt, .pt, .pth, .pkl, FILE.py:FUNCTION"
    return _error(name, f"a file of an unknown kind ({suffix or 'no ending'})", f"Give one of: {known}.")


def no_weights(path: Path, name: str) -> RequestError | None:
    """What a file is whose first bytes show that it holds no weights that can be read; else None."""
    with path.open("rb") as opened:
        head = opened.read(64)
    if not head:
        return _error(name, "an empty file", "Download it again.")
    if head.startswith(b"version https://git-lfs"):
        return _error(name, "a pointer of Git LFS, not the weights", "Fetch them: git lfs pull, or hf download.")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        remedy = "Accept the model's licence on its page, log in (hf auth login), and download it again: hf download."
        return _error(name, "a web page, saved in place of the weights", remedy)
    return _error(name, *SUFFIXES[".gguf"]) if head.startswith(b"GGUF") else None


def what_tensors_say(names: Iterable[str]) -> tuple[str, str] | None:
    """What a file of these tensors is, where it is no whole pipeline, and what to do; None where nothing is known."""
    names = list(names)
    for parts, told in TENSORS.items():
        if any(part in name for name in names for part in parts):
            return told
    return None


def wrong_folder(source: Source) -> RequestError:
    """What a model is that has neither model_index.json nor a `UNet2DModel`."""
    files, name = source.files(), source.name
    config = source.read_json("config.json") or {}
    kind = str(config.get("_class_name") or (config.get("architectures") or [""])[0])
    ends = {Path(file).suffix.lower() for file in files}
    tops = {file.split("/")[0] for file in files}
    for begin, (what, remedy) in CLASSES.items():
        if kind.startswith(begin):
            return _error(name, f"{what} ({kind})", remedy)
    if "adapter_config.json" in tops or "pytorch_lora_weights.safetensors" in tops:
        return _error(name, *LORA)
    if {"learned_embeds.safetensors", "learned_embeds.bin"} & tops:
        return _error(name, *WORD)
    if {"optimizer.bin", "scheduler.bin", "random_states_0.pkl", "trainer_state.json", "optimizer.pt"} & tops:
        remedy = "Give the pipeline's directory that the training wrote at its end; of a LoRA: the model, and --lora FILE."
        return _error(name, "a checkpoint of a training (it holds an optimizer's state)", remedy)
    parts = sorted({"unet", "transformer", "vae", "text_encoder", "scheduler"} & tops)
    inside = (source.read_json("unet/config.json") or source.read_json("transformer/config.json") or {}).get("_class_name")
    if parts:
        have = f"only parts of a pipeline ({', '.join(f'{part}/' for part in parts)}{f', a {inside}' if inside else ''})"
        return _error(name, f"{have}, without model_index.json", "Copy the whole pipeline: " + WHOLE)
    if ".incomplete" in ends or ".part" in ends:
        return _error(name, *SUFFIXES[".incomplete"])
    if kind:
        if "_class_name" in config:
            return _error(name, f"a single network ({kind}), not a pipeline", WHOLE)
        what = f"a text encoder or classifier ({kind}) of the transformers library, not a pipeline"
        return _error(name, what, f"{WHOLE} To guide with this network, use --classifier.")
    for ending in (".gguf", ".onnx", ".msgpack", ".h5", ".mlmodelc"):
        if ending in ends:
            return _error(name, f"a folder of {SUFFIXES[ending][0]}", SUFFIXES[ending][1])
    whole = [file for file in files if file.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".pkl")) and "/" not in file]
    if whole:
        return _error(
            name, f"a folder of loose files ({', '.join(sorted(whole)[:3])})", f"Give the file: {name}/{sorted(whole)[0]}."
        )
    deeper = sorted(file for file in files if file.endswith("/model_index.json"))
    if deeper:
        return _error(name, "a folder of models", f"Give one: {name}/{deeper[0].removesuffix('/model_index.json')}.")
    if ends & {".png", ".jpg", ".jpeg", ".webp"}:
        return _error(name, "a folder of images, not a model", "Give images as --exemplars DIR, and a model as --model.")
    if source.folder is not None and not files:
        return _error(name, "an empty folder", WHOLE)
    problem = "it holds no model_index.json of a pipeline and no UNet2DModel (looked for unet/config.json and config.json)"
    return RequestError("model", name, problem, WHOLE)


def _error(name: str, what: str, remedy: str) -> RequestError:
    return RequestError("model", name, f"it is {what}", remedy)
