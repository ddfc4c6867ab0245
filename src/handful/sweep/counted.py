"""What the sets of a sweep cost in operations, counted before anything runs (`handful.cost.estimate`)."""

from __future__ import annotations

from handful.cost.estimate import Cost, cost_of
from handful.errors import HandfulError
from handful.recipe.schema import Recipe
from handful.sweep.planned import PlannedSet
from handful.sweep.request import SweepRequest


class Operations:
    """Counts each kind of set once: methods and k differ in cost, scales above 0 and seeds do not.

    Args:
        request: From `handful.sweep.planned.completed`.
    """

    def __init__(self, request: SweepRequest) -> None:
        self._common = request.recipe
        self._counted: dict[tuple[str, int, bool], Cost | None] = {}
        self._plain: list[Cost | None] = []  # of the sweep's own sampler, once it is known

    def per_image(self, planned: PlannedSet) -> float | None:
        """Floating-point operations of one image; None where they can't be counted."""
        cost = self._of(planned)
        return cost and cost.recipe.flops_per_image

    def ratio(self, planned: PlannedSet) -> float | None:
        """The same over those of plain sampling by the sweep's own sampler."""
        cost = self._of(planned)
        if not self._plain:
            same = planned.recipe.sampler == self._common.sampler
            self._plain.append(cost if same else _counted(self._common))
        plain = self._plain[0]
        return cost.recipe.flops_per_image / plain.plain.flops_per_image if cost and plain else None

    def _of(self, planned: PlannedSet) -> Cost | None:
        setting = planned.setting
        key = (setting.method, setting.k, setting.scale > 0)
        if key not in self._counted:
            self._counted[key] = _counted(planned.recipe)
        return self._counted[key]


def _counted(recipe: Recipe) -> Cost | None:
    try:
        return cost_of(recipe)
    except HandfulError:  # a model or an extractor without configs; the set itself may well run
        return None
