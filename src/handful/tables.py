"""Results as tables for a terminal or a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handful.cost import Cost
    from handful.evaluate import Evaluation
    from handful.metrics.summary import Group

# The parts of a `Cost` in words.
COST_PARTS = {
    "denoiser": "denoiser",
    "denoiser backward": "denoiser, back",
    "preview": "decoding for guidance",
    "preview backward": "decoding for guidance, back",
    "features": "feature extractors",
    "features backward": "feature extractors, back",
    "other": "distances of features",
    "decode": "decoding the images",
}


@dataclass
class Table:
    """Text cells under headings; the first column is left-aligned."""

    title: str
    headings: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def print_table(table: Table) -> None:
    """Prints to stdout, never cut off: a log is as wide as the table."""
    cells = [list(table.headings), *map(list, table.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.headings))]
    print(table.title)
    for row in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *others]).rstrip())
    for note in table.notes:
        print(note)


def evaluation_table(found: Evaluation) -> Table:
    """Pooled, mean over classes, each class; `value (ceiling)`."""
    metrics = ("precision", "recall", "density", "coverage", "f1", "frechet", "vendi")
    summary = found.summary
    table = Table(f"judge {found.judge}, k = {summary.k}, {summary.dimensions} features; in brackets: real against real",
                  ["", "real", "generated", *metrics])  # fmt: skip
    groups: Mapping[str, Group] = {
        "pooled": summary.pooled,
        "mean over classes": summary.mean_over_classes,
        **summary.per_class,
    }
    for name, group in groups.items():
        scores, ceiling = group.generated, group.ceiling
        cells = [
            _number(getattr(scores, m)) + (f" ({_number(getattr(ceiling, m))})" if ceiling is not None else "") for m in metrics
        ]
        table.rows.append([name, str(scores.n_real), str(scores.n_generated), *cells])
        if scores.note:
            table.notes.append(f"{name}: {scores.note}")
    for name, robust in found.transformed.items():
        cells = [_number(getattr(robust, metric)) for metric in metrics[:5]]
        table.rows.append([f"after {name}", str(robust.n_real), str(robust.n_generated), *cells, "-", "-"])
    if summary.pooled.ceiling is not None:
        ceiling = summary.pooled.ceiling
        table.notes.append(
            f"in brackets: {ceiling.n_generated} real images against {ceiling.n_real} others; fewer images score lower"
        )
    if found.judge_accuracy is not None:
        table.notes.append(f"judge accuracy: {found.judge_accuracy:.3f} of the generated images are named as asked")
    return table


def demo_table(means: Sequence[Mapping[str, Any]]) -> Table:
    """A line a method: mean, and spread over the seeds."""
    columns = {
        "precision": "precision", "coverage": "coverage", "f1": "F1", "recall": "recall", "frechet": "frechet",
        "robust_precision": "rob.prec", "robust_coverage": "rob.cov", "copied": "copied", "utility": "utility",
        "seconds": "seconds",
    }  # fmt: skip
    seeds = max(mean["seeds"] for mean in means)
    table = Table(f"digits, judged by a classifier that guided nothing; mean of {seeds} seed{'s' * (seeds > 1)}"
                  + (" ± standard deviation" if seeds > 1 else ""), ["method", *columns.values()])  # fmt: skip
    for mean in means:
        name = mean["method"] + (f" w={mean['scale']:g}" if mean["method"] == "cfg" else "")
        name += f" k={mean['k']}" if mean["k"] else ""
        table.rows.append([name, *(_spread(mean[column], mean[f"{column}_spread"]) for column in columns)])
    table.notes = [
        "rob.: after mild transforms of real and generated images alike.  copied: share nearer to an exemplar than 99 % of",
        "held-out real digits are (against 32 exemplars where none guided).  utility: accuracy on held-out real digits of a",
        "small classifier trained on the set alone.  seconds: of sampling.",
    ]
    return table


def cost_tables(found: Cost) -> list[Table]:
    """What sampling costs in three ways; where the recipe's operations go; what comes once a class."""
    height, width = found.resolution
    chunk = "" if found.chunk is None or found.chunk >= found.cohort else f", {found.chunk} images at once"
    ways = Table(f"{found.model}, {height} x {width}, {found.sampler}, {found.steps} steps, cohort of {found.cohort}{chunk}",
                 ["", "TFLOPs/image", "x plain", "x CFG", "denoiser calls", "parameters", "peak memory"])  # fmt: skip
    plain, cfg = found.plain, found.cfg
    for name, way in (
        ("plain", plain),
        ("CFG" if found.null_condition else "CFG (if it had a null)", cfg),
        ("recipe", found.recipe),
    ):
        ratios = (f"{way.flops_per_image / other.flops_per_image:.2f}" for other in (plain, cfg))
        ways.rows.append([name, f"{way.flops_per_image / 1e12:.4g}", *ratios, f"{way.evaluations:g}",
                          f"{way.parameters / 1e6:,.1f} M", f"{way.peak_bytes / 1e9:,.3g} GB"])  # fmt: skip
    ways.notes = [
        *(f"{method}: acts at {steps} of {found.plain.evaluations:g} evaluations" for method, steps in found.guided),
        "A multiply-add is 2 FLOPs; matrix products, convolutions and attention are counted, the rest is not. Weights are",
        "frozen, so going back is a gradient towards the input. Peak memory is an estimate for the whole cohort at once: the",
        "weights and the tensors alive, without the allocator's gaps, kernels' workspace and the text encoders. Where it is",
        "too much, state a chunk: guidance by an exact jacobian then repeats forward passes.",
    ]  # fmt: skip
    parts = Table("the recipe by part", ["", "TFLOPs/image", "share"])
    for part, flops in found.recipe.parts.items():
        parts.rows.append([COST_PARTS[part], f"{flops / 1e12:.4g}", f"{flops / found.recipe.flops_per_image:.1%}"])
    once = Table("once a class, not in the above", ["", "TFLOPs"])
    once.rows = [[name.replace("_", " "), f"{flops / 1e12:.4g}"] for name, flops in found.once_per_class.items()]
    return [ways, parts, *([once] if once.rows else [])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def _spread(value: float, spread: float | None) -> str:
    return _number(value) + ("" if spread is None else f" ±{_number(spread)}")
