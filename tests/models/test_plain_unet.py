"""The packaged UNets without diffusers: the same bits as diffusers' own class, and the same identity."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

from handful.models import load
from handful.models.plain_unet import PlainUNet, fits
from handful.models.schedulers import plain_abar
from handful.models.unet2d import UNet2DDenoiser
from handful.runs.provenance import model_digest
from handful.zoo import zoo_path


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_answers_gradients_and_identity_are_those_of_diffusers_class(name: str):
    ours: Any = load(name)
    assert isinstance(ours.network, PlainUNet)
    theirs = UNet2DModel.from_pretrained(zoo_path(name) / "unet").eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, *ours.shape, generator=draw)
    times, labels = torch.tensor([3.0, 500.25, 999.0]), torch.tensor([0, 10, 4])
    answers, gradients = [], []
    for network in (ours.network, theirs):
        leaf = x.clone().requires_grad_()
        answers.append(network(leaf, times, class_labels=labels, return_dict=False)[0])
        gradients.append(torch.autograd.grad(answers[-1].square().sum(), leaf)[0])
    assert torch.equal(*answers)
    assert torch.equal(*gradients)
    wrapped = UNet2DDenoiser(theirs, ours.prediction, ours.levels, classes=ours.classes, null_class=ours.null_class)
    assert model_digest(wrapped) == model_digest(ours)
    half = load(name, dtype=torch.bfloat16)
    assert half.network.conv_in.weight.dtype == torch.bfloat16
    assert not fits({**ours.network.config, "time_embedding_type": "fourier"})


@pytest.mark.parametrize("shape", ["squaredcos_cap_v2", "linear", "scaled_linear"])
def test_levels_are_the_bits_of_diffusers_schedulers(shape: str):
    for cls in (DDPMScheduler, DDIMScheduler):
        scheduler: Any = cls(beta_schedule=shape, num_train_timesteps=400, beta_start=0.00085, beta_end=0.012)
        found = plain_abar({**scheduler.config, "_class_name": cls.__name__})
        assert found is not None
        assert torch.equal(found, scheduler.alphas_cumprod)
    assert plain_abar({**scheduler.config, "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}) is None


def test_a_packaged_model_is_loaded_without_diffusers():
    program = "import sys; from handful.models import load, skeleton; skeleton('digits'), load('digits');" + (
        "print([name for name in ('diffusers', 'transformers', 'sklearn', 'scipy.stats') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
