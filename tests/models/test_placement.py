"""A model is asked for one image before the long work: what it raises, and what it answers."""

from typing import Any

import pytest
import torch
from torch import nn

from handful.core.noise import EDM
from handful.errors import RequestError
from handful.models.edm import EDMDenoiser
from handful.models.placement import try_once


class Wide(nn.Module):
    """As k-diffusion wraps networks: labels by keyword, if at all."""

    img_channels, img_resolution, label_dim = 3, 4, 0

    def forward(self, input, sigma, **kwargs):
        self.told = kwargs
        return input / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def broken(answer: Any) -> nn.Module:
    network = Wide()
    network.forward = answer  # type: ignore[method-assign]
    return network


def test_networks_of_k_diffusion_are_called_without_a_third_argument():
    network = Wide()
    denoiser = EDMDenoiser(network)
    try_once(denoiser, denoiser.levels.spacing(4), [0])
    assert network.told == {}
    network.label_dim = 5
    denoiser = EDMDenoiser(network)
    denoiser(torch.zeros(2, 3, 4, 4), EDM().spacing(4)[0], denoiser.condition([1, 4]))
    assert network.told["class_cond"].tolist() == [1, 4]


def starved(*_: Any) -> Any:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


CASES = {
    "raises": (lambda x, s, c: x @ x.flatten(), r"it fails on one image of shape \(3, 4, 4\) \(RuntimeError: .*FILE\.py"),
    "memory": (starved, "bfloat16"),
    "shape": (lambda x, s, c: x[:, :, ::2], r"it returns \(1, 3, 2, 4\)"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_network_can_not_do_is_refused(case: str):
    answer, said = CASES[case]
    denoiser = EDMDenoiser(broken(answer))
    with pytest.raises(RequestError, match=f"^model: .*{said}"):
        try_once(denoiser, denoiser.levels.spacing(4), [0])
