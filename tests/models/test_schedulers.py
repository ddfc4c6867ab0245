"""Schedulers of diffusers, read: flows that keep a beta schedule beside, and paths that a network can't be asked along."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from handful.core.noise import VP, Flow, level
from handful.core.samplers import dpmpp_2m, start
from handful.errors import RequestError
from handful.models.schedulers import schedule_of
from handful.models.unet2d import UNet2DDenoiser

FLOWS = ["DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver"]


def flow_scheduler(kind: str, **config: Any) -> Any:
    words = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, **config}
    return getattr(diffusers, f"{kind}Scheduler")(**words)


def unet() -> UNet2DModel:
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(sample_size=8, block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1, **blocks).eval()


@pytest.mark.parametrize("kind", FLOWS)
def test_a_flow_of_any_multistep_solver_is_a_flow_that_is_told_a_thousand_s(kind: str):
    scheduler = flow_scheduler(kind)
    levels, prediction = schedule_of(dict(scheduler.config) | {"_class_name": type(scheduler).__name__})
    assert isinstance(levels, Flow)
    assert (prediction, levels.shift) == ("flow", 3.0)
    assert float(levels.time(level(1 - 0.593, 0.593))) == pytest.approx(593)
    scheduler.set_timesteps(6)
    path = levels.spacing(6, "model")
    torch.testing.assert_close(path.sigma[:-1].float(), scheduler.sigmas[:-1].float())
    assert path.sigma[-1] == 0
    torch.testing.assert_close(levels.time(path[1]).float(), scheduler.timesteps[1].float(), rtol=0, atol=1)


@pytest.mark.parametrize("steps", [4, 20])
@torch.no_grad()
def test_its_sample_is_diffusers_own(steps: int):
    scheduler, network = flow_scheduler("DPMSolverMultistep"), unet()
    levels, prediction = schedule_of(dict(scheduler.config) | {"_class_name": type(scheduler).__name__})
    denoiser = UNet2DDenoiser(network, prediction, levels)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    path = levels.spacing(steps, "model")
    found = dpmpp_2m(denoiser, start(noise, path), path, denoiser.condition([0, 0]))
    scheduler.set_timesteps(steps)
    # in float, where scheduler.timesteps are rounded to whole ones
    wanted = noise
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        out = network(wanted, 1000 * sigma.expand(2), return_dict=False)[0]
        wanted = scheduler.step(out, t, wanted).prev_sample
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("config", [{"use_flow_sigmas": False}, {"prediction_type": "epsilon"}])
def test_half_a_flow_is_refused(config: dict[str, Any]):
    scheduler = flow_scheduler("UniPCMultistep", **config)
    with pytest.raises(RequestError, match=r"^model: .*contradict each other.*use_flow_sigmas true"):
        schedule_of(dict(scheduler.config) | {"_class_name": "UniPCMultistepScheduler"})


def test_a_path_from_pure_noise_is_refused_where_the_network_predicts_the_noise():
    config = dict(diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing").config)
    for predicts in ("epsilon", "v_prediction"):
        levels, prediction = schedule_of(config | {"_class_name": "DDIMScheduler", "prediction_type": predicts})
        denoiser = UNet2DDenoiser(unet(), prediction, levels)
        path = levels.spacing(5, "trailing")
        assert isinstance(levels, VP)
        assert path.alpha[0] == 0
        if predicts == "epsilon":
            with pytest.raises(RequestError, match=r"^sampler\.spacing: .*alpha 0.*leading or logsnr"):
                denoiser.check_path(path)
        else:
            denoiser.check_path(path)
        for kind in ("leading", "logsnr"):
            denoiser.check_path(levels.spacing(5, kind))  # as the remedy says
