"""What identifies weights: one hash, whoever asks (a model's provenance, an extractor's digest)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of all weights."""
    return tensors_digest(network.state_dict())


def marks(network: nn.Module, most: int = 8) -> frozenset[str]:
    """Short hashes of a network's largest parameters: two networks that share one share weights.

    Names play no part, nor does what is around the weights (another input size, other prompts, Softplus for ReLU). Parameters
    of one single value are left out: freshly made networks have those alike. Empty on the meta device.
    """
    weights = [one for one in network.parameters() if not one.is_meta and one.numel() > 1]
    found: list[str] = []
    for one in sorted(weights, key=lambda each: -each.numel()):
        if len(found) == most:
            break
        data = one.detach().cpu().contiguous().reshape(-1)
        if bool((data != data[0]).any()):
            content = data.view(torch.uint8).numpy().data
            found.append(hashlib.sha256(content).hexdigest()[:16])
    return frozenset(found)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, shapes, types and bytes of all tensors, whatever their order."""
    state = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        state.update(f"{key} {tuple(value.shape)} {value.dtype} ".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
