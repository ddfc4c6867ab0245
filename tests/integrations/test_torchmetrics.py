"""handful's metrics inside torchmetrics' loops: batch by batch the same numbers as at once."""

from __future__ import annotations

import pytest
import torch
from torchmetrics import MetricCollection

from handful.errors import RequestError
from handful.features.registry import load_extractor
from handful.integrations.torchmetrics import SetMetric
from handful.metrics import frechet, kernel_distance, prdc


def test_batches_give_what_the_whole_sets_give_and_reset_forgets():
    draw = torch.Generator().manual_seed(0)
    real, made = (torch.rand(40, 1, 8, 8, generator=draw) * 2 - 1 for _ in range(2))
    extractor = load_extractor("digits-judge")
    metrics = MetricCollection({name: SetMetric(name, extractor, neighbours=3) for name in ("coverage", "frechet")})
    for is_real, images in ((True, real), (False, made)):
        for batch in images.split(16):
            metrics.update(batch, real=is_real)
    features = [extractor(images).numpy() for images in (real, made)]
    found = metrics.compute()
    assert float(found["coverage"]) == prdc(*features, k=3).coverage
    assert float(found["frechet"]) == pytest.approx(frechet(*features), rel=1e-6)
    metrics.reset()
    with pytest.raises(RequestError, match=r"^real: 0: no such images were added"):
        metrics["coverage"].compute()


def test_features_may_be_passed_and_what_is_no_metric_of_features_is_refused():
    metric = SetMetric("kernel_distance")
    real, made = torch.randn(30, 5), torch.randn(20, 5)
    metric.update(real, real=True)
    metric.update(made, real=False)
    assert float(metric.compute()) == kernel_distance(real, made)
    assert metric.higher_is_better is False
    for name in ("coverge", "judge_accuracy"):
        with pytest.raises(RequestError, match=r"^name: "):
            SetMetric(name)
