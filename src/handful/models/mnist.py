"""The zoo's `mnist`: a published flow transformer that works on images in [0, 1] and answers the clean image.

With y = 2 x1 - 1 its process x_t = t x1 + (1 - t) noise is, up to a known offset, (t/2) y + (1 - t) noise: in [-1, 1] a flow
whose noise counts double. So t = 2 alpha / (2 alpha + sigma), and even steps of t are even steps of the flow with shift 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from handful.core.denoiser import Condition, NetworkDenoiser
from handful.core.noise import Flow, Level
from handful.models.labels import label_condition, set_labels
from handful.models.options import OF_PIPELINES, ModelOptions, refuse_options, refuse_resolution
from handful.models.source import Source
from handful.zoo.mnist_vit import SIDE, MnistViT

UNUSED = (*OF_PIPELINES, "trust_pickle")


class MnistDenoiser(NetworkDenoiser):
    """`MnistViT` as a denoiser of images in [-1, 1]."""

    network: MnistViT

    def __init__(self, network: MnistViT, classes: Sequence[str], null_class: int | None) -> None:
        super().__init__(network, "x0", (1, SIDE, SIDE), Flow(shift=2.0, time_scale=1.0))
        set_labels(self, network.y_encoder.num_embeddings, classes, null_class)

    def condition(self, labels: Sequence[int] | Sequence[str] | Tensor) -> Condition:
        return label_condition(self, labels)

    @property
    def label_embeddings(self) -> Sequence[nn.Module]:
        return (self.network.y_encoder,)

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(scaled, time, condition.labels)

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        alpha, sigma = level.on(x_t)
        weights = self.network.pos_embed
        t = (2 * level.alpha / (2 * level.alpha + level.sigma)).to(weights).expand(len(x_t))
        scaled = (x_t / (2 * alpha + sigma)).to(weights) + t.view(-1, 1, 1, 1) / 2
        return 2 * self.perturbed_call(scaled, t, condition).to(x_t.dtype) - 1


def skeleton(source: Source, options: ModelOptions) -> MnistDenoiser:
    """The denoiser without its weights, on the meta device."""
    with torch.device("meta"):
        return _denoiser(source, options)


def load(source: Source, options: ModelOptions) -> MnistDenoiser:
    """Loads the packaged weights."""
    denoiser = _denoiser(source, options)
    assert source.folder is not None, "the zoo is a folder"
    denoiser.network.load_state_dict(load_file(Path(source.folder) / "model.safetensors"))
    return denoiser.to(options.dtype) if options.dtype else denoiser


def _denoiser(source: Source, options: ModelOptions) -> MnistDenoiser:
    refuse_options(options, *UNUSED)
    said = source.read_json("handful.json") or {}
    denoiser = MnistDenoiser(
        MnistViT(),
        said["classes"] if options.classes is None else options.classes,
        said["null_class"] if options.null_class is None else options.null_class,
    )
    refuse_resolution(denoiser.shape[1:], options)
    return denoiser
