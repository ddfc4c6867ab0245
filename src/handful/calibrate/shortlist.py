"""Which pre-conditioning it shall be: a shortlist by calibration alone, and a choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from handful.calibrate.analysis import Found
from handful.calibrate.candidates import PLAIN, Candidate
from handful.guidance.classifier import ClassifierRequest

ADVERSARIAL = (
    "the choice uses calibration alone, without real images: a calibrated classifier may still guide adversarially, and "
    "scale, jacobian and steps are defaults. Give --real and --judge to choose by gains that survive mild transforms"
)
CONSTANT = "the classifier's output does not depend on the image: it has no gradient, and can't guide"


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        settings: Of the term beyond it: scale, jacobian, every, gain.
        by: "calibration", or the objective that decided.
        notes: What the user should know of it.
    """

    candidate: Candidate
    settings: Mapping[str, Any] = field(default_factory=dict)
    by: str = "calibration"
    notes: tuple[str, ...] = ()

    def request(self, base: ClassifierRequest, found: Mapping[str, Found]) -> ClassifierRequest:
        """The term."""
        return self.candidate.request(base, temperatures_of(self.candidate, found), **self.settings)


def temperatures_of(candidate: Candidate, found: Mapping[str, Found]) -> tuple[tuple[float, float], ...]:
    """The temperatures fitted to what a candidate sees; empty for one without."""
    if not candidate.fitted:
        return ()
    return next(each.temperatures for each in found.values() if each.candidate.fitted and each.candidate.sees == candidate.sees)


def preferred(found: Iterable[Found]) -> Found | None:
    """The best calibrated; of all that so few images can't distinguish from it, the most informative.

    The integral calibration error alone prefers a classifier that says nothing: fitted to pure noise, every temperature ends
    there, and what is never sure has the least error by chance. So it is what exceeds chance that is compared, and among those
    within two standard errors of the lowest, -log p of the class asked for decides, which is a proper score. What has no
    gradient is passed over; of equals the first is taken.
    """
    guiding = [each for each in found if each.guides]
    if not guiding:
        return None
    best = min(guiding, key=lambda each: each.excess)
    alike = [each for each in guiding if each.excess <= best.excess + 2 * max(best.error, each.error)]
    return min(alike, key=lambda each: each.mean("nll"))


def shortlist(found: Mapping[str, Found]) -> list[Found]:
    """What real images shall decide between: the plain classifier, and of each input the preferred candidate with a fitted
    temperature and without. Inputs and fitting are not played off against each other by calibration, see `preferred`.
    """
    kinds: dict[tuple[str, bool], list[Found]] = {}
    for each in found.values():
        kinds.setdefault((each.candidate.looks, each.candidate.fitted), []).append(each)
    chosen = [found[PLAIN.name], *(best for kind in kinds.values() if (best := preferred(kind)))]
    return [each for each in {one.candidate.name: one for one in chosen}.values() if each.guides]


def by_calibration(found: Mapping[str, Found]) -> Choice:
    """The choice without real images: what is `preferred` of all."""
    best, plain = preferred(found.values()), found[PLAIN.name]
    if best is None:
        return Choice(PLAIN, notes=(CONSTANT,))
    notes = [ADVERSARIAL]
    if best is not plain and best.gain < 2 * best.gain_error:
        notes.append(f"it is not clearly better calibrated than the plain classifier: {best.gain:.3f} ± {best.gain_error:.3f}")
    if best.mean("accuracy") < plain.mean("accuracy") - 0.05:
        notes.append(
            f"it is right on fewer images ({best.mean('accuracy'):.2f}) than the plain classifier on x0_hat "
            f"({plain.mean('accuracy'):.2f}): an uninformative classifier is easily calibrated"
        )
    return Choice(best.candidate, notes=tuple(notes))
