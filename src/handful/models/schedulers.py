"""diffusers' schedulers, read: the levels that a network was trained on, what it predicts, and the path they walk."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from handful.core.denoiser import Prediction
from handful.core.noise import VP, Flow, Schedule
from handful.errors import RequestError, first_line

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
Path = tuple[Tensor, Tensor]


def schedule_of(config: dict[str, Any]) -> tuple[Schedule, Prediction]:
    """A diffusers scheduler's config -> the levels that the network was trained on, and what it predicts.

    The schedule knows the scheduler's own path as its spacing "model", where that path is known to `own_path`.

    Raises:
        RequestError: If the scheduler is of a kind that is not known here.
    """
    kind = str(config.get("_class_name", "DDPMScheduler"))
    predicts = config.get("prediction_type", "epsilon")
    if predicts in PREDICTIONS and predicts != "flow_prediction" and (abar := plain_abar(config)) is not None:
        return _with_own(VP(abar), config), PREDICTIONS[predicts]
    import diffusers
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    cls: Any = getattr(diffusers, kind, None)
    try:
        if kind.startswith("FlowMatch"):
            return Flow(config.get("shift", 1.0), config.get("num_train_timesteps", 1000)), "flow"
        # without betas: variance exploding, or EDM, whose schedulers keep the network's preconditioning (c_skip, c_out,
        # c_in, c_noise) to themselves, so that the raw network is no denoiser; neither is known here
        if cls is not None and predicts in PREDICTIONS and "beta_schedule" in config:
            made: Any = cls.from_config(config).config
            # multistep solvers of today keep a flow's levels beside betas that they do not use
            flows = bool(made.get("use_flow_sigmas"))
            if flows and predicts == "flow_prediction":
                schedule: Schedule = Flow(made.get("flow_shift", 1.0), made["num_train_timesteps"])
                return _with_own(schedule, config), "flow"
            if not flows and predicts != "flow_prediction":
                # diffusers builds the betas, so that every beta_schedule it knows is right by construction
                scheduler: Any = DDPMScheduler.from_config(config)
                return _with_own(VP(scheduler.alphas_cumprod), config), PREDICTIONS[predicts]
            raise RequestError(
                "model",
                f"{kind} with prediction_type {predicts} and use_flow_sigmas {str(flows).lower()}",
                "these two settings contradict each other: only one of them is for a rectified flow",
                "Correct scheduler_config.json: a flow has prediction_type flow_prediction and use_flow_sigmas true.",
            )
    except (TypeError, ValueError, NotImplementedError) as error:
        if isinstance(error, RequestError):
            raise
        problem = f"no scheduler can be made from it ({first_line(error)})"
        raise RequestError("model", f"{kind}'s config", problem, "Copy scheduler_config.json again: it is damaged.") from error
    remedy = "Save the model with a DDPMScheduler or DDIMScheduler."
    raise RequestError("model", f"{kind} with prediction_type {predicts}", "this scheduler is not known", remedy)


def plain_abar(config: dict[str, Any]) -> Tensor | None:
    """alphas_cumprod (T,), float32, of the schedules that DDPM and DDIM schedulers mostly have, as diffusers computes them.

    None for others, which diffusers itself is asked for: importing it takes seconds.
    """
    kind, shape, steps = config.get("_class_name"), config.get("beta_schedule"), config.get("num_train_timesteps")
    ends: Any = config.get("beta_start"), config.get("beta_end")
    odd = config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr") or None in ends
    if kind not in ("DDPMScheduler", "DDIMScheduler") or odd or type(steps) is not int or steps < 2:
        return None
    if shape == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, equation 17

        def bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = torch.tensor([min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)])
    elif shape == "linear":
        betas = torch.linspace(ends[0], ends[1], steps)
    elif shape == "scaled_linear":
        betas = torch.linspace(ends[0] ** 0.5, ends[1] ** 0.5, steps) ** 2
    else:
        return None
    return (1.0 - betas).cumprod(0)


def _with_own(schedule: Schedule, config: dict[str, Any]) -> Schedule:
    own = own_path(config)
    return schedule.with_own(own) if own else schedule


def own_path(config: dict[str, Any]) -> Callable[[int], Path] | None:
    """The levels that a scheduler of this config steps through; None for a kind without such a path."""
    kind = str(config.get("_class_name", "DDPMScheduler"))
    known = ("DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "LCM")
    if kind.removesuffix("Scheduler") not in known and not config.get("use_flow_sigmas"):
        return None  # others keep paths that only their own sampler walks

    def walked(steps: int) -> Path:
        import diffusers

        scheduler: Any = getattr(diffusers, kind).from_config(config)
        scheduler.set_timesteps(steps)
        if config.get("use_flow_sigmas"):
            # the end that some keep there is the beta schedule's least sigma / alpha, which no flow knows
            return from_flow(torch.cat([scheduler.sigmas[:-1], torch.zeros(1)]))
        if kind == "LCMScheduler":  # whose last answer is the image itself
            abar = torch.cat([scheduler.alphas_cumprod.double()[scheduler.timesteps.cpu()], torch.ones(1).double()])
            return abar.sqrt(), (1 - abar).sqrt()
        if hasattr(scheduler, "sigmas"):  # Euler's are sigma / alpha, and end in 0
            return from_ratios(scheduler.sigmas)
        abar = scheduler.alphas_cumprod.double()[scheduler.timesteps.cpu()]
        final = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).double().reshape(1)
        abar = torch.cat([abar, final]) if final > abar[-1] else abar  # at the last level already: the step is none
        return abar.sqrt(), (1 - abar).sqrt()

    return walked


def from_ratios(ratio: Tensor) -> Path:
    """Noise-to-signal ratios sigma / alpha, (steps + 1,) -> a variance-preserving path."""
    ratio = ratio.double().cpu()
    total = torch.hypot(torch.ones_like(ratio), ratio)
    return 1 / total, ratio / total


def from_flow(s: Tensor) -> Path:
    """A rectified flow's times s, (steps + 1,), 1 = noise -> its path."""
    s = s.double().cpu()
    return 1 - s, s
