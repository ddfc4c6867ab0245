"""Peak memory: the weights that are on the device while a part of the work runs, and the tensors that it holds then.

The tensors are counted on the meta device (`handful.cost.workload`). Which weights are there depends on how the model is
placed: all of them, or under diffusers' offload those of the part that runs. The text encoders come first and go again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from handful.cost.workload import ENCODING, Live, Work, bytes_of
from handful.guidance.method import Requests, views
from handful.models.latent import LatentDenoiser
from handful.recipe.extractors import extractors_wanted
from handful.recipe.schema import ModelRequest


def peak_of(live: Live, work: Work, guidance: Requests, model: ModelRequest, encoders: Mapping[str, int]) -> int:
    """The most bytes that a run's device holds, without the allocator's gaps and the libraries' own.

    Args:
        model: How the networks are placed; on `cpu` the whole pipeline is there while its text encoders run.
        encoders: Parameters of the text encoders.
    """
    denoiser = work.denoiser
    vae = denoiser.vae if isinstance(denoiser, LatentDenoiser) else None
    tiny = denoiser.preview_vae if isinstance(denoiser, LatentDenoiser) else None
    # a tiny decoder and the extractors are no parts of the pipeline: offload leaves them on the device
    always = sum(bytes_of(work.extractors[name]) for name in extractors_wanted(guidance)) + (bytes_of(tiny) if tiny else 0)
    vae_bytes = bytes_of(vae) if vae else 0
    network = bytes_of(denoiser) - vae_bytes - (bytes_of(tiny) if tiny else 0)
    looks = isinstance(denoiser, LatentDenoiser) and any(not denoiser.is_linear(reduce) for _, reduce in views(guidance))
    decodes = looks and tiny is None  # guidance looks through the autoencoder

    def weights(part: str) -> int:
        if model.offload == "none" or vae is None:
            return network + vae_bytes
        by_vae = part in ("decode", ENCODING) or (decodes and part.startswith("preview"))
        if model.offload == "model":  # diffusers moves the network away for the autoencoder, but not the other way round
            return vae_bytes if by_vae else network + (vae_bytes if decodes else 0)
        if by_vae and part.startswith("preview"):  # the way back needs the weights again
            return vae_bytes
        return _largest(vae if by_vae else denoiser.network)

    first = sum(encoders.values()) * torch.empty(0, dtype=getattr(torch, model.dtype)).element_size()
    first += network + vae_bytes if model.device == "cpu" else 0
    return always + max([first, *(weights(part) + held for part, held in live.items())])


def _largest(network: nn.Module) -> int:
    """Bytes of the module with the largest weights of its own: sequential offload brings one after the other."""
    own = (sum(p.numel() * p.element_size() for p in module.parameters(recurse=False)) for module in network.modules())
    return max(own, default=0)
