"""handful's guidance inside diffusers: as a pipeline's callback, or as a guider of a modular pipeline.

Both compute the shift d of x0_hat that `Guided` would add, and hand it over in diffusers' terms.

- `GuidanceCallback` sees the latents only after the pipeline's step. A first-order deterministic step from level t to s is
  x_s = alpha_s x0_hat + sigma_s eps_hat with eps_hat = (x_t - alpha_t x0_hat) / sigma_t, so a shift d of x0_hat at t moves
  x_s by (alpha_s - alpha_t sigma_s / sigma_t) d. It keeps the latents of the last call as x_t, asks the network a second
  time there, and moves x_s. Price: one more forward pass on each guided step, and a backward one where a jacobian is exact.
- `HandfulGuider` stands where a modular pipeline mixes its predictions. It watches the network's input, takes x0_hat from
  the prediction that the pipeline has made anyway, and adds to that prediction what d is in it: -(alpha / sigma) d for eps,
  and so on by denoiser.py's table. Any scheduler may follow. No second forward, but with an exact jacobian, whose graph the
  pipeline's own pass does not keep.

The pipeline's own classifier-free guidance goes on beside it: shifts add up, and ours is taken at the conditional estimate,
as in `Guided(denoiser, [CFG(w), term])`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from handful.core.denoiser import Condition, Denoiser, NetworkDenoiser, denoised_from, output_from
from handful.core.noise import LARGEST_RATIO, VP, Flow, Level, Levels, Schedule
from handful.errors import RequestError, RunError, counted
from handful.guidance import CFG, Guidance, Guided, Potential
from handful.guidance.guiders import Guider
from handful.models import from_pipeline
from handful.models.latent import PATCH, packed, unpacked
from handful.models.libraries import check_libraries
from handful.models.schedulers import from_flow, own_path

check_libraries()  # a broken torchvision is named here, not deep inside the import of diffusers

from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance  # noqa: E402
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput  # noqa: E402

FIRST_ORDER = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")


class GuidanceCallback:
    """Guidance terms as the `callback_on_step_end` of a Stable Diffusion, SDXL, Stable Diffusion 3 or Flux pipeline.

    The images of one call are one cohort. With DDIM, leave the pipeline's `eta` at 0. Pass the denoiser the same settings as
    the pipeline: `from_pipeline(pipeline, resolution=(height, width), embedded_guidance=...)`.

    Args:
        pipeline: The pipeline that will call it.
        terms: Guidance terms. `CFG` among them is the denoiser's; the pipeline has its own in `guidance_scale`.
        prompt: As given to the pipeline: one for all, or a list.
        latents: The very tensor given to the pipeline as `latents`. Without it the first step, whose start is then
            unknown, is not guided. Such a callback serves one call.
        denoiser: The pipeline's denoiser; None makes it by `handful.models.from_pipeline`.
        chunk: See `Guided`.

    Raises:
        RequestError: If the pipeline is of no known family, if its scheduler's steps are not as above: multistep ones,
            stochastic ones, and those that clip; or if a term does anything but shift x0_hat.
    """

    def __init__(
        self,
        pipeline: Any,
        terms: Sequence[Guidance],
        prompt: str | Sequence[str],
        *,
        latents: Tensor | None = None,
        denoiser: NetworkDenoiser | None = None,
        chunk: int | None = None,
    ) -> None:
        _refuse_scheduler(pipeline.scheduler)
        _refuse_terms(terms)
        self.denoiser = denoiser if denoiser is not None else from_pipeline(pipeline)
        self.terms, self.chunk = tuple(terms), chunk
        self.prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self.latents, self._used = latents, False

    def __call__(self, pipeline: Any, index: int, timestep: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Called by the pipeline after step `index`; returns the latents moved, or nothing where no term acts."""
        x_s = tensors["latents"]
        if index == 0:
            self._begin(pipeline)
        x_t, self._x_t = self._x_t, x_s
        if index >= self.levels.steps:  # DDIM's last step, where it stays at the first training step's level
            return {}
        t, s = self.levels[index], self.levels[index + 1]
        if x_t is None or not any(_acts(term, t) for term in self.terms):
            return {}
        if x_t.shape != x_s.shape:
            problem = f"the pipeline's latents have the shape {tuple(x_s.shape)}"
            raise RequestError("latents", tuple(x_t.shape), problem, "Give the callback the same latents as the pipeline.")
        start = _plain(x_t.float(), self.denoiser.shape)
        if len(start) % len(self.prompts):
            problem = f"the pipeline makes {counted(len(start), 'image')}, with other prompts"
            raise RequestError("prompt", self.prompts, problem, "Give the callback the same prompts as the pipeline.")
        each = len(start) // len(self.prompts)
        condition = self.denoiser.condition([prompt for prompt in self.prompts for _ in range(each)])
        _, shift = self.guided.parts(start, t, condition)
        if shift is None:
            return {}
        moved = (s.alpha - t.alpha * s.sigma / t.sigma) * (packed(shift) if x_s.ndim == 3 else shift)
        self._x_t = (x_s.float() + moved).to(x_s.dtype)
        return {"latents": self._x_t}

    def _begin(self, pipeline: Any) -> None:
        """A call of the pipeline starts: its scheduler now knows its levels."""
        if self._used and self.latents is not None:
            problem = "these latents were used in the last call of the pipeline"
            raise RequestError("latents", tuple(self.latents.shape), problem, "Make a GuidanceCallback for each call.")
        scheduler = pipeline.scheduler
        _refuse_scheduler(scheduler)
        self._used, self.levels = True, _walked(scheduler)
        self.guided = Guided(self.denoiser, self.terms, self.chunk)
        for term in self.terms:
            term.begin()
        self._x_t = None if self.latents is None else self.latents * getattr(scheduler, "init_noise_sigma", 1.0)


