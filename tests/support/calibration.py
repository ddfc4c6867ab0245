"""Small requests for `handful calibrate`: two packaged digits, four steps."""

from __future__ import annotations

from typing import Any

from handful.calibrate import CalibrateRequest
from handful.guidance.classifier import ClassifierRequest
from handful.recipe.schema import recipe_from

GUIDE = ClassifierRequest(classifier="digits-guide")


def asked(
    classifier: ClassifierRequest = GUIDE, betas: Any = (None, 5.0), taus: Any = ((1.0, 1.0), (1.0, 0.5)), **changes: Any
) -> CalibrateRequest:
    """A request of seconds: two digits."""
    recipe = {"model": {"name": "digits"}, "classes": ["1", "4"], "per_class": 4, "sampler": {"steps": 4}}
    return CalibrateRequest(recipe_from(recipe | changes), classifier, betas, taus)
