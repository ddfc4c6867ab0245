"""diffusers' guiders as terms: those that mix the conditional and the unconditional prediction, and nothing else.

    shift = mix(c, u) - c,   c and u the two predictions in a `space` of denoiser.py's table, then taken back to x0_hat

Among them are classifier-free guidance, APG (Sadat et al. 2024, arXiv 2410.02416), CFG-Zero* (Fan et al. 2025,
arXiv 2503.18886), tangential CFG (Kwon et al. 2025, arXiv 2503.18137), magnitude-aware guidance, and the mix of APG and CFG.
Linear rules give the same in every space, the others don't: APG's paper works on x0, CFG-Zero*'s on a flow's velocity, and
diffusers' pipelines on whatever their network predicts. diffusers' APG is the paper's with `use_original_formulation=True`
and `guidance_scale` the paper's w - 1; by default it adds the projected difference to the unconditional prediction.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, get_args

import torch
from torch import Tensor

from handful.core.denoiser import Prediction, denoised_from, output_from
from handful.errors import RequestError
from handful.guidance.base import Guidance, Step, Timing


class Guider(Guidance):
    """A guider of diffusers as a term.

    The guider given is a pattern: each path of levels begins with a copy of it, so no momentum passes from one cohort to the
    next, and a level that is evaluated twice (Heun) counts once.

    Args:
        guider: A `diffusers.guiders.BaseGuidance` that mixes `pred_cond` and `pred_uncond`.
        scale: Of its shift: 1 is the guider's own strength, 0 no guidance.
        space: What its predictions are: "x0", "eps", "v" or "flow". At the pure-noise start of a flow there is no eps.
        timing: When it acts, instead of the guider's own start and stop.

    Raises:
        RequestError: If the guider needs other predictions or hooks into the network, or has a start or stop of its own.
    """

    name = "guider"

    def __init__(self, guider: Any, scale: float = 1.0, *, space: Prediction = "x0", timing: Timing | None = None) -> None:
        super().__init__(scale, timing)
        if space not in get_args(Prediction):
            raise RequestError(
                "space", space, "no such prediction is known", f"Choose one of: {', '.join(get_args(Prediction))}."
            )
        refuse_unless_mixing(guider)
        for name, whole in (("start", 0.0), ("stop", 1.0)):
            value = guider.config.get(name, whole)
            if any(each != whole for each in (value if isinstance(value, (list, tuple)) else [value])):
                problem = f"{type(guider).__name__} counts in a pipeline's steps, which a term does not know"
                raise RequestError(name, value, problem, f"Leave it at {whole} and pass timing=Timing(interval=(start, stop)).")
        self.guider: Any = guider
        self.space: Prediction = space
        self._now: Any = None
        self._before: Any = None  # as it stood before the level that was evaluated last
        self._index: int | None = None  # that level's

    def begin(self) -> None:
        self._now = None

    def shift(self, step: Step) -> Tensor:
        x_t, level = step.x_t, step.level
        if self.space == "eps" and not bool((level.alpha > 0).all()):
            raise RequestError("space", "eps", "pure noise (alpha = 0) has no eps prediction", 'Use space="flow" or "x0".')
        guider = self._advanced(step)
        conditional = output_from(self.space, x_t, step.x0_hat, level)
        null = output_from(self.space, x_t, step.x0_hat_null, level) if guider.num_conditions > 1 else None
        change = _mixed(guider, conditional, null) - conditional
        # the table is affine in the prediction, so its linear part takes a change of it to the change of x0_hat
        return self.strength(level) * denoised_from(self.space, torch.zeros_like(x_t), change, level)

    def _advanced(self, step: Step) -> Any:
        """The guider at this level; its momentum comes from the levels before."""
        index, time = step.level.index, step.denoiser.levels.time(step.level)
        if self._now is None:
            self._now = deepcopy(self.guider)
            self._now.set_state(step=0, num_inference_steps=None, timestep=time)
            self._now.prepare_inputs({})  # where diffusers' guiders set their momentum up, at step 0 alone
        elif index == self._index:
            self._now = self._before
        self._before, self._index = deepcopy(self._now), index
        self._now.set_state(step=index or 0, num_inference_steps=None, timestep=time)
        return self._now


def _mixed(guider: Any, conditional: Tensor, null: Tensor | None) -> Tensor:
    if (
        type(guider).__name__ == "MagnitudeAwareGuidance"
    ):  # takes torch.norm over all of an image, which is 2 dimensions at most
        flat, flat_null = (None if each is None else each.flatten(1)[..., None] for each in (conditional, null))
        return guider.forward(pred_cond=flat, pred_uncond=flat_null).pred.view_as(conditional)
    return guider.forward(pred_cond=conditional, pred_uncond=null).pred


def refuse_unless_mixing(guider: Any) -> None:
    """Refuses anything but a guider of diffusers that only mixes two predictions."""
    from diffusers.guiders.guider_utils import BaseGuidance

    kind: Any = type(guider)
    if not isinstance(guider, BaseGuidance):
        remedy = "Give one of diffusers.guiders, such as AdaptiveProjectedGuidance()."
        raise RequestError("guider", kind.__name__, "it is not a guider of diffusers", remedy)
    needs: Any = guider._input_predictions
    if needs != ["pred_cond", "pred_uncond"] or kind.prepare_models is not BaseGuidance.prepare_models:
        raise RequestError(
            "guider",
            kind.__name__,
            "it needs more than the conditional and the unconditional prediction "
            f"({', '.join(needs)}{'' if needs[2:] else ', with hooks in the network'})",
            "Use a guider that mixes the two alone, such as ClassifierFreeGuidance or AdaptiveProjectedGuidance.",
        )