class HandfulGuider(BaseGuidance):
    """Guidance terms as a guider of a modular pipeline: `pipeline.update_components(guider=HandfulGuider(...))`.

    It works where a pipeline's blocks call their network once a prediction, each time between `prepare_models` and
    `cleanup_models`, on latents (n, c, h, w): Stable Diffusion XL's and Stable Diffusion 3's do (the latter's make a null
    prediction only where a negative prompt is given, even an empty one). Flux's blocks ask no guider, and networks of packed
    latents are refused at the first step. It can't be saved with the pipeline.

    Args:
        denoiser: Of the same networks, for what they predict, their levels and the decoder: for instance
            `handful.models.from_pipeline` of the plain pipeline made of the same components.
        terms: Guidance terms; all but those that ask for the null condition.
        base: A guider of diffusers whose mix the terms then shift; None takes the conditional prediction alone.

    Raises:
        RequestError: If a term asks for the null condition: give `base` diffusers' guider for it; or if one does anything
            but shift x0_hat.
    """

    def __init__(self, denoiser: NetworkDenoiser, terms: Sequence[Guidance], base: BaseGuidance | None = None) -> None:
        _refuse_terms(terms)
        for term in terms:
            if isinstance(term, (CFG, Guider)):
                remedy = "Give base=ClassifierFreeGuidance(...) of diffusers, or one of its others."
                raise RequestError("terms", term.name, "the pipeline makes the null prediction, not this guider", remedy)
        self.base: Any = ClassifierFreeGuidance(guidance_scale=1.0) if base is None else base
        self._input_predictions = self.base._input_predictions
        super().__init__()
        self.register_to_config(terms=[term.name for term in terms], base=type(self.base).__name__)
        self.denoiser, self.terms = denoiser, tuple(terms)
        self._told = _Told(denoiser)
        self._guided = Guided(self._told, self.terms)
        self._hook: Any = None

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self.base.set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: Any) -> Any:
        return self.base.prepare_inputs(data)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> Any:
        return self.base.prepare_inputs_from_block_state(data, input_fields)

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        self.base.prepare_models(denoiser)
        self._unhook()  # one is left where the network failed
        if self._count_prepared == 1:  # guiders of diffusers have the conditional prediction made first
            self._hook = denoiser.register_forward_pre_hook(self._told.listen, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._unhook()
        self.base.cleanup_models(denoiser)

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def is_conditional(self) -> bool:
        return self.base.is_conditional

    @property
    def num_conditions(self) -> int:
        return self.base.num_conditions

    def __call__(self, data: list[Any]) -> Any:
        """The base's mix of the predictions in `data`, shifted."""
        mixed = self.base(data)
        conditional = data[0].noise_pred
        x_t, level = self._told.hear(conditional, self._step, self._num_inference_steps)
        _, shift = self._guided.parts(x_t, level, Condition())
        self._told.forget()
        if shift is None:
            return mixed
        # the table is affine in x0_hat, so its linear part takes a change of it to the change of the prediction
        change = output_from(self.denoiser.prediction, torch.zeros_like(x_t), shift, level)
        pred = (mixed.pred.float() + change).to(mixed.pred.dtype)
        return GuiderOutput(pred=pred, pred_cond=mixed.pred_cond, pred_uncond=mixed.pred_uncond)


class _Told(Denoiser):
    """The network of a pipeline as the pipeline has just called it: x0_hat from the prediction made, without another call.

    With a graph asked for, it calls the network again, with the same arguments.
    """

    def __init__(self, denoiser: NetworkDenoiser) -> None:
        super().__init__()
        self.of = denoiser
        self.shape, self.levels = denoiser.shape, denoiser.levels
        self.forget()

    def forget(self) -> None:
        self._call: tuple[nn.Module, inspect.BoundArguments] | None = None
        self._x0_hat: Tensor | None = None

    def listen(self, network: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> None:
        """A forward pre-hook of the network."""
        self._call = network, inspect.signature(network.forward).bind(*args, **words)

    def hear(self, prediction: Tensor, step: int, steps: int) -> tuple[Tensor, Level]:
        """Takes in what the network then predicted; returns what it was given, as x_t, and its level.

        The network's input is x_t / n, or x_t / m for a flow: itself an x_t, of a level of unit n or m.
        """
        if self._call is None:
            problem = "its blocks do not call their network between prepare_models and cleanup_models"
            raise RequestError("pipeline", None, problem, "Use GuidanceCallback on the plain pipeline.")
        told = self._call[1].arguments
        sample: Tensor = next(iter(told.values()))  # the first parameter of every network of diffusers
        if sample.shape[1:] != self.shape:
            raise RequestError(
                "pipeline",
                tuple(sample.shape),
                "its blocks give the network something else than the "
                f"denoiser's latents (n, {', '.join(map(str, self.shape))})",
                "Give a denoiser of the same resolution, or use GuidanceCallback on the plain pipeline.",
            )
        x_t, progress = sample.float(), step / max(1, steps - 1)
        alpha, sigma = level_of_time(self.levels, torch.as_tensor(told["timestep"]).double().cpu().flatten()[0])
        level = Level(alpha, sigma, step, progress)
        self._x0_hat = denoised_from(self.of.prediction, x_t, prediction.float(), level)
        return x_t, level

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        assert self._call is not None
        assert self._x0_hat is not None
        if len(x_t) != len(self._x0_hat):
            raise RunError(
                f"out of memory with {counted(len(self._x0_hat), 'image')} at once; a pipeline's guider can't split them: "
                "generate fewer at once, or use jacobian='gaussian'"
            )
        if not (torch.is_grad_enabled() and x_t.requires_grad):
            return self._x0_hat
        network, told = self._call
        name, given = next(iter(told.arguments.items()))
        told.arguments[name] = x_t.to(given.dtype)
        answer = network(*told.args, **told.kwargs)
        told.arguments[name] = given
        out = answer[0] if isinstance(answer, tuple) else answer.sample
        return denoised_from(self.of.prediction, x_t, out.to(x_t.dtype), level)

    def condition(self, labels: Any) -> Condition:
        return Condition()

    def decode(self, x0: Tensor) -> Tensor:
        return self.of.decode(x0)

    def preview(self, x0: Tensor, reduce: int = 1) -> Tensor:
        return self.of.preview(x0, reduce)


def level_of_time(levels: Schedule, time: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the level whose `levels.time` is `time`; all float64 of shape ().

    Raises:
        RequestError: If the schedule is neither `VP` nor `Flow`.
    """
    if isinstance(levels, Flow):
        s = time / levels.time_scale
        return 1 - s, s
    if not isinstance(levels, VP):
        problem = "the noise level can't be found from the time that a pipeline gives its network"
        raise RequestError("denoiser", type(levels).__name__, problem, "Use a denoiser made from a diffusers pipeline.")
    low = time.floor().clamp(0, len(levels) - 2).long()
    log_ratio = (levels.sigma / levels.alpha).clamp(max=LARGEST_RATIO).log()
    ratio = torch.lerp(log_ratio[low], log_ratio[low + 1], time - low).exp()
    total = torch.hypot(torch.ones_like(ratio), ratio)
    return 1 / total, ratio / total


def _refuse_terms(terms: Sequence[Guidance]) -> None:
    """Refuses terms that move the sample itself, or change the network's condition: the pipeline controls both."""
    for term in terms:
        if isinstance(term, Potential) and term.pull.rule != "shift":
            problem = "it moves the sample itself, which is hidden inside the pipeline's scheduler"
            remedy = "Use the rule shift, or handful's own samplers."
            raise RequestError("terms", f"{term.name}, rule {term.pull.rule}", problem, remedy)
        if not term.shifts:
            problem = "it changes the network's condition, which the pipeline sets itself"
            raise RequestError("terms", term.name, problem, "Leave it out, or use handful's own samplers.")


def _refuse_scheduler(scheduler: Any) -> None:
    kind, config = type(scheduler).__name__, scheduler.config
    remedy = f"Set pipeline.scheduler to one of: {', '.join(FIRST_ORDER)}; {kind}'s config goes to its from_config."
    if kind not in FIRST_ORDER:
        problem = (
            "it uses several evaluations per step, or draws noise: so after the step the effect of a shift of x0_hat on the "
            "latents is not known"
        )
        raise RequestError("pipeline.scheduler", kind, problem, remedy)
    for name in ("clip_sample", "thresholding", "stochastic_sampling"):
        if config.get(name):
            problem = "with it a step is not linear in x0_hat, or draws noise"
            remedy = f"Switch it off: pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config, {name}=False)."
            raise RequestError(f"pipeline.scheduler.{name}", True, problem, remedy)


def _walked(scheduler: Any) -> Levels:
    """The levels of the latents that a scheduler with its timesteps set walks through; Euler's have alpha = 1."""
    kind = type(scheduler).__name__
    if kind == "DDIMScheduler":
        own: Any = own_path({**scheduler.config, "_class_name": kind})
        return Levels(*own(scheduler.num_inference_steps))
    if kind == "EulerDiscreteScheduler":
        sigma = scheduler.sigmas.double().cpu()
        return Levels(torch.ones_like(sigma), sigma)
    return Levels(*from_flow(scheduler.sigmas))


def _acts(term: Guidance, level: Level) -> bool:
    """Whether a term moves anything at this level, by a direction that it holds too."""
    held = isinstance(term, Potential) and term.pull.hold and term.scale > 0 and term.timing.covers(level)
    return held or term.strength(level) > 0


def _plain(latents: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A pipeline's latents, Flux's packed ones (n, tokens, width) too -> (n, c, h, w), or a `RequestError`."""
    _, height, width = shape
    fits = latents[0].numel() == math.prod(shape) if latents.ndim == 3 else latents.shape[1:] == shape
    if not fits:
        problem = f"the denoiser's latents are (n, {', '.join(map(str, shape))})"
        remedy = "Give denoiser=handful.models.from_pipeline(pipeline, resolution=(height, width))."
        raise RequestError("latents", tuple(latents.shape), problem, remedy)
    return unpacked(latents, height // PATCH, width // PATCH) if latents.ndim == 3 else latents
