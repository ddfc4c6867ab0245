"""Denoisers of latents: what guidance looks at instead of the whole decoded image."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from handful.core.denoiser import Condition, shrunk
from handful.core.noise import VP, level
from handful.errors import RequestError
from handful.features.registry import pixels
from handful.guidance import Chamfer, Guided, Pull
from handful.models.latent import LatentDenoiser


def tiny_vae(**config: Any) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        return AutoencoderKL(**blocks, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, **config).eval()


class Unconditional(LatentDenoiser):
    def condition(self, labels: Any) -> Condition:
        return Condition()

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(scaled, time, return_dict=False)[0]


def denoiser(resolution: tuple[int, int] = (16, 16), preview_vae: Any = None, **vae: Any) -> Unconditional:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
    return Unconditional(unet, tiny_vae(**vae), "eps", VP.linear(), resolution, preview_vae=preview_vae)


def images(n: int = 6, side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents(n: int = 2) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.18},
        {"scaling_factor": 1.5, "shift_factor": 0.06},
        {"scaling_factor": 0.5, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
    ],
)
def test_encoding_undoes_the_scaling_that_decoding_does(config: dict[str, Any]):
    found = denoiser(**config)
    x0 = latents()
    torch.testing.assert_close(found._to_unit(found.scaled_for_vae(x0)), x0)
    raw: Any = found.vae
    torch.testing.assert_close(found.decode(found._to_unit(x0)), raw.decode(x0).sample, rtol=1e-4, atol=1e-5)


def test_a_preview_is_decoded_from_averaged_latents_at_their_resolution():
    found = denoiser((32, 32))
    found.factor = 4  # so that 2 is below it: the decoder's part, not the linear map's
    x0 = latents()
    assert torch.equal(found.preview(x0), found.decode(x0))
    assert torch.equal(found.preview(x0, 2), found.decode(shrunk(x0, 2)))


def test_a_tiny_decoder_takes_latents_of_unit_scale():
    torch.manual_seed(3)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny = AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4).eval()
    found = denoiser(preview_vae=tiny, scaling_factor=0.18)
    x0 = latents()
    torch.testing.assert_close(found.preview(x0), tiny.decode(x0).sample)
    assert not torch.allclose(found.preview(x0), found.decode(x0))


def test_the_linear_preview_is_the_least_squares_map_from_latents_to_mean_colours():
    found, real = denoiser(scaling_factor=0.7), images()
    explained = found.fit_preview(real)
    given = found.encode(real).permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
    wanted = real.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    solved, *_ = np.linalg.lstsq(np.c_[given, np.ones(len(given))], wanted, rcond=None)
    x0 = latents()
    expected = (np.c_[x0.permute(0, 2, 3, 1).reshape(-1, 4).double().numpy(), np.ones(128)] @ solved).reshape(2, 8, 8, 3)
    np.testing.assert_allclose(found.preview(x0, 2).permute(0, 2, 3, 1).numpy(), expected, atol=1e-3)
    residual = wanted - np.c_[given, np.ones(len(given))] @ solved
    assert explained == pytest.approx(1 - (residual**2).sum() / ((wanted - wanted.mean(0)) ** 2).sum(), abs=1e-3)
    assert found.preview(x0, 4).shape == (2, 3, 4, 4)


def test_the_fit_does_not_depend_on_the_batch_and_stands_exemplars_of_one_colour():
    one, other = denoiser(), denoiser()
    one.fit_preview(images(), batch=1)
    other.fit_preview(images(), batch=6)
    assert one.linear_preview is not None
    assert other.linear_preview is not None
    torch.testing.assert_close(one.linear_preview, other.linear_preview, rtol=1e-4, atol=1e-4)
    one.fit_preview(torch.full((2, 3, 16, 16), 0.25))
    assert one.linear_preview.isfinite().all()


def test_an_unfitted_linear_preview_says_so():
    with pytest.raises(RuntimeError, match="fit_preview"):
        denoiser().preview(latents(), 2)


@pytest.mark.parametrize("jacobian", ["exact", "gaussian"])
def test_guidance_by_a_preview_has_the_gradient_of_the_preview(jacobian: Any):
    found, real = denoiser(), images(3)
    found.fit_preview(real)
    small = shrunk(real, 2).flatten(1)
    term = Chamfer(pixels(), small, 0.5, pull=Pull(jacobian, "none", reduce=2))
    x_t, at = latents(), level(0.8, 0.6)
    shift = Guided(found, [term])(x_t, at, Condition()) - found(x_t, at, Condition())
    x = x_t.clone().requires_grad_()
    x0_hat = found(x, at, Condition())
    weight = found.linear_preview
    assert weight is not None
    weight = weight.float()
    view = torch.einsum("nchw,oc->nohw", x0_hat, weight[:, :-1]) + weight[:, -1].view(1, 3, 1, 1)
    energy = 0.5 * term.energy(view.flatten(1))
    (gradient,) = torch.autograd.grad(energy, x if jacobian == "exact" else x0_hat)
    factor = 0.6**2 / 0.8 if jacobian == "exact" else 0.6**2
    torch.testing.assert_close(shift, -factor * gradient, rtol=1e-4, atol=1e-6)
    chunked = Guided(found, [term], chunk=1)(x_t, at, Condition()) - found(x_t, at, Condition())
    torch.testing.assert_close(chunked, shift, rtol=1e-3, atol=1e-6)


def test_a_resolution_between_the_latents_is_refused_with_the_nearest_that_fits():
    with pytest.raises(RequestError, match=r"model\.resolution.*multiple of 2.*Use 16"):
        denoiser((17, 16))
