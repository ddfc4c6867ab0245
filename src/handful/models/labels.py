"""Class labels and their names: the checks that class-conditional families share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from handful.core.denoiser import Condition, Denoiser, NetworkDenoiser
from handful.errors import RequestError, counted


def set_labels(denoiser: Denoiser, label_count: int, classes: Sequence[str], null_class: int | None) -> None:
    """Tells a denoiser how many labels it takes, what they are called, and which stands for "no class".

    Args:
        label_count: The null class included; 0 where it takes no labels.
        classes: One name a label in the labels' order, without the null class; empty where unknown.
        null_class: None where there is none.

    Raises:
        RequestError: If they do not fit each other.
    """
    if null_class is not None and not 0 <= null_class < label_count:
        problem = f"the model's labels are 0 to {label_count - 1}" if label_count else "the model takes no class labels"
        remedy = "Name the label it was trained on for images without a class, or leave it out."
        raise RequestError("null_class", null_class, problem, remedy)
    known = label_count - (null_class is not None)
    if classes and len(classes) != known:
        remedy = "Give one name per class, in the order of the labels, without the null class."
        raise RequestError("classes", f"{counted(len(classes), 'name')}", f"the model has {counted(known, 'class')}", remedy)
    denoiser.label_count, denoiser.classes, denoiser.null_class = label_count, tuple(classes), null_class


def label_condition(denoiser: NetworkDenoiser, labels: Sequence[int] | Sequence[str] | Tensor) -> Condition:
    """n labels -> their condition; a denoiser without labels accepts and ignores any.

    Raises:
        RequestError: If they are no labels, or not the model's.
    """
    try:
        given = torch.as_tensor(labels, dtype=torch.int64)  # type: ignore[arg-type]  # texts raise, and are refused below
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(
            "labels", labels, "this model takes class labels, not prompts", "Give a whole number for each image."
        ) from error
    if not denoiser.label_count:
        return Condition(None)
    if len(given) and not (int(given.min()) >= 0 and int(given.max()) < denoiser.label_count):
        problem = f"the model's labels are 0 to {denoiser.label_count - 1}"
        raise RequestError("labels", given.unique().tolist(), problem, "Ask for classes that the model was trained on.")
    return Condition(given.to(denoiser.device), denoiser.null_class)
