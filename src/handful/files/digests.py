"""What identifies weights: one hash, whoever asks (a model's provenance, an extractor's digest)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of all weights."""
    return tensors_digest(network.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, shapes, types and bytes of all tensors, whatever their order."""
    state = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        state.update(f"{key} {tuple(value.shape)} {value.dtype} ".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
