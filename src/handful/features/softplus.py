"""Softplus in place of every ReLU: EluCD's pre-conditioning of a classifier that guides (arXiv 2310.11311, section 4).

    ReLU(x)  becomes  s(x) = log(1 + exp(beta x)) / beta        ReLU6(x)  becomes  s(x) - s(x - 6)

The classifier's code stays unchanged: a mode of torch that is active while the classifier runs takes its calls of relu and
relu6, by whatever name (torch's functions, a tensor's methods, torch.nn.functional's, modules'), and nothing else. Clamps
(`x.clamp_min(0)`, `x.clamp(0, 6)`) and the ReLU inside other activations (hardswish) are left alone: there the same call
may mean something else than an activation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor

_library: Any = torch._C
_native = _library._nn
_RELU = (torch.relu, torch.Tensor.relu, functional.relu)
_RELU_IN_PLACE = (torch.relu_, torch.Tensor.relu_, functional.relu_)
_RELU6 = (functional.relu6, _native.relu6)
_RELU6_IN_PLACE = (_native.relu6_,)
_HARDTANH = (functional.hardtanh, _native.hardtanh)
_HARDTANH_IN_PLACE = (functional.hardtanh_, _native.hardtanh_)

# Beyond it Softplus is ReLU in every precision, and beta x would overflow to inf, at x = 0 to NaN.
_LARGEST = 1e30
_SIDES = (32, 64, 224, 8)  # of the trial's image, where an extractor does not say which it takes


def softened(extractor: FeatureExtractor, beta: float) -> FeatureExtractor:
    """The same extractor with Softplus(beta) in place of every ReLU. Both share one network.

    Args:
        extractor: Any whose network calls relu from Python; its code and weights are not changed.
        beta: How sharp; EluCD took 3 and 5. Large ones give the extractor itself.

    Raises:
        RequestError: If beta is no finite positive number, the network is a TorchScript program (what that calls is not
            seen), or a trial on one gray image meets no ReLU. An extractor that no trial image suits is not refused.
    """
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not (math.isfinite(beta) and beta > 0):
        raise RequestError(
            "softplus", beta, "beta is a finite number above 0", "EluCD uses 3 and 5; leave softplus out to keep ReLU."
        )
    if any(isinstance(part, torch.jit.ScriptModule) for part in extractor.modules()):
        problem = f"'{extractor.name}' is a TorchScript program, whose ReLUs can't be replaced"
        remedy = "Leave softplus out, or give the network as a torch module (FILE.py:FUNCTION)."
        raise RequestError("softplus", beta, problem, remedy)
    made = _Softened(extractor, beta)
    if made.met() == 0:
        raise RequestError(
            "softplus", beta, f"'{extractor.name}' calls no ReLU that Softplus could replace", "Leave softplus out."
        )
    return made


class Softplus(TorchFunctionMode):
    """While it is active, every ReLU is a Softplus.

    Attributes:
        replaced: How many calls it has replaced.
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta, self.replaced = min(float(beta), _LARGEST), 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        smooth, in_place = self._instead(func, args, kwargs := kwargs or {})
        if smooth is None:
            return func(*args, **kwargs)
        self.replaced += 1
        x: Tensor = args[0] if args else kwargs["input"]
        # Some code goes on with x itself after a call in place. The clone is what the gradient needs.
        return x.copy_(smooth(x.clone())) if in_place else smooth(x)

    def _instead(
        self, func: Any, args: tuple[Any, ...], told: dict[str, Any]
    ) -> tuple[Callable[[Tensor], Tensor] | None, bool]:
        """What to call instead, None for the function itself; and whether its result replaces x."""
        if func in _RELU or func in _RELU_IN_PLACE:
            return self._relu, func in _RELU_IN_PLACE or _said(args, told, 1, "inplace", False)
        if func in _RELU6 or func in _RELU6_IN_PLACE:
            return self._relu6, func in _RELU6_IN_PLACE or _said(args, told, 1, "inplace", False)
        if func in _HARDTANH or func in _HARDTANH_IN_PLACE:
            ends = _said(args, told, 1, "min_val", -1.0), _said(args, told, 2, "max_val", 1.0)
            if ends == (0, 6):  # torch's ReLU6 module is this
                return self._relu6, func in _HARDTANH_IN_PLACE or _said(args, told, 3, "inplace", False)
        return None, False

    def _relu(self, x: Tensor) -> Tensor:
        return functional.softplus(x, self.beta)

    def _relu6(self, x: Tensor) -> Tensor:
        """s(x) - s(x - 6) = 6 + s(-x) - s(6 - x), taken where no large numbers are subtracted."""
        return torch.where(x > 3, 6 + self._relu(-x) - self._relu(6 - x), self._relu(x) - self._relu(x - 6))


def _said(args: tuple[Any, ...], told: dict[str, Any], place: int, name: str, otherwise: Any) -> Any:
    """An argument of a call, by place or by name."""
    return args[place] if len(args) > place else told.get(name, otherwise)


class _Softened(FeatureExtractor):
    """An extractor that is asked while `Softplus` is active."""

    def __init__(self, plain: FeatureExtractor, beta: float) -> None:
        super().__init__(
            f"{plain.name} softplus {beta:g}",
            plain.network,
            channels=plain.channels,
            size=plain.size,
            mean=plain.mean,
            std=plain.std,
            classes=plain.classes,
        )
        self.plain, self.beta = plain, beta
        told = f"{plain.digest} softplus {float(beta)!r}"
        self.digest = plain.digest and hashlib.sha256(told.encode()).hexdigest()

    def prepare(self, images: Tensor) -> Tensor:
        return self.plain.prepare(images)

    def forward(self, images: Tensor) -> Tensor:
        with Softplus(self.beta):
            return self.plain(images)

    @property
    def is_classifier(self) -> bool:
        return self.plain.is_classifier

    def logits(self, images: Tensor) -> Tensor:
        with Softplus(self.beta):
            return self.plain.logits(images)

    @torch.no_grad()
    def met(self) -> int | None:
        """How many ReLUs one gray image meets; None where none of the sizes tried suits the network."""
        device = next(self.plain.parameters(), torch.zeros(())).device
        ask = self.plain.logits if self.is_classifier else self.plain
        sizes = [self.size] if self.size else [(side, side) for side in _SIDES]
        for channels in (self.channels,) if self.channels else (3, 1):
            for size in sizes:
                try:
                    with Softplus(self.beta) as mode:
                        ask(torch.zeros(1, channels, *size, device=device))
                except Exception:  # whatever a network raises that takes other images
                    continue
                return mode.replaced
        return None
