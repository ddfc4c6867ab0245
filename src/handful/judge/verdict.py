"""What an evaluation says in plain words: what the images are worth, and what they gain over each baseline.

The bounds are ours, and coarse: shares of what real images get in the place of the generated ones, by the same judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handful.errors import counted
from handful.metrics.catalogue import headings
from handful.metrics.prdc import expected_coverage

GOOD, BAD = 0.9, 0.5  # shares of what real images get
COPIES = 0.1  # of the images: ten times what real images get by definition
# By metric: what is said where the images are good, fair and bad in it.
_WORDS = {
    "precision": ("they look like the real ones", "many do not look like the real ones", "most do not look like the real ones"),
    "coverage": ("they show the variety of the real ones", "they lack some of the variety", "they lack most of the variety"),
    "judge_accuracy": ("they show their classes", "some do not show their class", "most do not show their class"),
}
# By the kind of a gain (`kind_of`): what is said of F1, and how the metrics of that kind are listed.
_GAINS = {
    "survives": ("a real gain: it survives small changes such as JPEG", "real"),
    "partly": ("a gain that is partly real: part of it disappears after small changes such as JPEG", "partly real"),
    "adversarial": (
        "a gain that only the judge sees: it disappears after small changes such as JPEG",
        "seen only by the judge",
    ),
    "better": ("a gain larger than chance", "above chance"),
    "may be chance": ("better, but this may be chance", "perhaps chance"),
    "no gain": ("no gain", "none"),
    "worse": ("which is worse", "a loss"),
}


def verdict(found: Mapping[str, Any]) -> list[str]:
    """Sentences on what `Evaluation.to_dict` gives: first on the images, beginning with Good, Fair or Bad; then on each gain.

    What was not measured is left out.
    """
    ceiling = (found.get("pooled") or {}).get("ceiling") or {}
    weak = (ceiling.get("judge_accuracy") or 1.0) < BAD
    copied, worst, few = found.get("copied") or 0.0, 0, False
    good, reasons = list[str](), list[str]()
    for metric, words in _WORDS.items():
        value, real = found.get(metric), ceiling.get(metric)
        if value is not None and not (metric == "judge_accuracy" and (real is None or weak)):
            fewer = _fewer(found, ceiling) if metric == "coverage" and real is not None else 1.0
            few |= fewer < GOOD
            share = value / ((real or 1.0) * fewer)
            place = (share < GOOD) + (share < BAD)
            whose = "as few real images about" if fewer < GOOD else "real images"
            beside = "" if real is None else f"; {whose} {real * fewer:.3f}"
            (reasons if place else good).append(f"{words[place]} ({headings()[metric]} {value:.3f}{beside})")
            worst = max(worst, place)
    judged = bool(good or reasons)
    if copied >= COPIES:
        reasons.append(f"{100 * copied:.1f} % of them may be copies of exemplars (real images about 1 %)")
        worst = max(worst, 1)
    sentences = [f"{('Good', 'Fair', 'Bad')[worst]}: {', and '.join(reasons or good)}."] if judged or reasons else []
    if good and reasons:
        sentences[0] += f" What is good: {', and '.join(good)}."
    if few:
        sizes = found["pooled"]["generated"]
        sentences.append(
            f"Only {counted(sizes['n_generated'], 'image')} beside {sizes['n_real']:,} real ones: coverage, recall and Frechet"
            " distance are worse for it, and uncertain. Generate more (--per-class) to know the variety."
        )
    if weak:
        share = 100 * ceiling["judge_accuracy"]
        sentences.append(f"This judge gives only {share:.0f} % of the real images their own class: use another judge.")
    if copied >= COPIES:
        sentences.append(
            "A possible copy is nearer to an exemplar, pixel by pixel, than 99 % of the real images are: look at them in the"
            " report. Weaker guidance copies less, and so does chamfer with a margin: --set guidance.chamfer.margin=1 for a new"
            " run."
        )
    return sentences + [_gained(name, each["metrics"]) for name, each in (found.get("gains") or {}).items()]


def _fewer(found: Mapping[str, Any], ceiling: Mapping[str, Any]) -> float:
    """What part of the ceiling's coverage so many generated images can be expected to reach, at most 1."""
    sizes, k = (found.get("pooled") or {}).get("generated") or {}, found.get("k")
    if not k or not all(each.get("n_real", 0) > k and each.get("n_generated") for each in (sizes, ceiling)):
        return 1.0
    own, other = (expected_coverage(each["n_real"], each["n_generated"], k) for each in (sizes, ceiling))
    return min(1.0, own / other)


def kind_of(gain: Mapping[str, Any]) -> str:
    """What a gain is, in a word or two: its verdict, and its sign where it may be chance."""
    if gain.get("gain") is None or gain.get("interval") is None:
        return "-"
    (low, high), found = gain["interval"], gain.get("verdict")
    if found is None and low > 0:
        return "better"
    if found in (None, "no gain"):
        return "worse" if high < 0 else "may be chance" if gain["gain"] > 0 else "no gain"
    return found


def _gained(name: str, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """What is gained over a baseline: F1 first, then each metric by the kind of its gain."""
    kinds: dict[str, list[str]] = {}
    for metric, gain in metrics.items():
        kinds.setdefault(kind_of(gain), []).append(headings()[metric])
    kinds.pop("-", None)
    said = [f"{words} in {', '.join(kinds[kind])}" for kind, (_, words) in _GAINS.items() if kind in kinds]
    first, kind = metrics.get("f1") or {}, kind_of(metrics.get("f1") or {})
    if kind != "-":
        beside = f"F1 is {first['value']:.3f}, that of {name} {first['baseline']:.3f}: {_GAINS[kind][0]}."
        if kinds == {kind: [headings()["f1"]]}:
            return beside
        beside += " The gain is "
    else:
        beside = f"The gain over {name} is "
    return beside + "; ".join(said or ["not known"]) + "."
