"""`handful invert`: a folder of target images becomes a file of embeddings (CRDI), which `generate` guides by.

All that can be checked without the weights is checked before they are read. An interrupted fit goes on from the
partial file beside the file to be, and ends with the same bytes. The maths is `guidance/inversion_fit.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from handful.core.denoiser import Clamped, Condition, Denoiser, NetworkDenoiser
from handful.core.noise import Levels
from handful.data.targets import read_targets, target_files
from handful.errors import RequestError, counted
from handful.generate.ready import encoded_by, make_ready, placement_of, with_weights
from handful.generate.run import same_arithmetic
from handful.guidance.embeddings import Embeddings, check_interval
from handful.guidance.inversion import no_condition, reconstruct
from handful.guidance.inversion_fit import EPOCHS, STEPS, Method, check_numbers, fit
from handful.metrics.few_shot import Mean, Reconstruction, reconstruction
from handful.models import skeleton
from handful.models.placement import check_placement
from handful.recipe.inverting import FittedWith
from handful.recipe.plan import assign_labels
from handful.recipe.resolve import model_options
from handful.recipe.schema import Recipe, did_you_mean, recipe_from
from handful.runs.comparison import compared
from handful.runs.progress import Progress, Words
from handful.runs.provenance import choose_device, describe_device, model_digest

EPOCHS_DONE = Words("fitting", "fitted", "epochs")
PAPER = (5, 20, 25)  # the guided steps lo <= i < hi of so many
MOST_SEGMENTS = 15
NULL = "null"
_ENCODED = 4  # images encoded at once, where no chunk is stated
_ANOTHER = "Choose another --out; nothing here has been changed."


@dataclass(frozen=True)
class InvertRequest:
    """What is asked for, beside the targets.

    Attributes:
        model: Fields of a recipe's model: name, null_class, classes, device, dtype, trust_pickle.
        segments: eta; None: one for each guided step, 15 at most.
        steps, spacing: Of the path; None takes the model's default spacing.
        interval: The guided steps lo <= i < hi, counted from the clean end; None: 5 to 20 of 25, scaled to the steps.
        method, epochs, lr, spread_weight, seed, perturbation: As for `fit`.
        condition: The condition: a class name, a label or a prompt. None or "null": no class, no prompt.
        clamp: Keep the model's estimate inside [-1, 1]; None: where the model works on pixels.
        chunk: At most this many images at once through the networks.

    Raises:
        RequestError: If a number is out of its range.
    """

    model: Mapping[str, Any]
    segments: int | None = None
    steps: int = STEPS
    spacing: str | None = None
    interval: tuple[int, int] | None = None
    score_scale: float = 2.0
    method: Method = "difference"
    epochs: int | None = None
    lr: float = 0.05
    spread_weight: float = 1.0
    perturbation: float = 0.05
    seed: int = 0
    condition: str | None = None
    clamp: bool | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.method not in EPOCHS:
            problem, remedy = "there is no such method of fitting", did_you_mean(self.method, EPOCHS, "Ways")
            raise RequestError("method", self.method, problem, remedy)
        names = ("epochs", "spread_weight", "perturbation", "seed", "lr", "score_scale")
        check_numbers(**{name: given for name in names if (given := getattr(self, name)) is not None})


@dataclass
class InvertJob:
    """A checked fit, ready to start.

    Attributes:
        request: With its open choices made.
        fitted: How the model is called.
        targets: Images (N, c, h, w) in [-1, 1], on the CPU.
        asked: All that decides the embeddings, as plain data; it is kept in the file.
        kept: The embeddings of this same request, where they are there already.
        notes: What was concluded, in words for the user.
    """

    request: InvertRequest
    out: Path
    denoiser: NetworkDenoiser
    device: torch.device
    levels: Levels
    fitted: FittedWith
    targets: Tensor
    asked: dict[str, Any]
    hashes: tuple[str, ...]
    digest: str
    kept: Embeddings | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def partial(self) -> Path:
        """Where an unfinished fit is kept."""
        return self.out.with_name(self.out.name + ".partial")

    @property
    def segments(self) -> int:
        assert self.request.segments is not None
        return self.request.segments

    @property
    def interval(self) -> tuple[int, int]:
        assert self.request.interval is not None
        return self.request.interval

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "out": str(self.out),
            "targets": len(self.targets),
            **self.asked,
            "there": self.kept is not None,
            "device": describe_device(self.device),
            "notes": self.notes,
        }

    def as_text(self) -> str:
        """Lines for people."""
        channels, height, width = self.denoiser.image_shape
        lo, hi = self.interval
        asked, fitted = self.request, self.fitted
        label = "" if fitted.label is None else f"label {fitted.label}"
        lines = {
            "model": f"{self.request.model['name']}, {height} x {width} x {channels}, {self.asked['dtype']} on "
            f"{describe_device(self.device)}",
            "targets": str(len(self.targets)),
            "condition": repr(fitted.prompt) if fitted.prompt else label or "none",
            "path": f"{counted(asked.steps, 'step')}, {fitted.spacing}{', clamped' if fitted.clamp else ''}",
            "guided": f"steps {lo} to {hi - 1} from the clean end, segments: {self.segments}, scale {asked.score_scale:g}",
            "fit": f"{asked.method}, {asked.epochs} epochs per segment",
            "out": f"{self.out}{' (exists already)' if self.kept else ''}",
        }
        return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


@dataclass
class InvertSummary:
    """What came of a fit.

    Attributes:
        losses: Of each segment's last epoch, the clean end first.
        reconstruction: How near the targets come out of their noised selves with their own embeddings.
        kept: Whether the file was there already.
        seconds: Of fitting, in this process.
    """

    out: Path
    targets: int
    segments: int
    losses: list[float]
    reconstruction: Reconstruction
    kept: bool
    seconds: float
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `kept` is the former name of `resumed`."""
        return {**asdict(self), "resumed": self.kept, "out": str(self.out)}

    def as_text(self) -> str:
        """Lines for people."""
        how = "from an earlier run" if self.kept else f"fitted in {self.seconds:.1f} s"
        mse, ssim = self.reconstruction.mse, self.reconstruction.ssim
        return (
            f"{counted(self.targets, 'target')}, {counted(self.segments, 'segment')} in {self.out} ({how}; "
            f"loss {fmean(self.losses):.4g})\n"
            f"reconstruction: MSE {_with_error(mse)}, SSIM {_with_error(ssim)}"
        )


