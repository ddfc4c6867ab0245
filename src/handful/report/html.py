"""report.html: one page that holds everything and asks nobody for anything.

What it shows is read from the run directories (`gather`), and from results that `handful evaluate` and `handful utility` kept
there. All text is escaped by jinja2; the pictures are inside; a content security policy forbids every request.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from handful import __version__
from handful.data.images import write_atomically
from handful.errors import HandfulError, Note, RequestError, counted, first_line
from handful.judge.verdict import kind_of, verdict
from handful.judge.worth import TEST
from handful.metrics.catalogue import METRICS, headings, lower_is_better
from handful.report.charts import Dot, scatter
from handful.report.gallery import gallery
from handful.report.gather import Shown, compared_with, gather
from handful.report.tables import REAL_AGAINST_REAL, Table, memory, number, signed
from handful.report.worth_table import worth_table
from handful.runs.card import refresh

MOST_CLASSES = 200  # rows of the table of classes: the worst first


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the page.

    Args:
        runs: Run directories; the first is the report's, the others are compared with it. Baselines that it was evaluated
            against are shown too, where they are still there.
        out: The file; None: `report.html` in the first run directory.

    Returns:
        The file.

    Raises:
        RequestError: A directory is no run, is empty, or the file can't be written; said before any picture is read.
    """
    if not runs:
        raise RequestError("OUT", None, "it is missing", "Name one or more run directories.")
    first = gather(runs[0])
    shown = [first, *compared_with(first, runs[1:])]
    target = Path(out).expanduser() if out is not None else first.path / "report.html"
    where = target if target.exists() else target.parent
    if not target.parent.is_dir() or target.is_dir() or not os.access(where, os.W_OK) or not os.access(target.parent, os.W_OK):
        remedy = "Choose another file with --out FILE.html."
        raise RequestError("out", target, "it can't be written there", remedy)
    refresh(first.path, first.recipe, first.rows)
    write_atomically(target, page(shown).encode("utf-8", "replace"))
    for note in first.notes:
        warnings.warn(note, Note, stacklevel=2)
    return target


def page(runs: Sequence[Shown]) -> str:
    """The whole page as text; the first run is the report's."""
    first, parts = runs[0], _parts()
    data, costs = gallery(runs), [_cost(run) for run in runs]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(parts["report.html"])
    classes = _classes(first)
    return template.render(
        title=f"{first.name}: a report by handful",
        run=first,
        runs=runs,
        version=__version__,
        style=parts["report.css"],
        script=parts["report.js"],
        data=data,
        verdicts=_verdicts(first),
        metrics=_metrics(first),
        meanings=[
            (each.heading, each.meaning) for each in METRICS if each.meaning and (first.found or {}).get(each.name) is not None
        ],
        gains=_gains(first),
        comparison=_comparison(runs) if len(runs) > 1 else None,
        classes=classes,
        worth=None if first.worth is None else worth_table(first.worth),
        chart=_chart(runs, costs),
        cost=_costs(runs, costs),
        facts=_facts(first),
        middle=_middle(first),
        recipe=yaml.safe_dump(first.recipe, sort_keys=False, allow_unicode=True),
        has_distances=bool(data["copies"]),
        copied=(first.found or {}).get("copied"),
        features=next(
            (term["features"] for term in first.recipe.get("guidance") or [] if term.get("features")), "see the recipe"
        ),
    )


