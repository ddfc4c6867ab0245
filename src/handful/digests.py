"""What identifies weights: one hash, whoever asks (a model's provenance, an extractor's digest)."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of all weights."""
    state = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        state.update(f"{key} {tuple(value.shape)} {value.dtype} ".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()