def _with_error(of: Mean) -> str:
    return f"{of.mean:.3g}" + ("" if of.standard_error is None else f" ± {of.standard_error:.2g}")


def prepare(request: InvertRequest, targets: str | Path, out: str | Path) -> InvertJob:
    """Checks a request against the world; writes nothing.

    Args:
        targets: A folder of images, or of one folder of images.
        out: The file to write, or one of this same request.

    Raises:
        RequestError: Naming what can't be done, and the remedy.
    """
    out = _writable(Path(out).expanduser().absolute())
    files = target_files(targets)
    recipe = recipe_from(
        {
            "model": dict(request.model),
            "chunk": request.chunk,
            "sampler": {"name": "ddim", "steps": request.steps, "spacing": request.spacing, "clamp": request.clamp},
        }
    )
    device, options = choose_device(recipe.model.device), model_options(recipe)
    outline = skeleton(recipe.model.name, options)
    placement = placement_of(recipe, device)
    check_placement(outline, placement)
    fitted, notes = _fitted_with(request, recipe, outline)
    levels = outline.levels.spacing(request.steps, fitted.spacing)
    interval = request.interval or scaled_interval(request.steps)
    segments = min(MOST_SEGMENTS, interval[1] - interval[0]) if request.segments is None else request.segments
    check_interval(interval, segments, levels)
    images, hashes, seen = read_targets(files, targets, outline.image_shape)
    notes += seen

    denoiser = with_weights(outline, recipe.model.name, options, fitted.null_class)
    digest = model_digest(denoiser)
    asked_of = [fitted.prompt or ""] if denoiser.prompted else [fitted.label or 0]
    notes += make_ready(denoiser, [fitted.prompt or ""], placement, levels, asked_of, encoded_by(options, digest, device))
    epochs = EPOCHS[request.method] if request.epochs is None else request.epochs
    request = replace(request, segments=segments, interval=interval, epochs=epochs, clamp=fitted.clamp, spacing=fitted.spacing)
    asked = {
        "model_sha256": digest,
        "targets_sha256": list(hashes),
        "dtype": recipe.model.dtype,
        **asdict(fitted),
        "interval": list(interval),
        **{
            name: getattr(request, name)
            for name in ("segments", "steps", "score_scale", "method", "epochs", "lr", "spread_weight", "perturbation", "seed")
        },
    }
    return InvertJob(request, out, denoiser, device, levels, fitted, images, asked, hashes, digest, _kept(out, asked), notes)


