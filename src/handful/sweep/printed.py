"""A sweep's plan, results and choice as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from handful.errors import counted
from handful.report.tables import Table
from handful.sweep.checked import SweepJob
from handful.sweep.choice import Choice, Lead, Pick
from handful.sweep.columns import TEST, VALIDATION, headings
from handful.sweep.counted import Operations
from handful.sweep.request import SweepRequest
from handful.sweep.results import Mean, Row, means

_NOTES = (
    "*: the method's best setting, **: the best of all, both by the objective on the validation half.  rob.: after mild",
    "transforms of real and generated images alike.  acc.: share in which the judge sees the right class.  copied: share "
    "nearer to an",
    "exemplar than 99 % of the real images.  utility: accuracy on real images of a classifier trained on the set alone.",
)


def plan_table(job: SweepJob) -> Table:
    """What a sweep would do: sets, images and operations by method."""
    request, operations = job.request, Operations(job.request)
    table = Table(
        f"{counted(len(job.sets), 'set')}, {len(job.pending)} to make; {counted(request.recipe.per_class, 'image')} of each of "
        f"{counted(len(job.classes), 'class')}",
        ["method", "scales", "k", "seeds", "sets", "to make", "images", "x plain", "TFLOPs"],
    )
    pending, total = {each.name for each in job.pending}, 0.0
    for name in dict.fromkeys(each.setting.method for each in job.sets):
        sets = [each for each in job.sets if each.setting.method == name]
        todo = [each for each in sets if each.name in pending]
        images = request.recipe.per_class * len(job.classes)
        costs = [operations.per_image(each) for each in todo]
        flops = None if None in costs else sum(each or 0.0 for each in costs) * images
        ratios = sorted({ratio for each in sets if (ratio := operations.ratio(each)) is not None})
        shown = "-" if not ratios else "-".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (ratios[0], ratios[-1])))
        table.rows.append(
            [
                name,
                _listed(sorted({each.setting.scale for each in sets})),
                _listed(sorted({each.setting.k for each in sets})),
                str(len({each.seed for each in sets})),
                str(len(sets)),
                str(len(todo)),
                str(len(todo) * images),
                shown,
                "-" if flops is None else f"{flops / 1e12:.4g}",
            ]
        )
        total += flops or 0.0
    table.notes = [
        f"{total / 1e12:.4g} TFLOPs in all, without measuring; x plain: relative to sampling without guidance, a range if it "
        f"depends on k",
        _halves(job),
    ]
    return table


def plan_as_dict(job: SweepJob) -> dict[str, Any]:
    """The plan for JSON."""
    operations, pending = Operations(job.request), {each.name for each in job.pending}
    images = job.request.recipe.per_class * len(job.classes)
    return {
        "out": str(job.directory.path),
        "sets": len(job.sets),
        "to_make": len(pending),
        "classes": job.classes,
        "real_images": job.provenance.get("real_images"),
        "notes": job.notes,
        "plan": [
            {
                "method": each.setting.method,
                "scale": each.setting.scale,
                "k": each.setting.k,
                "seed": each.seed,
                "directory": each.name,
                "images": images,
                "to_make": each.name in pending,
                "flops_per_image": operations.per_image(each),
                "flops_ratio": operations.ratio(each),
            }
            for each in job.sets
        ],
    }


def results_table(rows: Sequence[Row], request: SweepRequest, choice: Choice) -> Table:
    """A line a setting: means on the test half and spreads over the seeds."""
    found = means(rows, TEST)
    columns = [column for column in headings() if any(mean.mean.get(column) is not None for mean in found.values())]
    seeds = max((len(mean.seeds) for mean in found.values()), default=0)
    table = Table(
        f"test half of the real images, judged by {request.judge}; mean of {seeds} seed{'s' * (seeds != 1)}"
        + (" ± standard deviation" if seeds > 1 else ""),
        ["setting", *(headings()[column] for column in columns)],
    )
    picked = {pick.setting for pick in choice.methods.values()}
    for setting, mean in found.items():
        mark = "**" if choice.best and choice.best.setting == setting else "* " if setting in picked else "  "
        few = f" ({len(mean.seeds)} seed{'s' * (len(mean.seeds) > 1)})" if len(mean.seeds) < seeds else ""
        table.rows.append([f"{mark} {setting}{few}", *(number(mean, column) for column in columns)])
    table.notes = list(_NOTES)
    return table


def choice_table(choice: Choice) -> Table:
    """What was chosen, of each method and of all, and how far it is ahead."""
    table = Table(
        f"chosen by {choice.objective}: its value on the validation half, then on the test half",
        ["", "setting", "validation", "test", "next best", "ahead by", ""],
    )
    for name, pick in choice.methods.items():
        table.rows.append([name, *_cells(pick, choice.objective)])
    if choice.best is not None:
        table.rows.append(["of all", *_cells(choice.best, choice.objective)])
        if choice.over_methods is not None and choice.over_methods != choice.best.lead:
            table.rows.append(["", "", "", "of other methods", *_ahead(choice.over_methods)])
    else:
        table.notes.append("nothing can be chosen")
    table.notes += [f"not considered: {setting}: {why}" for setting, why in choice.passed_over.items()]
    return table


def number(mean: Mean, column: str) -> str:
    """A mean and its spread in words."""
    value, spread = mean.mean.get(column), mean.spread.get(column)
    if value is None:
        return "-"
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
    return text + (
        "" if spread is None or column == "flops_ratio" else f" ±{spread:.3f}" if spread < 100 else f" ±{spread:.1f}"
    )


def _cells(pick: Pick, objective: str) -> list[str]:
    test = number(pick.test, objective) if pick.test is not None else "-"
    cells = [str(pick.setting), number(pick.validation, objective), test]
    if pick.lead is None:
        return [*cells, "-", "-", "the only one"]
    return [*cells, *_ahead(pick.lead)]


def _ahead(lead: Lead) -> list[str]:
    ahead = f"{lead.gap:.4f}" + ("" if lead.spread is None else f" ±{lead.spread:.4f}")
    said = {True: "within the spread", False: "beyond the spread", None: "spread unknown"}[lead.within_spread]
    return [str(lead.runner_up), ahead, said]


def _halves(job: SweepJob) -> str:
    counts = job.provenance.get("real_images") or {}
    return (
        f"real images: {counts.get(VALIDATION, '?')} to choose by, {counts.get(TEST, '?')} to report on; judged by "
        f"{job.request.judge}, objective {job.request.objective}"
    )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
