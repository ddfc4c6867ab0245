"""Counting what tensors cost, without numbers: floating-point operations and live bytes of whatever runs under a `Count`.

On the meta device shapes are computed and nothing else, so a network of any size is counted in about a second, without its
weights. The formulas are torch's own (`torch.utils.flop_counter`): matrix products, convolutions and attention, one
multiply-add being 2 operations; all else is left out. Its `FlopCounterMode` itself can't follow `torch.autograd.grad`.

Attention is counted as the fused kernels compute it, also where the meta device would take it apart: the scores are never
stored, so that the backward pass computes them again (2.5 times the forward pass).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_backward_flop_count, sdpa_flop, sdpa_flop_count

_aten: Any = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # the CPU's fused attention, for which torch has none
    _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
OTHER = "other"  # the part of what belongs to no part
# On the meta device most operations run as Python, and networks repeat a few: what one gave for arguments of these shapes.
_SEEN: dict[Any, tuple[Any, int]] = {}


class Count(TorchDispatchMode):
    """Counts what runs inside `with count:`.

    Attributes:
        flops: Floating-point operations by part; see `part`.
        live: Bytes of the tensors made inside that are still held.
        peaks: The most that `live` has been, by part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.live = 0
        self.peaks: dict[str, int] = {}
        self._part = OTHER
        self._known: set[int] = set()
        self._modes = ExitStack()

    def __enter__(self) -> Count:
        self._modes.enter_context(_OnMeta(self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._modes.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = func, _shapes(args), _shapes(tuple(kwargs.items()))
        try:
            like, flops = _SEEN.get(key, (None, 0))
        except TypeError:  # an argument that has no hash
            key = like = None
        if like is None:
            out = func(*args, **kwargs)
            formula = FORMULAS.get(func._overloadpacket)
            flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
            given = {_storage(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
            made = [each for each in tree_leaves(out) if each is not None]
            new = [each for each in made if isinstance(each, Tensor) and _storage(each) not in given]  # others are views
            if key and new and len(new) == len(made) == len({_storage(each) for each in new}) and all(x.is_meta for x in new):
                _SEEN[key] = tree_map(_Like.of, out), flops
        else:
            out = tree_map(_Like.make, like)
            new = [each for each in tree_leaves(out) if each is not None]
        if flops:
            self.add(flops)
        for each in new:
            self._hold(each)
        return out

    @property
    def total(self) -> int:
        """Floating-point operations of all parts."""
        return self.flops.total()

    @property
    def peak(self) -> int:
        """The most that `live` has been."""
        return max(self.peaks.values(), default=0)

    def add(self, flops: int) -> None:
        """Counts operations for the part that is running."""
        self.flops[self._part] += flops

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside counts as this part."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def through(self, name: str, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`call(x)`, counted as the parts `name` and, whenever a gradient comes back through it, `name backward`."""
        with self.part(name):
            inside = _Mark.apply(x, self, OTHER) if _differentiated(x) else x
            out: Any = call(inside)  # type: ignore[arg-type]
            return _Mark.apply(out, self, f"{name} backward") if _differentiated(out) else out  # type: ignore[return-value]

    def _hold(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        key = _storage(made)
        if key not in self._known:
            self._known.add(key)
            self.live += storage.nbytes()
            self.peaks[self._part] = max(self.peaks.get(self._part, 0), self.live)
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Like:
    """The form of a tensor of its own memory on the meta device."""

    def __init__(self, size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> None:
        self.size, self.stride, self.dtype = size, stride, dtype

    @classmethod
    def of(cls, tensor: Tensor | None) -> _Like | None:
        return tensor if tensor is None else cls(tensor.shape, tensor.stride(), tensor.dtype)

    @staticmethod
    def make(like: _Like | None) -> Tensor | None:
        return like and torch.empty_strided(like.size, like.stride, dtype=like.dtype, device="meta")


def _shapes(given: Any) -> Any:
    """Arguments with the form of each tensor in its place; a list becomes a tuple."""
    if isinstance(given, Tensor):
        return given.shape, given.stride(), given.dtype, given.device
    return tuple(map(_shapes, given)) if isinstance(given, list | tuple) else (type(given), given)


class _OnMeta(TorchFunctionMode):
    """What differs on the meta device: attention is one kernel, and a question that only numbers could answer is said yes."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True  # `if not gradient.isfinite().all()`
        if func is torch.nn.functional.scaled_dot_product_attention:
            given: dict[str, Any] = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            q, k, v = given["query"], given["key"], given["value"]
            if q.is_meta and q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]:
                return _FusedAttention.apply(q, k, v, self.count)
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Attention of shapes alone: (n, heads, queries, d), (n, heads, keys, d), (n, heads, keys, e) -> (n, heads, queries, e)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, count: Count) -> Tensor:
        count.add(sdpa_flop_count(q.shape, k.shape, v.shape))
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        ctx.count = count
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, _ = ctx.saved_tensors
        ctx.count.add(sdpa_backward_flop_count(gradients[0].shape, q.shape, k.shape, v.shape))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class _Mark(torch.autograd.Function):
    """The identity; when a gradient passes back through it, another part begins."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: Count, part: str) -> Tensor:
        ctx.count, ctx.part = count, part
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.count._part = ctx.part
        return gradients[0], None, None


def _differentiated(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
