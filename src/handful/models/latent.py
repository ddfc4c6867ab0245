"""Denoisers in the latent space of a diffusers autoencoder: what DiT, Stable Diffusion and Flux have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from handful.core.denoiser import NetworkDenoiser, Prediction, shrunk
from handful.core.memory import in_smaller_parts
from handful.core.noise import Schedule
from handful.errors import RequestError, counted
from handful.models.prompts import text_encoders

PATCH = 2  # latent pixels to a token, a side, where a pipeline packs its latents


class LatentDenoiser(NetworkDenoiser):
    """A network of latents and its autoencoder.

    The autoencoder runs in its own precision (SDXL's in float32), latents and images keep the caller's.

    Args:
        network: The denoising network.
        vae: An `AutoencoderKL` or kin: `config` with `scaling_factor` (and `shift_factor`, or `latents_mean` and
            `latents_std`, where it has those), `encode`, `decode`.
        prediction, levels: As for `NetworkDenoiser`.
        resolution: (height, width) of the images.
        patch: Latent pixels to a patch of the network, which the latents' sides must divide by.
        preview_vae: An `AutoencoderTiny` that guidance decodes with; None decodes with the vae. See `preview`.

    Attributes:
        factor: Pixels of an image to one of its latents, along a side.
        pipeline: The diffusers pipeline that the parts are of; None for a skeleton.
        can_offload: Whether a pipeline of diffusers can move its parts to the CPU and back.
        vae_overflows: Whether its autoencoder overflows in float16. Only SDXL's does; the `force_upcast` in configs does not
            show it, since it is true by default.

    Raises:
        RequestError: If the resolution does not fit.
    """

    factor: int
    vae_overflows: bool = False
    can_offload: bool = True
    pipeline: Any = None

    def __init__(
        self,
        network: nn.Module,
        vae: nn.Module,
        prediction: Prediction,
        levels: Schedule,
        resolution: tuple[int, int],
        *,
        patch: int = 1,
        preview_vae: nn.Module | None = None,
    ) -> None:
        config: Any = vae.config
        factor = factor_of(config)
        for side in resolution:
            if side < 1 or side % (factor * patch):
                near = max(1, round(side / (factor * patch))) * factor * patch
                problem = f"{side} is not a multiple of {factor * patch}, as this model's latents require"
                raise RequestError("model.resolution", list(resolution), problem, f"Use {near}.")
        tiny: Any = None if preview_vae is None else preview_vae.config
        if tiny:
            channels, blocks = tiny.latent_channels, len(tiny.decoder_block_out_channels)
            remedy = "Name an autoencoder made for this model's latents."
            if channels != channels_of(config):
                problem = f"this model's latents have {channels_of(config)}"
                raise RequestError("model.preview_decoder", f"latents of {counted(channels, 'channel')}", problem, remedy)
            if 2 ** (blocks - 1) != factor:
                problem = "its images differ in size from this model's"
                raise RequestError("model.preview_decoder", f"{counted(blocks, 'block')}", problem, remedy)
        height, width = (side // factor for side in resolution)
        super().__init__(network, prediction, (channels_of(config), height, width), levels)
        self._frames = hasattr(config, "temperal_downsample")  # the autoencoder takes images as videos of one frame
        self.factor, self.resolution = factor, resolution
        self.vae = vae.eval().requires_grad_(False)
        self.preview_vae = None if preview_vae is None else preview_vae.eval().requires_grad_(False)
        self.linear_preview: Tensor | None = None  # (3, latent channels + 1); not a buffer, so that no cast rounds it

    @property
    def image_shape(self) -> tuple[int, int, int]:
        config: Any = self.vae.config
        return getattr(config, "out_channels", 3), *self.resolution

    def components(self) -> Mapping[str, nn.Module]:
        held = {"network": self.network, "vae": self.vae, "preview_vae": self.preview_vae}
        return {name: network for name, network in held.items() if network is not None} | text_encoders(self.pipeline)

    @property
    def preview_factor(self) -> int:
        return self.factor if self.preview_vae is None else 1  # whoever names a tiny decoder wants it used

    def decode(self, x0: Tensor) -> Tensor:
        """Latents (n, *shape) -> images (n, 3, *resolution); differentiable."""
        vae: Any = self.vae
        z = self.scaled_for_vae(x0).to(_dtype(vae))
        images = vae.decode(z.unsqueeze(2) if self._frames else z, return_dict=False)[0]
        return (images[:, :, 0] if self._frames else images).to(x0.dtype)

    def encode(self, images: Tensor) -> Tensor:
        """Images (n, 3, *resolution) in [-1, 1] -> the mode of their latents, (n, *shape)."""
        vae: Any = self.vae
        images_ = images.to(_dtype(vae))
        encoded = vae.encode(images_.unsqueeze(2) if self._frames else images_)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
        return self._to_unit((latents[:, :, 0] if self._frames else latents).to(images.dtype))

    def is_linear(self, reduce: int) -> bool:
        """Whether a preview at this reduction goes through the fitted linear map."""
        return reduce > 1 and reduce % self.factor == 0

    def averaged(self, reduce: int) -> int:
        """The sides of the squares of latents that a preview at this reduction averages."""
        return reduce // self.factor if self.is_linear(reduce) else reduce

    def preview(self, x0: Tensor, reduce: int = 1) -> Tensor:
        """Images of 1/reduce of the resolution: decoded from averaged latents, or by the fitted linear map.

        The linear map (see `fit_preview`) serves where reduce is the autoencoder's own factor or a multiple of it: every
        latent pixel is one pixel then, and neither decoder nor tiny decoder is needed.

        Returns:
            (n, 3, h / reduce, w / reduce) for images of (h, w); differentiable.

        Raises:
            RuntimeError: If the linear map is asked for and has not been fitted.
        """
        if self.is_linear(reduce):
            if self.linear_preview is None:
                raise RuntimeError("the linear preview has not been fitted: call fit_preview(images) first")
            weight = self.linear_preview.to(x0)
            small = shrunk(x0, self.averaged(reduce))
            return torch.einsum("nchw,oc->nohw", small, weight[:, :-1]) + weight[:, -1].view(1, -1, 1, 1)
        if self.preview_vae is None:
            return self.decode(shrunk(x0, reduce))
        tiny: Any = self.preview_vae  # takes latents of unit scale, as the network has them
        return tiny.decode(shrunk(x0, reduce).to(_dtype(tiny)), return_dict=False)[0].to(x0.dtype)

    @torch.no_grad()
    def fit_preview(self, images: Tensor, batch: int = 4) -> float:
        """Fits the linear map from a latent pixel to the mean colour of its square of pixels, by least squares.

        Args:
            images: (n, 3, h, w) in [-1, 1], such as all exemplars; on any device.
            batch: Images to encode at once.

        Returns:
            The share of the colours' variance that the map explains, 1 for all of it.
        """
        device = self.device

        def encoded(size: int) -> Tensor:
            return torch.cat([self.encode(part.to(device)).cpu() for part in images.split(size)])

        latents = in_smaller_parts(encoded, batch).double()
        wanted = shrunk(images.cpu().double(), self.factor).movedim(1, -1).flatten(0, -2)
        given = latents.movedim(1, -1).flatten(0, -2)
        given = torch.cat([given, torch.ones(len(given), 1, dtype=torch.float64)], dim=1)
        # a ridge far below any signal keeps the map finite where the exemplars are of one colour
        gram = given.T @ given + 1e-6 * len(given) * torch.eye(given.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(gram, given.T @ wanted)
        self.linear_preview = weight.T.contiguous()
        residual, spread = (wanted - given @ weight).square().sum(), (wanted - wanted.mean(0)).square().sum()
        return float(1 - residual / spread) if spread > 0 else 1.0

    def place(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """As `Denoiser.place`; an autoencoder that overflows in half precision stays in float32."""
        super().place(device, dtype)
        if self.vae_overflows and dtype == torch.float16:
            self.vae.to(torch.float32)

    def scaled_for_vae(self, x0: Tensor) -> Tensor:
        """Latents of unit scale (n, *shape) -> as the autoencoder has them."""
        scale, shift = self._scale_and_shift(x0)
        return x0 * scale + shift

    def _to_unit(self, latents: Tensor) -> Tensor:
        scale, shift = self._scale_and_shift(latents)
        return (latents - shift) / scale

    def _scale_and_shift(self, like: Tensor) -> tuple[Any, Any]:
        config: Any = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        factor = getattr(config, "scaling_factor", None) or 1.0
        if mean is not None and std is not None:
            return _channels(std, like) / factor, _channels(mean, like)
        return 1 / factor, getattr(config, "shift_factor", None) or 0.0


def packed(latents: Tensor) -> Tensor:
    """Latents (n, c, h, w) -> a token to each 2 x 2 patch, row by row: (n, h w / 4, 4 c)."""
    return pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`: tokens (n, height width, 4 c) -> latents (n, c, 2 height, 2 width)."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), PATCH)


def factor_of(vae: Any) -> int:
    """Pixels of an image to one of its latents, along a side, by an autoencoder's config."""
    if (halvings := getattr(vae, "temperal_downsample", None)) is not None:  # diffusers' spelling; of autoencoders of videos
        return 2 ** len(halvings)
    return 2 ** (len(getattr(vae, "block_out_channels", None) or vae.encoder_block_out_channels) - 1)


def channels_of(vae: Any) -> int:
    """Channels of the latents, by an autoencoder's config."""
    return getattr(vae, "latent_channels", None) or vae.z_dim


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _channels(values: list[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(1, -1, 1, 1)
