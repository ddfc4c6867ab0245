"""Where a run's bytes come from, beyond its recipe: versions, device, and the digests of all that was read."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from handful.core.denoiser import Denoiser
from handful.core.noise import Levels
from handful.data.exemplars import Exemplars
from handful.data.shared_exemplars import ExemplarFeatures
from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor
from handful.files.digests import marks, weights_digest
from handful.models.prompts import tokenizer_digests

# Another version of these may give other bytes: of the images (pillow: of the files), of the markers and the manifest.
DECIDING = ("handful", "torch", "diffusers", "transformers", "numpy", "pillow", "pyarrow")
CONTENTS = ("model_sha256", "exemplars_sha256", "features_sha256", "embeddings_sha256")


def provenance_of(
    denoiser: Denoiser,
    device: torch.device,
    levels: Levels,
    exemplars: Exemplars | ExemplarFeatures | None,
    extractors: Mapping[str, FeatureExtractor],
    notes: list[str],
    embeddings_sha256: str | None = None,
) -> dict[str, Any]:
    """Plain data for recipe.yaml. No time, host or user is in it: the same run is the same text everywhere.

    Args:
        denoiser: With its weights as they were loaded; see `model_digest`.
        embeddings_sha256: Of the file that guides by inversion; None where there is none.
    """
    return {
        **{name: installed(name) for name in DECIDING},
        "python": platform.python_version(),
        "device": describe_device(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "model_sha256": model_digest(denoiser),
        "exemplars_sha256": exemplars.digest if exemplars else None,
        "features_sha256": {name: extractor.digest for name, extractor in extractors.items()},
        "features_weights": {name: " ".join(sorted(marks(extractor))) for name, extractor in extractors.items()},
        "embeddings_sha256": embeddings_sha256,
        "levels": {"alpha": levels.alpha.tolist(), "sigma": levels.sigma.tolist()},
        "notes": notes,
    }


def model_digest(denoiser: Denoiser) -> str:
    """What identifies a model: SHA-256 of all weights that decide its images, of how they are used, and of a user's own code.

    Args:
        denoiser: With its weights as they were loaded, before any change of precision, text encoders included.
    """
    told: dict[str, Any] = {
        name: [weights_digest(network), _config_of(network)] for name, network in denoiser.components().items()
    }
    told["code"] = denoiser.code_sha256
    told["tokenizers"] = tokenizer_digests(getattr(denoiser, "pipeline", None))
    # the same weights under another prediction or schedule are another model
    told["prediction"] = getattr(denoiser, "prediction", None)
    told["schedule"] = [
        [float(at.alpha), float(at.sigma), float(denoiser.levels.time(at))] for at, _ in denoiser.levels.spacing(8).pairs()
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _config_of(network: nn.Module) -> dict[str, str]:
    """What a network's config says beyond its weights (scaling factors, heads), without paths and versions."""
    config: Any = getattr(network, "config", None) or getattr(getattr(network, "network", None), "config", None) or {}
    held = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    left_out = ("transformers_version", "dtype", "torch_dtype")
    return {key: str(value) for key, value in held.items() if not key.startswith("_") and key not in left_out}


@cache
def installed(name: str) -> str | None:
    """The version of a package that is installed."""
    if name == "handful":
        from handful import __version__

        return __version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe_device(device: torch.device) -> str:
    """What computes: processors of another kind may round otherwise."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({platform.machine()} {torch.backends.cpu.get_cpu_capability()})"
    return device.type


def choose_device(asked: str) -> torch.device:
    """The device of a recipe; `auto` is the first CUDA device, else the CPU.

    Raises:
        RequestError: It is not there.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(asked)
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there[device.type]:
        raise RequestError("model.device", asked, "this machine has no such device", "Use auto, or cpu.")
    return device
