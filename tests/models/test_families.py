"""Every family, whole: one call loads it, every guidance and every sampler takes it, and nothing knows which it is.

What each family's numbers are is held against its peer in the family's own test; here it is that they all do the same.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from support.adm import Variant, saved
from support.edm import Preconditioned
from support.pipelines import tiny_sdxl, tiny_stable_diffusion
from support.pipelines_dit import tiny_dit
from support.pipelines_flow import tiny_flux, tiny_sd3
from support.pipelines_more import MORE, tiny
from torch import Tensor

import handful
from handful.core.denoiser import Clamped, Denoiser, NetworkDenoiser, shrunk
from handful.core.samplers import SAMPLERS, start
from handful.features.registry import pixels
from handful.guidance import CFG, Chamfer, Guidance, Guided, Pull
from handful.models import PIPELINES, from_pipeline, load, skeleton
from handful.models.edm import EDMDenoiser
from handful.models.latent import LatentDenoiser

STEPS = 4


def pixels_unet(folder: Path, classes: int | None) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            num_class_embeds=classes,
        )
    unet.save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


def saved_pipeline(make: Callable[..., Any], **options: Any) -> Callable[[Path], NetworkDenoiser]:
    def loaded(folder: Path) -> NetworkDenoiser:
        make(folder)
        return load(folder, **options)

    return loaded


FAMILIES: dict[str, Callable[[Path], NetworkDenoiser]] = {
    "unet-unconditional": lambda folder: load(pixels_unet(folder, None)),
    "unet-classes": lambda folder: load(pixels_unet(folder, 5), null_class=4),
    "adm": lambda folder: load(saved(folder, Variant(classes=5)), null_class=4),
    "edm": lambda folder: EDMDenoiser(Preconditioned(), null_class=4),
    "dit": saved_pipeline(tiny_dit),
    "sd": saved_pipeline(tiny_stable_diffusion),
    "sdxl": saved_pipeline(tiny_sdxl),
    "sd3": saved_pipeline(tiny_sd3),
    "flux": saved_pipeline(tiny_flux, resolution=(32, 32)),
    # but chroma, which rounds its times too in half precision, to whole ones and worse
    **{name: lambda _, name=name: from_pipeline(tiny(name), resolution=(32, 32)) for name in MORE if name != "chroma"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NetworkDenoiser:
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def exemplars(denoiser: Denoiser) -> Tensor:
    return torch.rand(3, *denoiser.image_shape, generator=torch.Generator().manual_seed(5)) * 2 - 1


def terms(denoiser: NetworkDenoiser, guidance: str) -> list[Guidance]:
    if guidance == "none":
        return []
    if guidance == "cfg":
        return [CFG(1.0)]
    real, reduce = exemplars(denoiser), denoiser.preview_factor
    if isinstance(denoiser, LatentDenoiser):
        denoiser.fit_preview(real)
    return [Chamfer(pixels(), shrunk(real, reduce).flatten(1), 0.4, pull=Pull("exact", reduce=reduce))]


@torch.no_grad()
def images(denoiser: NetworkDenoiser, guidance: str, sampler: str, seed: int = 0) -> Tensor:
    told: Any = ["a photo of a cat"] * 2 if denoiser.prompted else [1, 1]
    guided: Denoiser = Guided(denoiser, terms(denoiser, guidance))
    if not isinstance(denoiser, LatentDenoiser):
        guided = Clamped(guided)
    levels = denoiser.levels.spacing(STEPS)
    noise = torch.randn(2, *denoiser.shape, generator=torch.Generator().manual_seed(seed))
    x0 = SAMPLERS[sampler](guided, start(noise, levels), levels, guided.condition(told))
    return denoiser.decode(x0)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("guidance", ["none", "cfg", "chamfer"])
def test_every_guidance_and_sampler_gives_finite_and_seed_reproducible_images(
    family: NetworkDenoiser, guidance: str, sampler: str
):
    if guidance == "cfg" and not family.has_null:
        with pytest.raises(handful.RequestError, match="no null class"):
            images(family, guidance, sampler)
        return
    found = images(family, guidance, sampler)
    assert found.shape == (2, *family.image_shape)
    assert found.isfinite().all()
    assert torch.equal(images(family, guidance, sampler), found)
    assert not torch.allclose(images(family, guidance, sampler, seed=1), found, atol=1e-3)
    if guidance != "none":
        assert not torch.allclose(images(family, "none", sampler), found, atol=1e-6), "guidance changes the images"


def test_half_precision_networks_keep_a_float32_state(family: NetworkDenoiser):
    told: Any = ["a photo of a cat"] * 2 if family.prompted else [1, 1]
    x_t = torch.randn(2, *family.shape, generator=torch.Generator().manual_seed(0))
    at = family.levels.spacing(STEPS)[1]
    with torch.no_grad():
        whole = family(x_t, at, family.condition(told))
        family.place("cpu", torch.bfloat16)
        half = family(x_t, at, family.condition(told))
        family.place("cpu", torch.float32)
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    torch.testing.assert_close(half, whole, rtol=0.1, atol=0.1 * float(whole.abs().max()))


def test_a_family_touches_its_own_file_and_one_line_of_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A toy family from outside: a module, and its line in the list of pipelines."""
    toy = types.ModuleType("handful.models.toy")
    toy.skeleton = toy.load = lambda source, options: EDMDenoiser(Preconditioned())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "handful.models.toy", toy)
    monkeypatch.setitem(PIPELINES, "ToyPipeline", "toy")
    (tmp_path / "model_index.json").write_text('{"_class_name": "ToyPipeline"}')
    assert isinstance(skeleton(tmp_path), EDMDenoiser)
    found = images(load(tmp_path), "none", "ddim")
    assert found.isfinite().all()