def _parts() -> dict[str, str]:
    folder = files("handful.report")
    return {name: folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.html", "report.css", "report.js")}


def _verdicts(run: Shown) -> list[str]:
    """What was found, in sentences; what was not measured yet is said with its command."""
    utility = [run.worth.sentence] if run.worth is not None else []
    if run.found is None:
        return utility
    sentences = [*verdict(run.found), *utility]
    judged = run.found["pooled"]["generated"]["n_generated"]
    if judged != len(run.rows):
        sentences.insert(
            0, f"The run has {counted(len(run.rows), 'image')} now, and was judged with {judged:,}: repeat {run.judging}."
        )
    if not run.found.get("gains") and run.recipe.get("guidance"):
        sentences.append(
            f"Does guidance help? Make a set without it: handful generate {run.path}/recipe.yaml --guidance none --out plain. "
            f"Then compare: handful evaluate {run.path} --judge {run.found['judge']} --baseline plain."
        )
    return sentences


def _metrics(run: Shown) -> Table | None:
    """Pooled metrics: generated, after the transforms, and what real images get."""
    found = run.found
    if found is None:
        return None
    asked = run.evaluations[-1].get("asked") or {}
    intervals: Mapping[str, Any] = found.get("intervals") or {}
    title = f"All classes together, judged by {found['judge']}, neighbours: {found.get('k', asked.get('neighbours', '?'))}"
    table = Table(title, ["metric", "generated", "90 % interval", "after transforms", "real against real"])
    ceiling = (found["pooled"].get("ceiling")) or {}
    for metric, heading in headings().items():
        value = found.get(metric, found["pooled"]["generated"].get(metric))
        if value is None:
            continue
        after = [each[metric] for each in (found.get("transformed") or {}).values() if each.get(metric) is not None]
        ends = intervals.get(metric)
        cells = [
            "-" if ends is None else f"{number(ends[0])} to {number(ends[1])}",
            number(sum(after) / len(after)) if after else "-",
            number(ceiling.get(metric)),
        ]
        table.rows.append([heading + (" (lower is better)" if lower_is_better(metric) else ""), number(value), *cells])
    sizes = found["pooled"]["generated"]
    table.notes.append(
        f"{counted(sizes['n_generated'], 'generated image')} and {sizes['n_real']:,} real ones, of {asked.get('real', '?')}."
    )
    table.notes.append(
        f"{REAL_AGAINST_REAL}. After transforms: real and generated images are both changed a little, such as by JPEG; do not"
        " compare it with the column before it."
    )
    table.notes += [str(note) for note in (sizes.get("note"), *(found.get("notes") or [])) if note]
    return table


def _gains(run: Shown) -> list[Table]:
    tables = []
    for name, comparison in ((run.found or {}).get("gains") or {}).items():
        table = Table(
            f"Gains over {name}", ["metric", "value", name, "gain", "90 % interval", "left after transforms", "verdict"]
        )
        for metric, gain in comparison["metrics"].items():
            if gain.get("gain") is not None:
                ends = gain.get("interval")
                cells = [number(gain["value"]), number(gain["baseline"]), signed(gain["gain"])]
                cells += ["-" if ends is None else f"{signed(ends[0])} to {signed(ends[1])}", signed(gain.get("surviving"))]
                table.rows.append([str(headings().get(metric, metric)), *cells, kind_of(gain)])
        table.notes.append(
            "A gain above 0 is better, also where a lower value is better. Transforms are small changes, such as JPEG, of real"
            " and generated images alike. Survives: three quarters or more of the gain are left after them. Partly: a "
            "quarter to three quarters. Adversarial: less than a quarter, so only the judge sees the gain. May be chance: "
            "other images of the same two generators might show no gain."
        )
        tables.append(table)
    return tables


def _comparison(runs: Sequence[Shown]) -> Table:
    """A column for each run that was evaluated."""
    table = Table("The runs compared", ["metric", *(run.name for run in runs)])
    for metric, heading in headings().items():
        values = [(run.found or {}).get(metric) for run in runs]
        baselines = (runs[0].found or {}).get("gains") or {}
        for place, run in enumerate(runs):  # a baseline that was not evaluated itself was measured beside the first
            if values[place] is None and run.name in baselines:
                values[place] = (baselines[run.name]["metrics"].get(metric) or {}).get("baseline")
        if any(value is not None for value in values):
            table.rows.append([heading, *map(number, values)])
    worths = [run.worth.rows[2].tests[TEST].mean if run.worth and len(run.worth.rows) > 2 else None for run in runs]
    if any(value is not None for value in worths):
        table.rows.append(["accuracy of a classifier, exemplars + these", *map(number, worths)])
    judges = {(run.found["judge"], str((run.evaluations[-1].get("asked") or {}).get("real"))) for run in runs if run.found}
    if len(judges) > 1:
        table.notes.append(
            "These runs were judged by different judges or against different real images: their numbers can't be compared."
        )
    return table


def _classes(run: Shown) -> Table | None:
    """The classes, the worst first."""
    found = run.found
    if found is None or not found.get("per_class"):
        return None
    metrics = ("f1", "precision", "recall", "coverage", "frechet")
    table = Table("Class by class, the worst first", ["class", "images", *(headings()[metric] for metric in metrics)])
    groups = {name: group["generated"] for name, group in found["per_class"].items()}

    def badness(name: str) -> tuple[float, float]:
        scores = groups[name]
        f1, distance = scores.get("f1"), scores.get("frechet")
        return (float("inf") if f1 is None else f1, -(distance or 0.0))

    for name in sorted(groups, key=badness)[:MOST_CLASSES]:
        table.rows.append([name, str(groups[name]["n_generated"]), *(number(groups[name].get(metric)) for metric in metrics)])
    if len(groups) > MOST_CLASSES:
        table.notes.append(f"Not shown: {counted(len(groups) - MOST_CLASSES, 'better class')}.")
    if any(scores.get("f1") is None for scores in groups.values()):
        table.notes.append("A class with too few images for this number of neighbours has no precision, recall or coverage.")
    return table


def _cost(run: Shown) -> Any:
    """What sampling costs by `handful cost`; None where that can't be counted here."""
    try:
        from handful.cost.estimate import cost_of
        from handful.recipe.schema import recipe_from

        return cost_of(recipe_from(run.recipe))
    except HandfulError as error:
        run.notes.append(f"The cost can't be counted: {first_line(error)}")
        return None


def _costs(runs: Sequence[Shown], costs: Sequence[Any]) -> Table | None:
    known = [(run, cost) for run, cost in zip(runs, costs, strict=True) if cost is not None]
    if not known:
        return None
    headings = ["run", "operations per image", "of plain sampling", "of classifier-free guidance", "peak memory"]
    table = Table("What sampling costs", headings)
    for run, cost in known:
        flops = cost.recipe.flops_per_image
        ratios = [f"{flops / other.flops_per_image:.2f} times" for other in (cost.plain, cost.cfg)]
        table.rows.append([run.name, operations(flops), *ratios, memory(cost.recipe.peak_bytes)])
    table.notes.append(
        "Counted from the recipe, not measured: a multiplication and an addition are 2 operations (FLOPs). Peak memory is an "
        "estimate for a whole cohort."
    )
    return table


def _chart(runs: Sequence[Shown], costs: Sequence[Any]) -> str | None:
    """Precision against coverage; a larger dot needed more computing."""
    found = runs[0].found
    if found is None:
        return None
    dots: list[Dot] = []
    for run, cost in zip(runs, costs, strict=True):
        scores: Mapping[str, Any] = run.found or {}
        if not run.found and (gains := (found.get("gains") or {}).get(run.name)):
            scores = {metric: gain["baseline"] for metric, gain in gains["metrics"].items()}
        if scores.get("precision") is not None and scores.get("coverage") is not None:
            ratio = None if cost is None else cost.recipe.flops_per_image / cost.plain.flops_per_image
            dots.append(Dot(run.name, scores["precision"], scores["coverage"], ratio))
    ceiling = found["pooled"].get("ceiling") or {}
    if ceiling.get("precision") is not None and ceiling.get("coverage") is not None:
        dots.append(Dot("real against real", ceiling["precision"], ceiling["coverage"], None, hollow=True))
    return scatter(dots, "precision", "coverage") if dots else None


def _middle(run: Shown) -> float | None:
    """Half of the images are nearer to an exemplar than this."""
    known = [row["nearest_exemplar_distance"] for row in run.rows if row.get("nearest_exemplar_distance") is not None]
    return median(known) if known else None


def _facts(run: Shown) -> list[tuple[str, str]]:
    """Provenance, line by line."""
    known = run.provenance
    simple = {name: value for name, value in known.items() if isinstance(value, (str, int, float))}
    nested = {
        f"{name}: {key}": value
        for name, part in known.items()
        if isinstance(part, dict) and name != "levels"
        for key, value in part.items()
    }
    facts = [(name, str(value)) for name, value in {**simple, **nested}.items()]
    return [*facts, *(("note", str(note)) for note in known.get("notes") or [])]


def operations(flops: float) -> str:
    """`583 million`."""
    power = min(4, max(1, int(math.log10(max(flops, 1.0)) / 3)))
    return f"{flops / 1000**power:,.3g} {('thousand', 'million', 'billion', 'trillion')[power - 1]}"