def invert(job: InvertJob, progress: Progress | None = None) -> InvertSummary:
    """Fits, or takes what is there, and measures how the targets are reconstructed.

    Raises:
        RequestError: If the partial file belongs to another fit.
        RunError: If the model's estimate is not finite.
        OSError: If it can't be written.
    """
    began = time.perf_counter()
    with same_arithmetic():
        embeddings = job.kept or _fitted(job, progress or Progress())
        seconds = 0.0 if job.kept else time.perf_counter() - began
        if not job.kept:
            embeddings.save(job.out)
        job.partial.unlink(missing_ok=True)
        found = reconstruction(job.targets, reconstructed(job, embeddings))
    return InvertSummary(
        job.out,
        len(embeddings),
        embeddings.segments,
        list(embeddings.fitted["losses"]),
        found,
        job.kept is not None,
        seconds,
        job.notes,
    )


def _fitted(job: InvertJob, progress: Progress) -> Embeddings:
    asked, begun = job.request, False
    epochs = job.asked["epochs"]

    def each(segment: int, epoch: int, loss: float) -> None:
        nonlocal begun
        if not begun:
            progress.begin(epochs * job.segments, epochs * (job.segments - 1 - segment) + epoch)
            begun = True
        progress.advance(1, f"segment {segment}, epoch {epoch + 1} of {epochs}, loss {loss:.4g}")

    fingerprint = hashlib.sha256(json.dumps(job.asked, sort_keys=True).encode()).hexdigest()
    try:
        embeddings = fit(
            asked_denoiser(job),
            _encoded(job),
            job.levels,
            segments=job.segments,
            interval=job.interval,
            scale=asked.score_scale,
            spread_weight=asked.spread_weight,
            method=asked.method,
            epochs=asked.epochs,
            lr=asked.lr,
            seed=asked.seed,
            condition=_condition(job),
            chunk=asked.chunk,
            progress=each,
            state=job.partial,
            model=fingerprint,  # for its checkpoint, which must not go on under another clamp or precision
            hashes=job.hashes,
            perturbation=asked.perturbation,
        )
    finally:
        if begun:
            progress.end()
    fitted = {**embeddings.fitted, **job.fitted.as_fitted_entry(), "asked": job.asked, "name": Path(asked.model["name"]).name}
    return replace(embeddings, model=job.digest, fitted=fitted)


@torch.no_grad()
def reconstructed(job: InvertJob, embeddings: Embeddings) -> Tensor:
    """The targets out of their noised selves with their own embeddings: images (N, c, h, w) in [-1, 1], on the CPU."""
    on_device = replace(embeddings, x0=embeddings.x0.to(job.device))
    size = job.request.chunk or len(job.targets)
    x0 = reconstruct(asked_denoiser(job), on_device, job.request.seed, condition=_condition(job), chunk=job.request.chunk)
    return torch.cat([job.denoiser.decode(part) for part in x0.split(size)]).float().cpu().clamp(-1, 1)


