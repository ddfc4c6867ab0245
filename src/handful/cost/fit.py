"""`--fit 24GB`: how to run a recipe so that its predicted peak memory fits: chunk, slices, tiles and offload, in this order.

None of them changes what is asked for (`handful.runs.comparison.HOW`): at most the last bits of the images, and with tiles
what lies at their edges. What the recipe states itself stays. What is predicted is affine in the images at once and in the
cohort, so five small counts give that of every chunk; a test compares them with the whole count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from handful.cost.estimate import Outlined, outline
from handful.cost.peak import peak_of
from handful.cost.workload import AT_ONCE, ENCODING, Live
from handful.errors import RequestError
from handful.guidance.method import potentials, views
from handful.models.latent import LatentDenoiser
from handful.recipe.schema import ModelRequest, Recipe

UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
# What is beyond the prediction: the allocator's gaps and kernels' workspace, a share of it; and what CUDA's context or, on
# the CPU, Python and its libraries take. glibc keeps larger gaps than CUDA's allocator (benchmarks/memory.py).
GAPS, GAPS_CPU = 1.1, 1.4
OWN = 0.7e9


@dataclass(frozen=True)
class Way:
    """One way to run a recipe: the fields of the same names."""

    chunk: int | None
    vae_slicing: bool = False
    vae_tiling: bool = False
    offload: str = "none"

    def as_text(self) -> str:
        words = [f"chunk {self.chunk}" if self.chunk else "the whole cohort at once"]
        words += [name for name in ("vae_slicing", "vae_tiling") if getattr(self, name)]
        return ", ".join(words + ([] if self.offload == "none" else [f"offload {self.offload}"]))


def parse_bytes(text: str) -> float:
    """ "24GB", "800 MB", "16GiB" -> bytes.

    Raises:
        RequestError: If it is no amount of memory.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if found is None or not float(found[1]) or found[2] not in UNITS or found[2] == "":
        raise RequestError("--fit", text, "this is not an amount of memory", "Write a number and GB, such as --fit 24GB.")
    return float(found[1]) * UNITS[found[2]]


def fitted(recipe: Recipe, limit: str, device: str | None = None, sharing: int = 1) -> tuple[Recipe, list[str]]:
    """The recipe with chunk, slices, tiles and offload chosen so that it fits; and what was chosen and why, in words.

    Args:
        recipe: What is asked for; a mixture's settings all have to fit.
        limit: Such as "24GB".
        sharing: Processes that share the memory: each gets its part.
        device: Where it will run, such as "cpu"; None takes the recipe's, and "auto" for an accelerator.

    Raises:
        RequestError: If nothing fits, naming the smallest that would; or as `cost_of`.
    """
    device = device or recipe.model.device
    on_cpu = device.startswith("cpu")
    placed = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": "cpu" if on_cpu else "cuda"})})
    each = f", a {sharing}th of {limit} for each process" if sharing > 1 else ""
    return chosen([Settings(outline(part)) for part in placed.parts], recipe, parse_bytes(limit) / sharing, on_cpu, each)


def chosen(parts: list[Settings], recipe: Recipe, most: float, on_cpu: bool, said: str = "") -> tuple[Recipe, list[str]]:
    """As `fitted`, of settings that are counted already, for so many bytes; `said` ends what is said of them."""
    ways, gaps = list(ways_of(parts, recipe, on_cpu)), GAPS_CPU if on_cpu else GAPS

    def need(way: Way) -> float:
        return gaps * max(part.peak(way) for part in parts) + OWN

    found = next((way for way in ways if need(way) <= most), None)
    spare = f"the prediction times {gaps:g} for the allocator's gaps, plus {OWN / 1e9:g} GB for the libraries{said}"
    if found is None:
        least = min(ways, key=need)
        problem = f"nothing fits: the smallest need is {need(least) / 1e9:.3g} GB ({least.as_text()}; {spare})"
        raise RequestError("--fit", f"{most / 1e9:.4g} GB", problem, _remedy(recipe, parts, need(least)))
    model = {"vae_slicing": found.vae_slicing, "vae_tiling": found.vae_tiling, "offload": found.offload}
    made = recipe.model_copy(update={"chunk": found.chunk, "model": recipe.model.model_copy(update=model)})
    why = "" if found == ways[0] else f"; {ways[0].as_text()} would take {need(ways[0]) / 1e9:.3g} GB"
    return made, [f"fit: {found.as_text()}: {need(found) / 1e9:.3g} GB of {most / 1e9:.4g} GB ({spare}){why}"]


