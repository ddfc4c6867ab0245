"""The pictures of a sweep: precision against coverage with cost as the third reading, and what k brings."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from handful.sweep.choice import Choice, best_at_each_k, choose, ranked
from handful.sweep.columns import TEST
from handful.sweep.label_places import Label, place_labels
from handful.sweep.planned import Setting
from handful.sweep.request import SweepRequest
from handful.sweep.results import Mean, Row, means

Dash = Literal["--", ":", "-."]

# Okabe and Ito's colours, which colour-blind people tell apart; black is the baseline's.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5195", "#8C6D31")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_BASELINE = ("#000000", "*")
_MOST_LABELS = 80  # points of a panel that are labelled; more labels hide each other
_DPI = 150
_LEGEND_COLUMNS = 6
_DASHES: tuple[Dash, ...] = ("--", ":", "-.")  # of the best methods without exemplars, which stand beside those over k
_OVER_K = {
    "coverage": "coverage",
    "f1": "F1",
    "robust_coverage": "coverage, after transforms",
    "robust_f1": "F1, after transforms",
    "utility": "downstream accuracy",
}


def pareto_png(rows: Sequence[Row], request: SweepRequest) -> bytes | None:
    """Precision against coverage on the test half: a line a method through its scales (or k), filled by cost.

    A second panel shows the same after the audit's transforms, where there was one. The setting that the objective prefers
    of each method is ringed.

    Returns:
        A PNG; None where no setting has both numbers.
    """
    found = means(rows, TEST)
    panels = [
        (title, pair)
        for title, pair in (
            ("as generated", ("precision", "coverage")),
            ("after mild transforms of real and generated", ("robust_precision", "robust_coverage")),
        )
        if any(_known(mean, *pair) for mean in found.values())
    ]
    if not panels:
        return None
    figure, canvas = _figure(5.6 * len(panels) + 1.2, 5.0 + 0.2 * -(-len(request.methods) // _LEGEND_COLUMNS))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    costs = [cost for mean in found.values() if (cost := mean.mean["cost_ratio"])]
    norm = LogNorm(min([*costs, 0.99]), max([*costs, 2.0]))
    fill = ScalarMappable(norm, "viridis_r")
    labels = [
        _panel(panel, found, pair, title, fill, request, choose(rows, request))
        for panel, (title, pair) in zip(axes, panels, strict=True)
    ]
    bar = figure.colorbar(fill, ax=list(axes), pad=0.015, fraction=0.05 / len(panels), aspect=30)
    _plain_ticks(bar.ax.yaxis, norm.vmin, norm.vmax)
    bar.set_label(f"sampling time, x {request.baseline}", fontsize=9)
    _legend(figure, request, [setting.method for setting in found])
    figure.suptitle(
        f"{_what(found)}; numbers at points: scales (or k); ring: each method's best by {request.objective}, bold ring: the "
        f"best of all",
        fontsize=9,
    )
    canvas.draw()
    for panel, written in zip(axes, labels, strict=True):
        if len(written) <= _MOST_LABELS:
            place_labels(panel, canvas, [(label.x, label.y) for label in written], written)
    return _png(figure)


def _panel(
    panel: Axes,
    found: dict[Setting, Mean],
    pair: tuple[str, str],
    title: str,
    fill: ScalarMappable,
    request: SweepRequest,
    choice: Choice,
) -> list[Label]:
    """Draws one panel of the Pareto picture; what is to be written beside its points is left to do."""
    shown = {setting: mean for setting, mean in found.items() if _known(mean, *pair)}
    picked = {pick.setting for pick in choice.methods.values()}
    best = choice.best.setting if choice.best else None
    written: list[Label] = []
    for line, by_scale in _lines(list(shown)):
        colour, marker = _styles(request)[line[0].method]
        across, up = ([shown[setting].mean[column] or 0.0 for setting in line] for column in pair)
        panel.plot(across, up, color=colour, linewidth=1.2, alpha=0.7, zorder=2)
        for setting, x, y in zip(line, across, up, strict=True):
            mean = shown[setting]
            panel.errorbar(
                x,
                y,
                mean.spread[pair[1]] or 0.0,
                mean.spread[pair[0]] or 0.0,
                color=colour,
                elinewidth=0.7,
                alpha=0.35,
                zorder=1,
            )
            cost = mean.mean["cost_ratio"]
            panel.plot(
                x,
                y,
                marker=marker,
                markersize=13 if marker == "*" else 8,
                color=colour,
                markeredgewidth=1.3,
                markerfacecolor=fill.to_rgba(np.array([cost]))[0] if cost else "white",
                zorder=3,
            )
            if setting == best or (setting in picked and len(line) > 1):
                panel.plot(
                    x,
                    y,
                    marker="o",
                    markersize=17,
                    color=colour,
                    markerfacecolor="none",
                    markeredgewidth=2.4 if setting == best else 1.0,
                    zorder=4,
                )
            written.append(Label(x, y, _label(setting, line, by_scale), colour))
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("precision" if pair[0] == "precision" else "precision, after transforms")
    panel.set_ylabel("coverage" if pair[1] == "coverage" else "coverage, after transforms")
    panel.margins(0.08)
    panel.autoscale_view()
    panel.set_xlim(right=min(panel.get_xlim()[1], 1.01))  # a spread may reach beyond what a share can be
    panel.set_ylim(top=min(panel.get_ylim()[1], 1.01))
    panel.grid(alpha=0.25, linewidth=0.6)
    return written


def over_k_png(rows: Sequence[Row], request: SweepRequest) -> bytes | None:
    """What each method gains over the baseline as k grows, on the test half, at each k's best scale by the objective.

    The best methods that no exemplars guide are level dashed lines. Bars are standard deviations of the gain between seeds.

    Returns:
        A PNG; None where no method has several k.
    """
    found = means(rows, TEST)
    best = {
        method: {k: found[setting] for k, setting in by_k.items() if setting in found}
        for method, by_k in best_at_each_k(rows, request).items()
    }
    growing = [method for method, by_k in best.items() if len(by_k) > 1]
    columns = {
        column: name
        for column, name in _OVER_K.items()
        if any(_known(mean, f"gain_{column}") for method in growing for mean in best[method].values())
    }
    if not growing or not columns:
        return None
    methods = choose(rows, request).methods
    unguided = [
        mean.setting.method
        for mean in ranked([pick.validation for pick in methods.values()], request.objective)
        if 0 in best.get(mean.setting.method, {}) and mean.setting.method != request.baseline
    ]
    levels = dict(zip(unguided, _DASHES, strict=False))
    across = min(3, len(columns))
    figure, _ = _figure(4.4 * across, 3.7 * -(-len(columns) // across) + 0.6)
    panels = figure.subplots(-(-len(columns) // across), across, squeeze=False).ravel()
    styles, every_k = _styles(request), sorted({k for method in growing for k in best[method]})
    for panel, (column, name) in zip(panels, columns.items(), strict=False):
        gain = f"gain_{column}"
        panel.axhline(0, color="black", linewidth=0.9)
        for place, method in enumerate(growing):
            colour, marker = styles[method]
            points = [(k, mean) for k, mean in best[method].items() if _known(mean, gain)]
            apart = 1 + 0.03 * (place - (len(growing) - 1) / 2)  # so that bars do not hide each other
            panel.errorbar(
                [k * apart for k, _ in points],
                [mean.mean[gain] for _, mean in points],
                [mean.spread[gain] or 0.0 for _, mean in points],
                color=colour,
                marker=marker,
                markersize=6,
                linewidth=1.5,
                elinewidth=1,
                capsize=3,
            )
        for method, dashes in levels.items():
            level = best[method][0].mean.get(gain)
            if level is not None:
                panel.axhline(level, color=styles[method][0], linestyle=dashes, linewidth=1.3)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_locator(FixedLocator(every_k))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticklabels([str(k) for k in every_k])
        panel.set_xlabel("exemplars of each class, k")
        panel.set_title(f"gain in {name}", fontsize=10)
        panel.grid(alpha=0.25, linewidth=0.6)
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    _legend(figure, request, [request.baseline, *growing, *levels], dashes=levels)
    figure.suptitle(
        f"{_what(found)}; gains over {request.baseline}, for each k at the scale that is best by {request.objective}",
        fontsize=9,
    )
    return _png(figure)


def _lines(settings: Sequence[Setting]) -> list[tuple[list[Setting], bool]]:
    """The settings of each method in lines: through its scales at each k, or through k where there is one scale.

    Returns:
        Lines, and whether what changes along each is the scale.
    """
    lines: list[tuple[list[Setting], bool]] = []
    for method in dict.fromkeys(setting.method for setting in settings):
        own = [setting for setting in settings if setting.method == method]
        if len({setting.scale for setting in own}) == 1 and len(own) > 1:
            lines.append((sorted(own, key=lambda setting: setting.k), False))
        else:
            for k in sorted({setting.k for setting in own}):
                lines.append((sorted((s for s in own if s.k == k), key=lambda setting: setting.scale), True))
    return lines


def _label(setting: Setting, line: Sequence[Setting], by_scale: bool) -> str:
    """What is written beside a point: a lone point's method; of a line the scale or k, and at its end which k it has."""
    if len(line) == 1:
        return setting.method
    if not by_scale:
        return f"k={setting.k}"
    return f"{setting.scale:g}" + (f" (k={setting.k})" if setting == line[-1] and setting.k else "")


