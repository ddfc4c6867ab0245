"""What `handful utility` trains: a small network from scratch on small images, the end of a pretrained one on large images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from handful.data.augmentation import random_view
from handful.data.sources import LabelledFiles
from handful.features.registry import load_extractor
from handful.judge.last_block import LastBlockLearner
from handful.judge.utility import train_classifier
from handful.judge.viewer import loaded_again
from handful.runs.processes import Processes

_KEPT_BYTES = 2 * 2**30  # of what enters the last block, of all sets together
_VIEWS = 4  # of each image, where features are kept

# What is done to each training image; which of them suits is chosen on the exemplars.
AUGMENTATIONS: dict[str, bool | Callable[[Tensor, torch.Generator], Tensor]] = {
    "shift": True,
    "crop": partial(random_view, area=0.5, jitter=0.3, gray=0.0, mirrored=False),
    "crop, mirror, colours": partial(random_view, area=0.3),
}


class FromScratch:
    """Small images: a small convolutional network, trained on the images themselves."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size, self.device = size, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.name = f"a small convolutional network, from scratch, on {size[0]} x {size[1]} pixels"
        self.choices = list(AUGMENTATIONS)

    def read(self, files: LabelledFiles, field: str, augmented: bool) -> Tensor:
        return files.read(channels=3, size=self.size, field=field).images.to(self.device)

    def train(self, images: Tensor, labels: Tensor, classes: int, choice: str, **options: Any) -> nn.Module:
        return train_classifier(images, labels.to(self.device), classes, augment=AUGMENTATIONS[choice], groups=8, **options)

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([network(part).cpu() for part in images.split(512)])


class Pretrained:
    """Large images: a linear head and the last block of an extractor; views of each image are kept as features."""

    def __init__(self, name: str, size: tuple[int, int], images: int, workers: int, note: Callable[[str], None]) -> None:
        extractor = load_extractor(name)
        self.size = extractor.size or size
        self.learner = LastBlockLearner(extractor, _sample(self.size))
        self.views = min(_VIEWS, _KEPT_BYTES // (self.learner.bytes_per_image * images))
        if self.views < 2 and self.learner.path:  # with one view there is nothing to augment by
            self.learner = self.learner.without_block()
            self.views = _VIEWS
        self.name = f"a linear head{' and the last block' if self.learner.path else ''} of {name}"
        self.choices = ["1 view", f"{self.views} views"]
        self.processes = Processes(workers, _loaded, name, extractor.digest, self.size, self.learner.path, note=note)

    @torch.no_grad()
    def read(self, files: LabelledFiles, field: str, augmented: bool) -> Tensor:
        count = self.views if augmented else 1

        def views() -> Iterator[Any]:
            draw = torch.Generator().manual_seed(0)
            for first in range(0, len(files), 32):
                some = files.only(range(first, min(first + 32, len(files))))
                images = some.read(channels=3, size=self.size, field=field).images
                yield images.numpy()
                for _ in range(count - 1):
                    yield random_view(images, draw, area=0.3).numpy()

        found = [torch.from_numpy(each) for each in self.processes.map(_entered, views(), self.learner)]
        return torch.cat([torch.stack(found[at : at + count], 1) for at in range(0, len(found), count)])

    def train(self, entered: Tensor, labels: Tensor, classes: int, choice: str, **options: Any) -> nn.Module:
        return self.learner.train(entered[:, : int(choice.split()[0])], labels, classes, **options)

    def logits(self, network: nn.Module, entered: Tensor) -> Tensor:
        return torch.cat([network(part[:, 0].float()) for part in entered.split(64)])


def _sample(size: tuple[int, int]) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


def _loaded(name: str, digest: str, size: tuple[int, int], path: str | None) -> LastBlockLearner:
    """The learner of a process that computes features for `Pretrained`."""
    learner = LastBlockLearner(loaded_again(name, digest, "features"), _sample(size))
    return learner if path else learner.without_block()


def _entered(learner: LastBlockLearner, images: Any) -> Any:
    return learner.enter(torch.from_numpy(images)).numpy()


Learner = FromScratch | Pretrained