def asked_denoiser(job: InvertJob) -> Denoiser:
    """The model as the embeddings shift its estimate."""
    return Clamped(job.denoiser) if job.fitted.clamp else job.denoiser


@torch.no_grad()
def _encoded(job: InvertJob) -> Tensor:
    parts = job.targets.split(job.request.chunk or _ENCODED)
    return torch.cat([job.denoiser.encode(part.to(job.device)) for part in parts]).float()


def _condition(job: InvertJob) -> Condition:
    n = len(job.targets)
    if job.fitted.prompt is not None:
        return job.denoiser.condition([job.fitted.prompt] * n)
    return no_condition(job.denoiser, n) if job.fitted.label is None else job.denoiser.condition([job.fitted.label] * n)


def scaled_interval(steps: int) -> tuple[int, int]:
    """The paper's interval on a path of this many steps; at least one step."""
    lo, hi, of = PAPER
    lower = lo * steps // of
    return lower, max(lower + 1, round(hi * steps / of))


def _fitted_with(request: InvertRequest, recipe: Recipe, outline: NetworkDenoiser) -> tuple[FittedWith, list[str]]:
    """How the model is called, with notes on what was concluded."""
    pixels = outline.pixels
    if request.clamp and not pixels:
        raise RequestError("clamp", True, "this model works on latents, which have no fixed range", "Leave it out.")
    clamp = pixels if request.clamp is None else request.clamp
    spacing, asked = request.spacing or outline.levels.spacings[0], request.condition
    if outline.prompted:
        return FittedWith(prompt="" if asked in (None, NULL) else asked, clamp=clamp, spacing=spacing), []
    if not outline.label_count:
        if asked not in (None, NULL):
            raise RequestError("condition", asked, "this model is unconditional", "Leave it out.")
        return FittedWith(clamp=clamp, spacing=spacing), []
    labels = assign_labels(
        None,
        None,
        label_count=outline.label_count,
        names=recipe.model.classes or outline.classes,
        null_class=outline.null_class,
        may_have_null=outline.null_may_be_unstated,
    )
    null, notes = labels.null_class, [note for note in labels.notes if labels.null_class is not None]
    if asked in (None, NULL):
        if null is None:
            problem = "this model takes class labels, and the label of its null class is not known"
            remedy = "Name a class (--condition NAME), or give the label of the null class (--null-class NUMBER)."
            raise RequestError("condition", asked, problem, remedy)
        label = null
    elif asked in labels.of:
        label = labels.of[asked]
    elif asked.isascii() and asked.isdecimal() and int(asked) < outline.label_count:
        label = int(asked)
    else:
        raise RequestError("condition", asked, "the model has no such class", did_you_mean(asked, labels.of, "It knows"))
    return FittedWith(label=label, null_class=null, clamp=clamp, spacing=spacing), notes


def _writable(out: Path) -> Path:
    if out.is_dir():
        raise RequestError("out", out, "this is a folder", "Name a file, such as SGE.safetensors.")
    if not out.parent.is_dir():
        raise RequestError("out", out, f"there is no folder '{out.parent}'", "Create it, or choose another --out.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise RequestError("out", out, f"you may not write into '{out.parent}'", "Choose another --out.")
    return out


def _kept(out: Path, asked: Mapping[str, Any]) -> Embeddings | None:
    """What is there already, if it is what is asked for."""
    if not out.exists():
        return None
    try:
        kept = Embeddings.load(out, field="out")
    except RequestError as error:
        raise RequestError("out", out, error.problem, _ANOTHER) from None
    compared(kept.fitted.get("asked", {}), asked).refuse(out, "it holds the embeddings of another fit", _ANOTHER)
    return kept
