"""Adaptive projected guidance (APG; Sadat et al. 2024, arXiv 2410.02416), by diffusers' own guider.

Of the running sum of differences of the conditional estimate c and the null estimate u,

    d <- (c - u) + momentum * d,    bounded to the norm,

the part across c is added, and a share of the part along it, which saturates colours: scale (across + parallel * along).
With parallel 1, momentum 0 and no norm it is classifier-free guidance.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from handful.guidance.base import Timing
from handful.guidance.guiders import Guider
from handful.guidance.method import Context, TermRequest


class APGRequest(TermRequest):
    """Adaptive projected guidance.

    Attributes:
        parallel: eta, the share of the part of the difference that is parallel to the estimate.
        momentum: beta; negative.
        norm: r, the largest Euclidean norm of an image's difference; None does not limit it.
    """

    needs = frozenset({"null condition"})

    method: Literal["apg"] = "apg"
    parallel: Annotated[float, Field(ge=0, le=1)] = 0.0
    momentum: Annotated[float, Field(gt=-1, le=0)] = -0.5
    norm: Annotated[float, Field(gt=0)] | None = None

    def build(self, context: Context) -> Guider:
        return adaptive_projected(
            self.scale, parallel=self.parallel, momentum=self.momentum, norm=self.norm, timing=self.timing()
        )


def adaptive_projected(
    scale: float, *, parallel: float = 0.0, momentum: float = -0.5, norm: float | None = None, timing: Timing | None = None
) -> Guider:
    """Adaptive projected guidance (APG; Sadat et al. 2024, arXiv 2410.02416) by diffusers' guider, as its paper has it.

    Args:
        scale: The paper's w - 1, as CFG's here: 0 is no guidance.
        timing: When it acts; the sum goes on from one of its steps to the next.

    Raises:
        RequestError: If a setting is out of its range.
    """
    asked = APGRequest(parallel=parallel, momentum=momentum, norm=norm)
    from diffusers.guiders.adaptive_projected_guidance import AdaptiveProjectedGuidance

    # linear in its own scale, which is left at 1, so that gain and scale 0 mean what they mean for every term
    guider = AdaptiveProjectedGuidance(
        guidance_scale=1.0,
        adaptive_projected_guidance_momentum=asked.momentum,
        adaptive_projected_guidance_rescale=asked.norm or 0.0,
        eta=asked.parallel,
        use_original_formulation=True,
    )
    return Guider(guider, scale, timing=timing)
