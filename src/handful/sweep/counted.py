"""What the sets of a sweep cost in operations, counted before anything runs (`handful.cost.estimate`)."""

from __future__ import annotations

from functools import cached_property

from handful.cost.estimate import from_noise, outline
from handful.cost.workload import Way
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
        self._counted: dict[tuple[str, int, bool], Way | None] = {}

    def per_image(self, planned: PlannedSet) -> float | None:
        """Floating-point operations of one image; None where they can't be counted."""
        setting = planned.setting
        key = (setting.method, setting.k, setting.scale > 0)
        if key not in self._counted:
            self._counted[key] = _counted(planned.recipe)
        way = self._counted[key]
        return way and way.flops_per_image

    def ratio(self, planned: PlannedSet) -> float | None:
        """The same over those of plain sampling by the sweep's own sampler."""
        flops = self.per_image(planned)
        return flops / self._plain.flops_per_image if flops and self._plain else None

    @cached_property
    def _plain(self) -> Way | None:
        return _counted(from_noise(self._common))


def _counted(recipe: Recipe) -> Way | None:
    try:
        outlined = outline(recipe)
        return outlined.way(outlined.recipe.guidance or ())
    except HandfulError:  # a model or an extractor without configs; the set itself may well run
        return None
