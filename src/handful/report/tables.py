"""Results as tables for a terminal or a log."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from handful.errors import counted, some_of
from handful.judge.gains import DRAWS, LEVEL, RULE
from handful.judge.verdict import kind_of
from handful.metrics import catalogue

if TYPE_CHECKING:
    from handful.cost.estimate import Cost
    from handful.judge.evaluation import Evaluation
    from handful.metrics.summary import Scores

WIDTH = 118  # of notes
REAL_AGAINST_REAL = (
    "real against real: one half of the real images, judged against the other half as if it were generated. Coverage, recall"
    " and accuracy can hardly be higher; precision and density can, where images are more typical than real ones. Its Frechet"
    " distance and Vendi are of half as many images, and do not compare"
)

# The parts of a `Cost` in words.
COST_PARTS = {
    "denoiser": "denoiser",
    "denoiser backward": "denoiser, back",
    "preview": "decoding for guidance",
    "preview backward": "decoding for guidance, backward",
    "features": "feature extractors",
    "features backward": "feature extractors, backward",
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


def columns_of(found: Evaluation) -> dict[str, str]:
    """The metrics that an evaluation has a value of, pooled, and what tables call them."""
    known = found.row()
    return {each.name: each.heading for each in catalogue.METRICS if each.compared and known.get(each.name) is not None}


def evaluation_table(found: Evaluation) -> Table:
    """Pooled, after each transform, mean over classes, each class; beneath pooled and mean what real images get.

    Of a single class, pooled says all."""
    summary, columns = found.summary, columns_of(found)
    several = len(summary.per_class) > 1
    wholes = [("pooled", summary.pooled)] + [("mean over classes", summary.mean_over_classes)] * several
    classes = [*summary.per_class.items()] * several
    table = Table(
        f"judge {found.judge}, {counted(summary.k, 'neighbour')}, {counted(summary.dimensions, 'feature')}",
        ["", "real", "generated", *columns.values()],
    )

    def add(name: str, scores: Scores) -> None:
        cells = [number(scores.values.get(metric)) for metric in columns]
        table.rows.append([name, str(scores.n_real), str(scores.n_generated), *cells])

    for name, group in wholes:
        add(name, group.generated)
        if group is summary.pooled and found.transformed:
            sizes = [str(group.generated.n_real), str(group.generated.n_generated)]
            for transform, row in found.transformed.items():
                table.rows.append([f"  after {transform}", *sizes, *(number(row.get(metric)) for metric in columns)])
            table.rows.append(["  after them, mean", *["-"] * 2, *(number(found.robust(metric)) for metric in columns)])
        if group.ceiling is not None:
            add("  real against real", group.ceiling)
    for name, group in classes:
        add(name, group.generated)
    noted: dict[str, list[str]] = {}
    for name, group in classes:
        if group.generated.note:
            noted.setdefault(group.generated.note, []).append(name)
    table.notes += [f"{name}: {group.generated.note}" for name, group in wholes if group.generated.note]
    for note, names in noted.items():
        who = "each class" if len(names) == len(classes) else some_of(names)
        table.notes.append(f"{who}: {note}{', so the mean over classes is -' * (who == 'each class')}")
    if summary.pooled.ceiling is not None:
        table.notes.append(REAL_AGAINST_REAL)
    if found.transformed:
        table.notes.append(
            "after jpeg, resample, noise, lowpass: real and generated images are both changed in this way. Compare such a "
            "row with the same row of another set, not with the row above: the Frechet distance can be smaller there "
            "although the images are no better"
        )
    table.notes += [
        f"{each.heading}: {each.meaning}{' (lower is better)' * each.lower_is_better}"
        for each in catalogue.METRICS
        if each.name in columns and each.meaning
    ]
    table.notes = wrapped(table.notes)
    return table


def group_tables(found: Evaluation) -> list[Table]:
    """Each group, the mean, the worst and the gap; no table where there are no groups."""
    groups, columns = found.groups, columns_of(found)
    if groups is None:
        return []
    table = Table(f"by group, judge {found.judge}, k = {found.summary.k}", ["", "real", "generated", *columns.values()])
    for name, scores in {**groups.per_group, "mean over groups": groups.mean}.items():
        cells = [number(scores.values.get(metric)) for metric in columns]
        table.rows.append([name, str(scores.n_real), str(scores.n_generated), *cells])
    table.rows.append(["gap", "-", "-", *(number(groups.gap.get(metric)) for metric in columns)])
    table.rows.append(["worst group", "-", "-", *(groups.worst.get(metric, "-") for metric in columns)])
    table.notes = wrapped([f"{name}: {scores.note}" for name, scores in groups.per_group.items() if scores.note])
    return [table]


def gains_tables(found: Evaluation) -> list[Table]:
    """A table a baseline: what is gained in each metric, and what of it survives the transforms."""
    tables, headings_of = [], catalogue.headings()
    for name, comparison in found.gains.items():
        audited = bool(found.transformed)
        interval = f"{LEVEL * 100:.0f} % interval"
        headings = ["", "value", "baseline", "gain", interval]
        headings += ["surviving", interval, "share", "verdict"] if audited else []
        sizes = f"{counted(comparison.images, 'image')} beside {comparison.baseline_images}"
        table = Table(f"gain over {name}, judge {found.judge}: {sizes}", headings)
        weakest: dict[str, list[str]] = {}
        for metric, gain in comparison.metrics.items():
            if gain.gain is None:
                continue
            cells = [number(gain.value), number(gain.baseline), signed(gain.gain), _range(gain.interval)]
            if audited:
                share = "-" if gain.robust_gain is None else f"{gain.robust_gain:.2f}"
                cells += [signed(gain.surviving), _range(gain.surviving_interval), share, kind_of(asdict(gain))]
            table.rows.append([headings_of[metric], *cells])
            if gain.after and gain.verdict not in (None, "no gain"):
                least = min(gain.after, key=lambda transform: gain.after[transform])
                weakest.setdefault(least, []).append(f"{headings_of[metric]} {signed(gain.after[least])}")
        table.notes = wrapped([f"the smallest gain is after {least}: {', '.join(those)}" for least, those in weakest.items()])
        tables.append(table)
    if tables:
        tables[-1].notes += wrapped(
            [
                "gain: above 0 is better, also where a lower value is better (Frechet distance, copied).  interval: the"
                f" range to expect with other images of the same two generators ({DRAWS} bootstrap draws). Recall and Vendi"
                " have no interval and no verdict, because drawing an image twice changes them.",
                *(
                    ["surviving: the mean gain after the small changes.  share: surviving / gain.", RULE]
                    if found.transformed
                    else []
                ),
            ]
        )
    return tables


def cost_tables(found: Cost) -> list[Table]:
    """What sampling costs in three ways; where the recipe's operations go; what comes once a class."""
    height, width = found.resolution
    chunk = "" if found.chunk is None or found.chunk >= found.cohort else f", {counted(found.chunk, 'image')} at once"
    ways = Table(
        f"{found.model}, {height} x {width}, {found.sampler}, {counted(found.steps, 'step')}, cohort of {found.cohort}{chunk}",
        ["", "TFLOPs/image", "x plain", "x CFG", "denoiser calls", "parameters", "peak memory"],
    )
    plain, cfg = found.plain, found.cfg
    for name, way in (
        ("plain", plain),
        ("CFG" if found.null_condition else "CFG (if it had a null)", cfg),
        ("recipe", found.recipe),
    ):
        ratios = (f"{way.flops_per_image / other.flops_per_image:.2f}" for other in (plain, cfg))
        ways.rows.append(
            [
                name,
                f"{way.flops_per_image / 1e12:.4g}",
                *ratios,
                f"{way.evaluations:g}",
                f"{way.parameters / 1e6:,.1f} M",
                memory(way.peak_bytes),
            ]
        )
    ways.notes = [
        *(f"{method}: acts at {steps} evaluations" for method, steps in found.guided),
        "A multiply-add is 2 FLOPs; only matrix products, convolutions and attention are counted. Weights are",
        "frozen, so a backward pass computes only the gradient of the input. Peak memory is an estimate for the whole cohort "
        "at once: the",
        "weights and live tensors, without the allocator's gaps and kernels' workspace. If it is too much, set a",
        "chunk (--set chunk=8; an exact jacobian then repeats forward passes), or let --fit 24GB choose one.",
    ]
    parts = Table("the recipe's operations, part by part", ["", "TFLOPs/image", "share"])
    for part, flops in found.recipe.parts.items():
        parts.rows.append([COST_PARTS[part], f"{flops / 1e12:.4g}", f"{flops / found.recipe.flops_per_image:.1%}"])
    once = Table("once per class, not included above", ["", "TFLOPs"])
    once.rows = [[name.replace("_", " "), f"{flops / 1e12:.4g}"] for name, flops in found.once_per_class.items()]
    return [ways, parts, *([once] if once.rows else [])]


def memory(size: float) -> str:
    """`9.17 MB`, `24 GB`."""
    return f"{size / 1e9:,.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def number(value: float | None) -> str:
    """A metric in a cell: three decimals, or one from 100 on."""
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def signed(value: float | None) -> str:
    """A difference in a cell, with its sign."""
    return "-" if value is None else f"{value:+.3f}" if abs(value) < 100 else f"{value:+.1f}"


def _range(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else " .. ".join(signed(end) for end in ends)


def wrapped(notes: Sequence[str]) -> list[str]:
    """Lines of at most `WIDTH` characters."""
    return [line for note in notes for line in textwrap.wrap(note, WIDTH, break_long_words=False)]
