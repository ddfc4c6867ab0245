"""Exemplars as features alone, in one file that can be shared where the images can't: no pixel is in it.

Guidance by exemplars needs their features and nothing else. A file holds them by view (which extractor saw the images, and at
which 1/reduce of their resolution) and class, in the order of the draw, so that k takes the first k as a draw of k would;
with hashes of the images, and who may use them for what. Features are no images, but not anonymous either: a network can be
trained to guess roughly what an image looked like from the features of a rich extractor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from handful.data.exemplars import Exemplars, exemplar_features
from handful.errors import RequestError, counted, first_line
from handful.features.extractor import FeatureExtractor
from handful.files.atomic import write_atomically
from handful.files.digests import tensors_digest
from handful.files.sealed import seal, unseal
from handful.zoo import EXEMPLARS, exemplars_path

KIND, VERSION = "exemplar features", 1
SUFFIX = ".safetensors"
_REMEDY = "Make it again (handful exemplars DIR --features NAME --out FILE), or give the folder of images."


class View(NamedTuple):
    """What saw the images: an extractor, by its digest, at 1/reduce of their resolution."""

    digest: str
    reduce: int


@dataclass(frozen=True, eq=False)
class ExemplarFeatures:
    """The features of a few real images of each class, without the images.

    Attributes:
        features: By view and class (k, D), float32; of one class k is the same in all views.
        names: By view, what its extractor is called.
        hashes: By class the content hash of each image, as `Exemplars.hashes`.
        shape: (c, h, w) of the images that were seen.
        seed: Of the draw that put them into this order.
        source, licence: Where the images come from, and what may be done with what is made of them; free text.
        made_by: Versions of what computed the features.
    """

    features: dict[View, dict[str, Tensor]]
    names: dict[View, str]
    hashes: dict[str, tuple[str, ...]]
    shape: tuple[int, int, int]
    seed: int = 0
    source: str = ""
    licence: str = ""
    made_by: Mapping[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        exemplars: Exemplars,
        extractors: Sequence[FeatureExtractor],
        reduces: Sequence[int] = (1,),
        *,
        seed: int = 0,
        source: str = "",
        licence: str = "",
    ) -> ExemplarFeatures:
        """Takes the features of images, each extractor at each resolution.

        Args:
            reduces: See `Exemplars.shrunk`.
            source, licence: What to say of the images.

        Raises:
            RequestError: An extractor gives the images themselves, or a resolution does not divide.
            RunError: It gives something else than finite features.
        """
        features, names = {}, {}
        for extractor in extractors:
            if isinstance(extractor.network, nn.Identity):
                problem = "these are the images themselves, which this file must not hold"
                raise RequestError("features", extractor.name, problem, "Use another extractor, or share the folder of images.")
            for reduce in reduces:
                view = View(extractor.digest, reduce)
                features[view] = exemplar_features(exemplars.shrunk(reduce), extractor, None)
                names[view] = _public(extractor.name)
        made_by = {name: version(name) for name in ("handful", "torch")}
        return cls(features, names, dict(exemplars.hashes), exemplars.shape, seed, source, licence, made_by)

    @classmethod
    def load(cls, path: str | Path) -> ExemplarFeatures:
        """Reads what `save` wrote, whole or not at all; no code in it is run.

        Raises:
            RequestError: It is no such file, damaged, cut short, or its parts contradict each other.
        """
        settings, tensors = unseal(path, KIND, VERSION, field="exemplars", remedy=_REMEDY)
        try:
            return cls._from(settings, tensors)
        except (LookupError, TypeError, ValueError) as error:
            told = f"its parts contradict each other ({first_line(error)})"
            raise RequestError("exemplars", Path(path), told, _REMEDY) from error

    @classmethod
    def _from(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExemplarFeatures:
        classes = [str(name) for name in settings["classes"]]
        hashes = {name: tuple(map(str, of_class)) for name, of_class in zip(classes, settings["hashes"], strict=True)}
        if not classes or len(hashes) < len(classes) or not all(hashes.values()):
            raise ValueError("a class is named twice, or has no images")
        channels, height, width = map(int, settings["shape"])
        views = [View(str(each["digest"]), int(each["reduce"])) for each in settings["views"]]
        if not views or len(set(views)) < len(views) or len(tensors) != len(views) * len(classes):
            raise ValueError(
                f"{counted(len(tensors), 'tensor')} for {counted(len(views), 'view')} of {counted(len(classes), 'class')}"
            )
        features: dict[View, dict[str, Tensor]] = {}
        for place, view in enumerate(views):
            features[view] = {name: tensors[_key(place, number)] for number, name in enumerate(classes)}
            dimensions = features[view][classes[0]].shape[-1]
            for name, values in features[view].items():
                wanted = (len(hashes[name]), dimensions)
                if values.dtype != torch.float32 or values.shape != wanted or not bool(values.isfinite().all()):
                    raise ValueError(f"class '{name}' holds {values.dtype} {tuple(values.shape)}, not finite {wanted}")
        return cls(
            features,
            {view: str(each["features"]) for view, each in zip(views, settings["views"], strict=True)},
            hashes,
            (channels, height, width),
            int(settings["seed"]),
            str(settings["source"]),
            str(settings["licence"]),
            dict(settings["made_by"]),
        )

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all; the same contents give the same bytes.

        Raises:
            OSError: It can't be written.
        """
        views, classes = list(self.features), self.classes
        settings = {
            "classes": classes,
            "hashes": [list(self.hashes[name]) for name in classes],
            "views": [{"features": self.names[view], "digest": view.digest, "reduce": view.reduce} for view in views],
            "shape": list(self.shape),
            "seed": self.seed,
            "source": self.source,
            "licence": self.licence,
            "made_by": dict(self.made_by),
        }
        tensors = {
            _key(place, number): self.features[view][name]
            for place, view in enumerate(views)
            for number, name in enumerate(classes)
        }
        write_atomically(Path(path).expanduser(), seal(KIND, VERSION, settings, tensors))

    @property
    def classes(self) -> list[str]:
        """The class names, in order."""
        return list(self.hashes)

    @property
    def counts(self) -> dict[str, int]:
        """How many images each class stands for."""
        return {name: len(of_class) for name, of_class in self.hashes.items()}

    @property
    def images(self) -> dict[str, Tensor]:
        """None: that is the point."""
        return {}

    @property
    def digest(self) -> str:
        """64 hexadecimal digits for classes, images, views and their features, whatever the order of classes and views."""
        flat = {f"{view}/{name}": values for view, of_view in self.features.items() for name, values in of_view.items()}
        told = json.dumps([sorted(self.hashes.items()), self.shape, tensors_digest(flat)])
        return hashlib.sha256(f"{KIND} {told}".encode()).hexdigest()

    def called(self, name: str) -> list[str]:
        """What each image of a class is called: its number in the stored order, from 0."""
        return [str(place) for place in range(len(self.hashes[name]))]

    def select(self, k: int) -> ExemplarFeatures:
        """The first k of each class, as a draw of k with the same seed would be.

        Raises:
            RequestError: A class has fewer.
        """
        fewest = min(self.counts.values())
        if not 1 <= k <= fewest:
            raise RequestError("k", k, f"the smallest class has {counted(fewest, 'exemplar')}", f"Take 1 to {fewest}.")
        features = {view: {name: values[:k] for name, values in found.items()} for view, found in self.features.items()}
        return replace(self, features=features, hashes={name: of_class[:k] for name, of_class in self.hashes.items()})

    def only(self, classes: Sequence[str]) -> ExemplarFeatures:
        """Those of some classes, in the order given."""
        features = {view: {name: found[name] for name in classes} for view, found in self.features.items()}
        return replace(self, features=features, hashes={name: self.hashes[name] for name in classes})

    def seen_only(self, views: Sequence[View]) -> ExemplarFeatures:
        """What some views saw."""
        return replace(self, features={view: self.features[view] for view in views}, names=dict(self.names))

    def seen_by(self, extractor: FeatureExtractor, reduce: int, cache: Path | None = None) -> dict[str, Tensor]:
        """By class the features (k, D) that an extractor gives at 1/reduce of the resolution; `cache` is not needed.

        Raises:
            RequestError: The file does not hold them.
        """
        found = self.features.get(View(extractor.digest, reduce))
        if found is None:
            same = [view for view in self.features if self.names[view] == extractor.name and view.reduce == reduce]
            but = ", but of other weights or preprocessing" if same else ""
            remedy = f"Use what it holds ({self.held()}), or give the folder of images (--exemplars DIR)."
            if " softplus " in extractor.name:
                remedy += " Or make the file with handful exemplars --softplus; or set softplus=null, which uses features "
                "without Softplus."
            problem = f"the exemplars are a file of features, which has no features of this extractor at reduce {reduce}{but}"
            raise RequestError("features", extractor.name, problem, remedy)
        return found

    def notes(self) -> list[str]:
        """What whoever shares the file should know, in words."""
        pixels = self.shape[0] * self.shape[1] * self.shape[2]
        sizes = {view: next(iter(found.values())).shape[1] for view, found in self.features.items()}
        return [
            f"{self.names[view]} at reduce {view.reduce} keeps {size} features for {pixels // view.reduce**2} pixel values: "
            f"the images could perhaps be recovered from them"
            for view, size in sizes.items()
            if size * view.reduce**2 >= pixels
        ]

    def held(self) -> str:
        """What the file holds, in words."""
        return ", ".join(f"{self.names[view]} at reduce {view.reduce}" for view in self.features)


def features_file(given: str | Path) -> Path | None:
    """The file that `exemplars.path` of a recipe means, where it is one of features: FILE.safetensors, or a packaged name."""
    path = Path(given).expanduser()
    if str(given) in EXEMPLARS and not path.exists():
        return exemplars_path(str(given))
    return path if path.suffix == SUFFIX and not path.is_dir() else None


def _key(view: int, number: int) -> str:
    return f"{view}/{number}"


def _public(name: str) -> str:
    """An extractor's name without the folders of whoever made the file."""
    plain, mark, beta = name.partition(" softplus ")  # of a directory's network with Softplus for ReLU
    return (Path(plain).name if Path(plain).exists() else plain) + mark + beta
