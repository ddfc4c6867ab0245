"""The picture of a calibration: reliability at three steps, calibration error along the path, and in all.

confidence against accuracy, plain and chosen:   early | middle | late
calibration error at every step, a line a candidate:   shown x0_hat | shown x_t | integrals, best first

Matplotlib's objects alone, no state of pyplot's: nothing of the caller's figures is touched.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from handful.calibrate.analysis import Found
from handful.calibrate.candidates import PLAIN, Candidate

# Okabe and Ito's colours, which colour-blind people tell apart.
_PLAIN, _CHOSEN = "#555555", "#D55E00"
_BY_BETA = ("#000000", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[Any, ...] = ((5, 2), (1.5, 1.5), (6, 1.5, 1.5, 1.5), (3, 1, 1, 1, 1, 1))
_MOST_BARS = 14
_SMALL = 8.5


def reliability_png(found: Mapping[str, Found], chosen: Candidate, title: str) -> bytes:
    """Draws it."""
    figure = Figure(figsize=(14, 9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    figure.suptitle(title, fontsize=12)
    plain, other = found[PLAIN.name], _alike(found, chosen)
    for place, (axis, step) in enumerate(zip(axes[0], sorted(plain.reliability), strict=False)):
        _reliability(axis, plain, other, step)
        axis.set_ylabel("accuracy" if place == 0 else "")
        axis.legend(loc="upper left", fontsize=_SMALL, frameon=False)
    for axis in axes[0][len(plain.reliability) :]:
        axis.set_axis_off()
    distinct = list({each.candidate.probabilities: each for each in found.values()}.values())
    styles = _Styles(distinct)
    for axis, looks, shown in zip(axes[1], ("x0_hat", "x_t"), ("the estimate x0_hat", "x_t, scaled"), strict=False):
        of_view = [each for each in distinct if each.candidate.looks == looks]
        if of_view:
            _along(axis, of_view, styles, f"shown {shown}")
        else:
            axis.set_axis_off()
    figure.legend(handles=styles.legend(), loc="outside lower center", ncols=12, fontsize=9, frameon=False)
    axes[1][0].set_ylabel("calibration error")
    _bars(axes[1][2], distinct, styles, chosen)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})  # a version in the file would make it another
    return stream.getvalue()


def _alike(found: Mapping[str, Found], chosen: Candidate) -> Found:
    """A chosen tau2 that calibration has not listed has the numbers of its like."""
    return next(each for each in found.values() if each.candidate.probabilities == chosen.probabilities)


def _reliability(axis: Axes, plain: Found, chosen: Found, step: int) -> None:
    at = plain.steps[step]
    axis.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1, zorder=0)
    pairs = [(plain, _PLAIN, "plain")] + ([(chosen, _CHOSEN, "chosen")] if chosen is not plain else [])
    for place, (each, colour, name) in enumerate(pairs):
        of = each.reliability[step]
        there = of.count > 0
        sizes = 12 + 160 * of.count[there] / of.count.sum()
        label = f"{name}: ECE {each.steps[step].ece:.2f} (chance {each.steps[step].chance:.2f})"
        axis.plot(of.confidence[there], of.accuracy[there], color=colour, linewidth=1.2, alpha=0.7, zorder=1 + place)
        axis.scatter(
            of.confidence[there],
            of.accuracy[there],
            s=sizes,
            color=colour,
            alpha=0.75,
            label=label,
            edgecolors="white",
            linewidths=0.6,
            zorder=2 + place,
        )
    axis.set_xlim(0, 1.02)
    axis.set_ylim(-0.03, 1.05)
    axis.set_xlabel("confidence")
    noise = "∞" if math.isinf(at.sigma_over_alpha) else f"{at.sigma_over_alpha:.3g}"
    axis.set_title(f"step {step + 1} of {len(plain.steps)}, sigma/alpha {noise}", fontsize=10)
    axis.grid(alpha=0.2)


class _Styles:
    """A colour for each Softplus, dashes for each temperature; a fitted one is a full, bold line."""

    def __init__(self, found: Sequence[Found]) -> None:
        self._betas = list(dict.fromkeys(each.candidate.softplus for each in found))
        self._taus = list(dict.fromkeys(each.candidate.tau1 for each in found if not each.candidate.fitted))

    def colour(self, candidate: Candidate) -> str:
        return _BY_BETA[self._betas.index(candidate.softplus) % len(_BY_BETA)]

    def line(self, candidate: Candidate) -> dict[str, Any]:
        if candidate.fitted:
            return {"color": self.colour(candidate), "linewidth": 2.4, "linestyle": "-"}
        if candidate.tau1 == 1:
            return {"color": self.colour(candidate), "linewidth": 1.1, "linestyle": "-"}
        dashes = _DASHES[self._taus.index(candidate.tau1) % len(_DASHES)]
        return {"color": self.colour(candidate), "linewidth": 1.1, "linestyle": (0, dashes)}

    def legend(self) -> list[Line2D]:
        shown = [Candidate(beta) for beta in self._betas]
        lines = [Line2D([], [], color=self.colour(each), linewidth=4, label=each.name.split(",")[0]) for each in shown]
        lines += [
            Line2D([], [], **{**self.line(Candidate(None, "x0_hat", tau1, tau1)), "color": "#000000"}, label=f"tau1 = {tau1:g}")
            for tau1 in self._taus
        ]
        return [*lines, Line2D([], [], color="#000000", linewidth=2.4, label="fitted T")]


def _along(axis: Axes, found: Sequence[Found], styles: _Styles, title: str) -> None:
    steps = np.array([at.step for at in found[0].steps])
    ratios = [at.sigma_over_alpha for at in found[0].steps]
    for step, ratio in zip(steps, ratios, strict=True):  # darker where there is more noise
        share = 1.0 if math.isinf(ratio) else ratio / math.hypot(1, ratio)
        axis.axvspan(step + 0.5, step + 1.5, color="#9AA5B1", alpha=0.45 * share, linewidth=0)
    for each in sorted(found, key=lambda one: one.candidate.fitted):
        axis.plot(steps + 1, [at.ece for at in each.steps], **styles.line(each.candidate))
    chance = [at.chance for at in found[0].steps]
    axis.fill_between(steps + 1, chance, color="white", alpha=0.75, hatch="///", edgecolor="#888888", linewidth=0)
    axis.set_xlim(0.5, len(steps) + 0.5)
    axis.set_ylim(0, max(at.ece for each in found for at in each.steps) * 1.08 + 0.01)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step; darker: more noise; hatched: chance alone (plain)")


def _bars(axis: Axes, found: Sequence[Found], styles: _Styles, chosen: Candidate) -> None:
    order = sorted(found, key=lambda each: each.integral)
    shown = order[:_MOST_BARS]
    for each in order[_MOST_BARS:]:  # these two are what one looks for
        if each.candidate.probabilities in (PLAIN.probabilities, chosen.probabilities):
            shown.append(each)
    longest = max(each.integral + each.error for each in shown)
    for place, each in enumerate(shown):
        of = each.candidate
        mark = " (plain)" if of.probabilities == PLAIN.probabilities else ""
        mark = " (chosen)" if of.probabilities == chosen.probabilities else mark
        axis.barh(
            place,
            each.integral,
            xerr=each.error,
            color=styles.colour(of),
            alpha=0.75,
            height=0.7,
            error_kw={"elinewidth": 1, "ecolor": "#333333"},
        )
        axis.plot([each.mean("chance")] * 2, [place - 0.35, place + 0.35], color="white", linewidth=2)
        kind = "fitted T" if of.fitted else f"tau1 {of.tau1:g}"
        name = f"{'relu' if of.softplus is None else f'softplus {of.softplus:g}'}, {of.looks}, {kind}{mark}"
        axis.text(
            each.integral + each.error + 0.015 * longest,
            place,
            name,
            fontsize=_SMALL,
            va="center",
            weight="bold" if mark else "normal",
        )
    axis.set_xlim(0, longest * 1.85)  # room for the names
    axis.set_yticks([])
    axis.invert_yaxis()
    axis.set_xlabel("integral calibration error ± standard error; white: chance")
    more = len(order) - len(shown)
    axis.set_title("mean over the path" + (f", the best of {len(order)}" if more > 0 else ""), fontsize=10)