def ways_of(parts: list[Settings], recipe: Recipe, on_cpu: bool) -> Iterator[Way]:
    """Every way that this model can be run, the fastest first; what the recipe states stays."""
    asked, cohort = recipe.model, parts[0].outlined.work.cohort
    latents = isinstance(parts[0].outlined.work.denoiser, LatentDenoiser)
    chunks: list[int | None] = [recipe.chunk]
    if recipe.chunk is None:
        chunks += [size for size in (2**power for power in reversed(range(20))) if size < cohort]
    either = [False, True] if latents else [False]
    offloads = [asked.offload]
    if asked.offload == "none" and latents and not on_cpu and not _has_exact(parts):
        offloads += ["model", "sequential"] if parts[0].outlined.work.denoiser.can_offload else []
    for offload in offloads:
        for tiling in [True] if asked.vae_tiling else either:
            for chunk in chunks:
                for slicing in [True] if asked.vae_slicing else either:
                    yield Way(chunk, slicing, tiling, offload)


def _has_exact(parts: list[Settings]) -> bool:
    """Whether guidance goes back through the network, which offload does not allow."""
    return any(term.jacobian == "exact" for part in parts for _, term in potentials(part.guidance))


def _remedy(recipe: Recipe, parts: list[Settings], least: float) -> str:
    ways = []
    if recipe.model.dtype == "float32":
        ways.append("--dtype bfloat16, which takes about half (other images)")
    if recipe.model.offload == "none" and isinstance(parts[0].outlined.work.denoiser, LatentDenoiser):
        exact = "an offload, for which guidance needs --set guidance.0.jacobian=gaussian (other images)"
        ways += [exact] if _has_exact(parts) else []
    if "text_encoder_3" in parts[0].outlined.encoders:
        ways.append("--set 'model.without=[text_encoder_3]' (other images)")
    return f"Give {least / 1e9:.3g} GB or more" + (f"; or use {', or '.join(ways)}" if ways else "") + "."


class Settings:
    """What one setting of a recipe holds, whichever way it is run."""

    def __init__(self, outlined: Outlined) -> None:
        self.outlined, self.guidance = outlined, outlined.recipe.guidance or ()
        self.live = cache(self._live)
        self.coding = cache(self._coding)

    def peak(self, way: Way) -> float:
        """Predicted peak memory in bytes."""
        work, model = self.outlined.work, self.outlined.recipe.model
        at_once = min(way.chunk or AT_ONCE, AT_ONCE, work.cohort)
        live = self._at(way) | self.coding(at_once, 1 if way.vae_slicing else at_once, way.vae_tiling)
        placed: ModelRequest = model.model_copy(update={"offload": way.offload})
        return peak_of(live, work, self.guidance, placed, self.outlined.encoders)

    def _at(self, way: Way) -> Live:
        """What the steps hold, from the small counts."""
        work, chunk = self.outlined.work, way.chunk
        cohort, denoiser = work.cohort, work.denoiser
        looks = isinstance(denoiser, LatentDenoiser) and any(
            not denoiser.is_linear(reduce) for _, reduce in views(self.guidance)
        )
        tiles = way.vae_tiling and looks
        if chunk is None or chunk >= cohort:
            one, two = (self.live(n, None, tiles) for n in (1, 2))
            return {part: round(held + (cohort - 1) * (two[part] - held)) for part, held in one.items()}
        small, more, larger = self.live(2, 1, tiles), self.live(3, 1, tiles), self.live(4, 2, tiles)
        made = {}
        for part, held in small.items():
            per_image = more[part] - held
            made[part] = round(held + (cohort - 2) * per_image + (chunk - 1) * (larger[part] - held - 2 * per_image))
        return made

    def _live(self, cohort: int, chunk: int | None, tiling: bool) -> Live:
        self._tile(tiling)
        return self.outlined.work.live(self.guidance, cohort, chunk)

    def _coding(self, at_once: int, decoded: int, tiling: bool) -> Live:
        self._tile(tiling)
        work = replace(self.outlined.work, cohort=decoded, chunk=at_once)
        channels, height, width = work.denoiser.image_shape
        others = 4 * channels * height * width * (self.outlined.work.cohort - decoded)  # the cohort's decoded images
        return {"decode": work.decoding()["decode"] + others, ENCODING: work.encoding(self.guidance)[1]}

    def _tile(self, tiling: bool) -> None:
        vae: Any = getattr(self.outlined.work.denoiser, "vae", None)
        if vae is not None:
            (vae.enable_tiling if tiling else vae.disable_tiling)()
