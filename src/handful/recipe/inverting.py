"""What guidance by inversion (CRDI) decides in a run: its path, its start, and the model's condition.

Embeddings hold for the model, the levels, the clamp and the condition that they were fitted with and for no others, so a
recipe takes these from their file, and what it says to the contrary is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from handful.core.denoiser import Denoiser
from handful.core.noise import Levels
from handful.errors import RequestError
from handful.guidance.embeddings import FIT_AGAIN, Embeddings
from handful.guidance.inversion import noised_start, own_targets
from handful.guidance.method import Requests, named
from handful.recipe.schema import Recipe

_KEY = "told"  # the key of `Embeddings.fitted`


@dataclass(frozen=True)
class FittedWith:
    """How the model was called at the fit, and so must be at sampling. The defaults are those of `fit`.

    Attributes:
        label, prompt: The condition of every target; both None for an unconditional model.
        null_class: The label for "no class" then; None where there was none.
        clamp: Whether its estimate was kept inside [-1, 1].
        spacing: The name of the path's spacing; None for levels of the caller's own.
    """

    label: int | None = None
    prompt: str | None = None
    null_class: int | None = None
    clamp: bool = False
    spacing: str | None = None

    @classmethod
    def of(cls, embeddings: Embeddings) -> FittedWith:
        """What `as_fitted_entry` put there; the defaults where the library's user did not."""
        return cls(**embeddings.fitted.get(_KEY, {}))

    def as_fitted_entry(self) -> Mapping[str, Any]:
        """An entry for `Embeddings.fitted`."""
        return {_KEY: asdict(self)}


@dataclass(frozen=True, eq=False)
class Inverted:
    """What a recipe's inversion term reads from its file.

    Attributes:
        sha256: Of their file.
        fitted: How the model was called at the fit.
    """

    index: int
    embeddings: Embeddings
    sha256: str
    fitted: FittedWith

    @cached_property
    def levels(self) -> Levels:
        """The path from the interval's top, where the noised targets stand."""
        return self.embeddings.levels.last(self.embeddings.interval[1])

    def start(self, seeds: Sequence[int], noise: Tensor) -> Tensor:
        """The states (n, c, h, w) that images start from: each its own target, chosen by its seed, with noise (n, c, h, w)."""
        own, hi = own_targets(seeds, len(self.embeddings)), self.embeddings.interval[1]
        return noised_start(self.embeddings.x0, own, noise, self.embeddings.levels, hi)[0]

    def check(self, denoiser: Denoiser, digest: str | None = None) -> None:
        """Refuses another model than the one of the fit.

        Args:
            digest: Of its weights; None where they are not read yet.
        """
        with named(self.index):
            self.embeddings.check(denoiser.shape, self.embeddings.model if digest is None else digest)


def read_inversion(guidance: Requests) -> Inverted | None:
    """Reads what the recipe's inversion term names; None where there is no such term.

    Raises:
        RequestError: If there are two, or the file is missing, damaged, or something else.
    """
    found = [(index, path) for index, term in enumerate(guidance) if (path := term.embeddings_file)]
    if not found:
        return None
    if len(found) > 1:
        problem = "an image can start only from the targets of one inversion"
        raise RequestError(f"guidance[{found[1][0]}]", guidance[found[1][0]].method, problem, "Keep one of these terms.")
    index, path = found[0]
    with named(index):
        embeddings = Embeddings.load(path)
        return Inverted(index, embeddings, hashlib.sha256(path.read_bytes()).hexdigest(), FittedWith.of(embeddings))


def as_fitted(recipe: Recipe, inverted: Inverted) -> Recipe:
    """The recipe with the sampler of the fit: its steps, spacing and clamp, and ddim where none is named.

    Raises:
        RequestError: If the recipe states others.
    """
    sampler, was = recipe.sampler, inverted.fitted
    update = {"steps": inverted.embeddings.levels.steps, "spacing": was.spacing, "clamp": was.clamp}
    for name, fitted in update.items():
        given = getattr(sampler, name)
        if name in sampler.model_fields_set and given is not None and given != fitted:
            shown = "levels without a name" if fitted is None else f"{name} {str(fitted).lower()}"
            raise RequestError(
                f"sampler.{name}", given, f"the embeddings were fitted with {shown}", f"Leave it out. {FIT_AGAIN}"
            )
    if "name" not in sampler.model_fields_set:
        update["name"] = "ddim"
    return recipe.model_copy(update={"sampler": sampler.model_copy(update=update)})
