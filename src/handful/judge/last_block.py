"""A classifier of large images from a pretrained extractor: a linear head, and the extractor's last block trained with it.

All before the last block is frozen, so it runs once per image: what enters the last block is kept, and training starts
there. The block is found by watching one forward pass: of the networks' lists of blocks (a transformer's layers, a ResNet's
stages) the outermost whose last element was run and holds weights. What is kept is checked against the whole network; where
it does not give the same features, the linear head is trained alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from handful.features.extractor import FeatureExtractor
from handful.judge.utility import descend, picked

_AT_ONCE = 32  # images through the whole network


class _Skipped(nn.Module):
    """In the place of a block whose result nobody needs: passes its first argument on, in a tuple where the block did."""

    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, *arguments: Any, **words: Any) -> Any:
        first = arguments[0] if arguments else words["hidden_states"]
        return (first,) if self.in_tuple else first


class LastBlock(nn.Module):
    """The end of an extractor, from its last block on: what enters that block -> features (n, D).

    Attributes:
        block: The last block, the only part with weights that train.
    """

    def __init__(self, extractor: FeatureExtractor, path: str, in_tuple: bool, shape: Sequence[int]) -> None:
        super().__init__()
        self.extractor = copy.deepcopy(extractor).requires_grad_(False).eval()
        self._shape, self._given = tuple(shape), torch.empty(0)
        parent, _, last = path.rpartition(".")
        blocks: Any = self.extractor.network.get_submodule(parent)
        for name, _ in list(blocks.named_children()):
            if name != last:
                setattr(blocks, name, _Skipped(in_tuple))
        self.block = blocks.get_submodule(last).requires_grad_(True)
        self.block.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...], words: dict[str, Any]) -> tuple[Any, Any]:
        if arguments:
            return (self._given, *arguments[1:]), words
        return arguments, {**words, "hidden_states": self._given}

    def forward(self, entering: Tensor) -> Tensor:
        self._given = entering
        return self.extractor(entering.new_zeros(len(entering), *self._shape))


class LastBlockLearner:
    """Trains heads (and last blocks) on an extractor's features.

    Args:
        extractor: Frozen.
        sample: A few images (n, c, h, w) in [-1, 1], to find and check the last block with.

    Attributes:
        path: Where the last block is, in the extractor's network; None: only linear heads are trained.
        bytes_per_image: What `enter` keeps of one.
    """

    def __init__(self, extractor: FeatureExtractor, sample: Tensor) -> None:
        self.extractor, self._shape = extractor, tuple(sample.shape[1:])
        self.path, self._in_tuple = _last_block(extractor, sample)
        if self.path is not None and not self._same(sample):
            self.path = None
        self.bytes_per_image = self.enter(sample[:1])[0].numel() * 2

    def without_block(self) -> LastBlockLearner:
        """The same with linear heads alone."""
        self.path = None
        return self

    @torch.no_grad()
    def enter(self, images: Tensor) -> Tensor:
        """What enters the last block (or the features, where there is none) of images (n, c, h, w): (n, ...), float16."""
        found: list[Tensor] = []
        parts = []
        hook = None
        if self.path is not None:

            def keep(module: nn.Module, arguments: tuple[Any, ...], words: dict[str, Any]) -> None:
                found.append(arguments[0] if arguments else words["hidden_states"])

            hook = self.extractor.network.get_submodule(self.path).register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for part in images.split(_AT_ONCE):
                features = self.extractor(part)
                parts.append((found.pop() if self.path is not None else features).half().cpu())
        finally:
            if hook is not None:
                hook.remove()
        return torch.cat(parts)

    def _same(self, sample: Tensor) -> bool:
        """Whether the last block alone gives the whole network's features, and takes a gradient."""
        try:
            entering = self.enter(sample).float()
            features = LastBlock(self.extractor, self.path or "", self._in_tuple, self._shape)(entering)
            whole = self.extractor(sample)
        except Exception:  # a network of the user's own, put together in another way
            return False
        near = float((features.detach() - whole).norm()) <= 0.02 * float(whole.norm())  # entering was rounded to float16
        return features.requires_grad and features.shape == whole.shape and near

    def train(
        self,
        entered: Tensor,
        labels: Tensor,
        classes: int,
        *,
        steps: int,
        seed: int,
        weights: Tensor | None = None,
        batch: int = 64,
        rate: float = 3e-3,
        block_rate: float = 1e-4,
        stepped: Callable[[], None] | None = None,
    ) -> nn.Module:
        """A network from what `enter` gives to logits (n, classes).

        Args:
            entered: (n, views, ...): views of each image, one of which is drawn at each step.
            labels: int64 (n,).
            classes, steps, seed, weights, batch, rate, stepped: As for `handful.judge.utility.train_classifier`.
            block_rate: Highest learning rate of the last block.
        """
        draw = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tail: nn.Module = nn.Identity()
            if self.path is not None:
                tail = LastBlock(self.extractor, self.path, self._in_tuple, self._shape)
            dimensions = tail(entered[:1, 0].float()).shape[1]
            head = nn.Sequential(nn.BatchNorm1d(dimensions, affine=False), nn.Linear(dimensions, classes))
            groups = [{"params": list(head.parameters()), "lr": rate}]
            if isinstance(tail, LastBlock):
                groups.append({"params": list(tail.block.parameters()), "lr": block_rate})
            head.train()

            def loss() -> Tensor:
                pick = picked(len(entered), batch, draw, weights)
                view = torch.randint(entered.shape[1], (batch,), generator=draw)
                return cross_entropy(head(tail(entered[pick, view].float())), labels[pick], label_smoothing=0.05)

            descend(loss, groups, steps, stepped)
        return nn.Sequential(tail, head).eval()


def _last_block(extractor: FeatureExtractor, sample: Tensor) -> tuple[str | None, bool]:
    """Where the last block is, and whether blocks answer with tuples."""
    lists = (nn.ModuleList, nn.Sequential)
    found: dict[str, tuple[int, bool]] = {}
    hooks = []
    for name, module in extractor.network.named_modules():
        children = list(module.named_children()) if isinstance(module, lists) else []
        if len(children) < 2 or not any(True for _ in children[-1][1].parameters()):
            continue
        path = f"{name}.{children[-1][0]}" if name else children[-1][0]

        def note(module: nn.Module, arguments: Any, answer: Any, path: str = path) -> None:
            found[path] = (path.count("."), isinstance(answer, tuple))

        hooks.append(children[-1][1].register_forward_hook(note))
    try:
        with torch.no_grad():
            extractor(sample[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return None, False
    path = min(reversed(list(found)), key=lambda each: found[each][0])
    return path, found[path][1]
