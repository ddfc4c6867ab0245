"""handful's metrics as torchmetrics `Metric`s, for loops that people have already: update, compute, reset, over processes too.

metric = SetMetric("coverage", extractor, neighbours=5)
metric.update(real_images, real=True)
metric.update(generated_images, real=False)
metric.compute()
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from handful.errors import RequestError, did_you_mean
from handful.metrics import catalogue
from handful.metrics.reference import Reference, Sets


class SetMetric(Metric):
    """A metric of the one table (`metrics/catalogue.py`) of two sets of images or features.

    Args:
        name: Such as precision, recall, density, coverage, f1, frechet, vendi, kernel_distance, frechet_infinity, authenticity,
            cmmd.
        extractor: Turns images (n, c, h, w) in [-1, 1] into features (n, D), as `handful.features.load_extractor` gives; None:
            what is passed to `update` are features.
        neighbours: k of precision, recall, density and coverage.
        others: Of torchmetrics' `Metric`.

    Raises:
        RequestError: There is no such metric, or it is not one of features.
    """

    is_differentiable = False
    full_state_update = False
    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self, name: str, extractor: nn.Module | None = None, *, neighbours: int = 5, **others: Any) -> None:
        super().__init__(**others)
        known = [metric.name for metric in catalogue.METRICS if metric.name not in catalogue.PER_IMAGE]
        if name not in known:
            raise RequestError("name", name, "there is no such metric of features", did_you_mean(name, known, "Metrics"))
        self.metric = next(metric for metric in catalogue.METRICS if metric.name == name)
        self.extractor, self.neighbours = extractor, neighbours
        for state in ("real", "generated"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    @property
    def higher_is_better(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Which direction is better."""
        return not self.metric.lower_is_better

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Adds a batch, real or generated: images, or features (n, D) where there is no extractor."""
        features = images if self.extractor is None else self.extractor(images)
        (self.real if real else self.generated).append(features.detach().float())

    def compute(self) -> Tensor:
        """The value of all that was added, as a scalar.

        Raises:
            RequestError: A set is empty, or too small for the metric.
        """
        for name, held in (("real", self.real), ("generated", self.generated)):
            if len(held) == 0:
                raise RequestError(name, 0, "no such images were added", f"Call update(..., real={name == 'real'}) first.")
        real, generated = (dim_zero_cat(held) for held in (self.real, self.generated))
        value = self.metric.measure(Sets(Reference(real, self.neighbours), generated))
        return torch.tensor(float("nan") if value is None else value, dtype=torch.float64)