def _styles(request: SweepRequest) -> dict[str, tuple[str, str]]:
    """Each method's colour and marker, the same in all pictures."""
    others = [name for name in request.methods if name != request.baseline]
    count = len(_COLOURS)  # after so many methods the colours begin anew, beside other markers
    styles = {name: (_COLOURS[at % count], _MARKERS[(at + at // count) % count]) for at, name in enumerate(others)}
    return {request.baseline: _BASELINE, **styles}


def _legend(figure: Figure, request: SweepRequest, methods: Sequence[str], dashes: Mapping[str, Dash] | None = None) -> None:
    styles, dashes = _styles(request), dashes or {}
    shown = [name for name in styles if name in set(methods)]
    handles = [
        Line2D(
            [],
            [],
            color=styles[name][0],
            label=name,
            linewidth=1.4,
            linestyle=dashes.get(name, "-"),
            marker=None if name in dashes else styles[name][1],
            markersize=10 if styles[name][1] == "*" else 7,
            markerfacecolor="white",
        )
        for name in shown
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(_LEGEND_COLUMNS, len(handles)), fontsize=9, frameon=False
    )


def _plain_ticks(axis: Any, low: float | None, high: float | None) -> None:
    """Ticks of a cost ratio's logarithmic axis, as people write them."""
    ticks = [
        tick
        for tick in (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64)
        if (low or 0) <= tick * 1.0001 and tick <= (high or 64) * 1.0001
    ]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_ticklabels([f"{tick:g}" for tick in ticks])


def _what(found: dict[Setting, Mean]) -> str:
    seeds = max(len(mean.seeds) for mean in found.values())
    return f"test half of the real images, mean of {seeds} seed{'s' * (seeds > 1)}"


def _known(mean: Mean, *columns: str) -> bool:
    return all(mean.mean.get(column) is not None for column in columns)


def _figure(width: float, height: float) -> tuple[Figure, FigureCanvasAgg]:
    figure = Figure((width, height), dpi=_DPI, layout="constrained")
    return figure, FigureCanvasAgg(figure)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()
