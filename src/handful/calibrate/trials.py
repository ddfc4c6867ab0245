"""What survives: small guided sets of every shortlisted pre-conditioning, judged by someone else and audited.

The sets are sweeps (`handful.sweep`), so an interrupted trial goes on, and settings are chosen on one half of the real images
and reported on the other. First every candidate at every jacobian and scale, each on as many steps as the bound on the time
allows; then scales beyond the best one's, if it was the last of the list; then, for the best, what calibration can't see: tau2
and the gain over time. At the end the winner is made again with other noise, beside no guidance and the plain classifier, since
the best of many looks better than it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from handful.calibrate.analysis import Found
from handful.calibrate.candidates import PLAIN, Candidate
from handful.calibrate.cost import affordable, overheads
from handful.calibrate.shortlist import Choice, temperatures_of
from handful.data.images import image_folder
from handful.errors import RequestError, RunError, counted
from handful.features.extractor import FeatureExtractor
from handful.features.registry import load_extractor
from handful.files.digests import marks
from handful.generate.job import Job
from handful.guidance import Classifier, Pull
from handful.guidance.base import Jacobian
from handful.guidance.classifier import ClassifierRequest
from handful.recipe.schema import ExemplarsRequest, did_you_mean
from handful.runs.job_directory import OwnedDirectory
from handful.runs.progress import Progress, Words
from handful.sweep.checked import prepare_sweep
from handful.sweep.columns import TEST, improvement, numbers
from handful.sweep.request import MethodRequest, SweepRequest, UtilityRequest
from handful.sweep.results import Row
from handful.sweep.work import SweepResult, run_sweep

TRIALS, CONFIRMED = "trials", "confirmed"  # the sweeps' folders
COSTS = "step_costs.json"
SETS = Words("trying", "tried", "sets")
NONE = "none"
_EDGES = 2  # scales tried beyond the list, each twice or half the last one
_CONFIRMING = 2  # seeds
_CHOSEN, _PLAIN = "chosen", "plain"
Settings = dict[str, Any]


@dataclass(frozen=True)
class TrialsRequest:
    """What real images decide.

    Attributes:
        real: A folder with a folder of real images per class, never the exemplars.
        judge: An extractor that is unrelated to the classifier.
        objective: The column of a sweep that decides.
        max_cost: The longest sampling time, relative to sampling without guidance.
        jacobians: Ways to take the gradient; one that is shown x_t needs none.
        per_class: Images of each class in a set.
    """

    real: str
    judge: str
    objective: str = "robust_frechet"
    max_cost: float = 1.15
    scales: tuple[float, ...] = (0.2, 0.4, 0.8)
    jacobians: tuple[Jacobian, ...] = ("gaussian", "exact")
    per_class: int = 32

    def __post_init__(self) -> None:
        if self.objective not in numbers():
            raise RequestError(
                "--objective", self.objective, "there is no such column", did_you_mean(self.objective, numbers(), "Columns")
            )
        if not self.max_cost > 1:
            problem = "guidance always takes some time, so the bound must be above 1"
            raise RequestError("--max-cost", self.max_cost, problem, "Use 1.15 for 15 % more than plain sampling.")
        if not self.scales or not all(0 < scale < 1e6 for scale in self.scales) or len(set(self.scales)) < len(self.scales):
            raise RequestError("--scales", list(self.scales), "scales must be distinct positive numbers", "Use 0.2,0.4,0.8.")
        if not self.jacobians:
            raise RequestError("--jacobians", [], "no way to take the gradient is given", "Use gaussian,exact.")
        for jacobian in self.jacobians:
            if jacobian not in get_args(Jacobian):
                problem = "there is no such way to take the gradient"
                raise RequestError("--jacobians", jacobian, problem, f"Choose of: {', '.join(get_args(Jacobian))}.")
        if self.per_class < 1:
            raise RequestError("--trial-per-class", self.per_class, "a set needs at least one image", "Use 32.")

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Way:
    """One way to guide that was tried: a method of the sweep.

    Attributes:
        settings: Of the term, but for its scale.
        predicted: The sampling time relative to no guidance, from timing single steps.
    """

    candidate: Candidate
    settings: Settings
    predicted: float

    @property
    def name(self) -> str:
        """The method's."""
        of = self.candidate
        taus = f"{'fitted' if of.fitted else f'tau{of.tau1:g}'}-{of.tau2:g}"
        gain = self.settings.get("gain", "constant")
        softplus = "relu" if of.softplus is None else f"softplus{of.softplus:g}"
        shown = (softplus, of.looks, taus, self.settings["jacobian"], f"every{self.settings['every']}")
        return "-".join(shown) + ("" if gain == "constant" else f"-{gain}")


@dataclass
class Trials:
    """What came of them.

    Attributes:
        rows: Of the sweep: a row for each set and half of the real images.
        confirmed: The same of the sets made again with other noise: methods none, plain and chosen.
        chosen, scale: The method that won, and its scale.
    """

    objective: str
    ways: dict[str, Way]
    rows: list[Row]
    confirmed: list[Row] = field(default_factory=list)
    chosen: str = ""
    scale: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def way(self) -> Way:
        return self.ways[self.chosen]

    def confirmed_mean(self, method: str, column: str) -> float | None:
        """Over the seeds, on the half of the real images that nothing was chosen by."""
        values = [row[column] for row in self.confirmed if row["method"] == method and row["split"] == TEST]
        return sum(values) / len(values) if values and None not in values else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        methods = {
            name: {"candidate": way.candidate.name, **way.settings, "predicted_cost": way.predicted}
            for name, way in self.ways.items()
        }
        return {
            "objective": self.objective,
            "chosen": self.chosen,
            "scale": self.scale,
            "methods": methods,
            "rows": self.rows,
            "confirmed": self.confirmed,
            "notes": self.notes,
        }


def check_trials(request: TrialsRequest, job: Job, classifier: FeatureExtractor) -> list[str]:
    """Refuses, before the long work, what the trials would refuse after it."""
    classes = list(dict.fromkeys(cohort.class_name for cohort in job.cohorts))
    image_folder(request.real, classes=classes, field="--real")
    judge = load_extractor(request.judge)
    if "judge_accuracy" in request.objective and not judge.is_classifier:
        problem = f"the judge {request.judge} is not a classifier, which this objective needs"
        remedy = "Choose another column, or use a classifier as the judge."
        raise RequestError("--objective", request.objective, problem, remedy)
    if judge.digest == classifier.digest or marks(judge) & marks(classifier):
        return [f"{request.judge} both guides and judges, so it judges its own work: use an unrelated judge"]
    return []


def most_sets(request: TrialsRequest) -> int:
    """How many sets at most: every shortlisted candidate (see `calibrate.shortlist.shortlist`), refined and confirmed."""
    ways = 3 * len(request.jacobians) + 2
    return 1 + ways * len(request.scales) + _EDGES + 4 + 3 * _CONFIRMING


def step_costs(
    request: TrialsRequest,
    job: Job,
    candidates: Sequence[Candidate],
    classifiers: Mapping[float | None, FeatureExtractor],
    directory: OwnedDirectory,
) -> dict[str, float]:
    """What a guided step adds to an unguided one, by Softplus, input and jacobian; temperatures cost nothing.

    It is measured once and kept: measured again, it could change on how many steps a way guides, and what was tried is lost.

    Raises:
        RequestError: If the bound on the time allows no way to guide on even one step.
    """
    added: dict[str, float] = {}
    with suppress(OSError, ValueError):
        added = json.loads((directory.path / COSTS).read_text(encoding="utf-8"))
    if not added:
        terms = {
            _key(of, jacobian): Classifier(classifiers[of.softplus], 0, 0.1, pull=Pull(jacobian=jacobian, input=of.looks))
            for of in candidates
            for jacobian in _jacobians(request, of)
        }
        added = overheads(job, terms, min(job.recipe.cohort, request.per_class))
        directory.publish(COSTS, (json.dumps(added, indent=1) + "\n").encode())
    if all(affordable(job, each, request.max_cost) is None for each in added.values()):
        problem = (
            f"even guidance on a single one of {counted(job.levels.steps, 'step')} takes more: it adds "
            f"{min(added.values()):.0%} to that step"
        )
        raise RequestError("--max-cost", request.max_cost, problem, "Raise --max-cost, or use more sampling steps (--steps).")
    return added


def run_trials(
    request: TrialsRequest,
    job: Job,
    listed: Sequence[Found],
    base: ClassifierRequest,
    found: Mapping[str, Found],
    added: Mapping[str, float],
    taus: Sequence[tuple[float, float]],
    folder: Path,
    progress: Progress,
) -> Trials:
    """Tries the shortlist, refines the best, and makes it again with other noise.

    Args:
        found: All candidates, for their temperatures.
        added: From `step_costs`.
        taus: Among which tau2 is refined.

    Raises:
        RequestError: If none of the shortlist can guide within the bound on the time.
        RunError: If no set can be made.
    """
    ways = [
        way
        for each in listed
        for jacobian in _jacobians(request, each.candidate)
        if (way := _way(request, job, each.candidate, jacobian, added))
    ]
    if not ways:
        problem = "the best calibrated candidates take more even on a single step"
        raise RequestError("--max-cost", request.max_cost, problem, "Raise --max-cost, or use more sampling steps (--steps).")
    skipped = sum(len(_jacobians(request, each.candidate)) for each in listed) - len(ways)
    sweeping = _Sweeping(request, job, base, found, folder, progress)
    best, scale = sweeping.with_ways(ways, request.scales)
    for _ in range(_EDGES):
        scales = sweeping.scales[best.name]
        if scale not in (min(scales), max(scales)):
            break
        best, scale = sweeping.with_ways([best], [scale * 2 if scale == max(scales) else scale / 2])
    best, scale = sweeping.with_ways(_refined(best, taus), [scale], last=True)
    trials = Trials(
        request.objective,
        sweeping.ways,
        sweeping.result.rows,
        chosen=best.name,
        scale=scale,
        notes=list(sweeping.result.failures),
    )
    if skipped:
        trials.notes.append(
            f"left out, as a single step takes longer than --max-cost {request.max_cost:g}: {counted(skipped, 'candidate')}"
        )
    trials.confirmed = sweeping.confirmed(best, scale)
    return trials


def by_trials(trials: Trials) -> Choice:
    """What real images chose, and how much of it was there to see for images and noise that had no say."""
    column, notes = trials.objective, list(trials.notes)
    of = {name: trials.confirmed_mean(name, column) for name in (NONE, _PLAIN, _CHOSEN)}
    told = ", ".join(f"{name} {value:.3f}" for name, value in of.items() if value is not None)
    notes.append(f"{column} with new noise, on real images that were not used to choose: {told}")
    if not better(column, of[_CHOSEN], of[NONE]):
        notes.append(
            "there the guidance is no better than no guidance: this classifier does not help this model on so few steps"
        )
    elif of[_PLAIN] is None:
        notes.append("the plain classifier won: no other pre-conditioning was better")
    elif not better(column, of[_CHOSEN], of[_PLAIN]):
        notes.append("there the plain classifier is as good: the pre-conditioning brings no lasting gain")
    cost = trials.confirmed_mean(_CHOSEN, "cost_ratio")
    notes.append(
        f"sampling time relative to no guidance: {trials.way.predicted:.2f} predicted from single steps"
        + ("" if cost is None else f", {cost:.2f} measured in the sets")
    )
    return Choice(trials.way.candidate, {"scale": trials.scale, **trials.way.settings}, column, tuple(notes))


def better(objective: str, one: float | None, other: float | None) -> bool:
    """Whether one value of a column is better than another."""
    return one is not None and other is not None and improvement(objective, one, other) > 0


def _jacobians(request: TrialsRequest, candidate: Candidate) -> tuple[Jacobian, ...]:
    # at x_t there is no denoiser to go back through
    return request.jacobians if candidate.looks == "x0_hat" else ("identity",)


def _key(candidate: Candidate, jacobian: str) -> str:
    return f"{candidate.softplus} {candidate.looks} {jacobian}"


def _way(request: TrialsRequest, job: Job, candidate: Candidate, jacobian: Jacobian, added: Mapping[str, float]) -> Way | None:
    """On as many steps as the bound allows."""
    can = affordable(job, added[_key(candidate, jacobian)], request.max_cost)
    return None if can is None else Way(candidate, {"jacobian": jacobian, "every": can[0]}, can[1])


def _refined(best: Way, taus: Sequence[tuple[float, float]]) -> list[Way]:
    """What calibration can't see of the best way: other tau2 of the same tau1, and other gains."""
    of = best.candidate
    others = [replace(of, tau2=tau2) for tau1, tau2 in taus if tau1 == of.tau1 and tau2 != of.tau2]
    gains = [replace(best, settings={**best.settings, "gain": gain}) for gain in ("linear", "sine")]
    return [*(replace(best, candidate=each) for each in others), *gains]


class _Sweeping:
    """A sweep that grows: ways and scales are added, what was measured stays."""

    def __init__(
        self,
        request: TrialsRequest,
        job: Job,
        base: ClassifierRequest,
        found: Mapping[str, Found],
        folder: Path,
        progress: Progress,
    ) -> None:
        self._request, self._job, self._base, self._found = request, job, base, found
        self._folder, self._progress = folder, progress
        self.ways: dict[str, Way] = {}
        self.scales: dict[str, list[float]] = {}
        self.result: SweepResult

    def with_ways(self, ways: Sequence[Way], scales: Sequence[float], *, last: bool = False) -> tuple[Way, float]:
        """Adds ways at scales, makes their sets, and says which way and scale is the best of all.

        Args:
            last: Whether none are added after these; the sweep's pictures are drawn then.
        """
        for way in ways:
            self.ways.setdefault(way.name, way)
            known = self.scales.setdefault(way.name, [])
            known += [scale for scale in scales if scale not in known]
        methods = {name: self._method(way, self.scales[name]) for name, way in self.ways.items()}
        self.result = self._sweep(methods, (self._job.recipe.seed,), self._folder / TRIALS, last)
        best = self._best(self.ways)
        if best is None:
            raise RunError("no set could be generated: " + "; ".join(self.result.failures[:3]))
        return best

    def _best(self, names: Iterable[str]) -> tuple[Way, float] | None:
        """Of these ways, with its scale; the first of equals."""
        picks = self.result.choice().methods
        best: tuple[Way, float] | None = None
        value = None
        for name in names:
            found = picks[name].validation.mean[self._request.objective] if name in picks else None
            if found is not None and (best is None or better(self._request.objective, found, value)):
                best, value = (self.ways[name], picks[name].setting.scale), found
        return best

    def confirmed(self, best: Way, scale: float) -> list[Row]:
        """Rows of no guidance, the plain classifier at its best and the winner, made with other noise."""
        methods = {_CHOSEN: self._method(best, [scale])}
        if best.candidate != PLAIN:
            plain = self._best(name for name, way in self.ways.items() if way.candidate == PLAIN)
            methods |= {_PLAIN: self._method(plain[0], [plain[1]])} if plain else {}
        first = self._job.recipe.seed + 1
        return self._sweep(methods, tuple(range(first, first + _CONFIRMING)), self._folder / CONFIRMED).rows

    def _method(self, way: Way, scales: Sequence[float]) -> MethodRequest:
        term = way.candidate.request(self._base, temperatures_of(way.candidate, self._found), **way.settings)
        return MethodRequest(guidance=(term,), scales=tuple(sorted(scales)))

    def _sweep(
        self, methods: Mapping[str, MethodRequest], seeds: tuple[int, ...], out: Path, outputs: bool = True
    ) -> SweepResult:
        asked = self._request
        recipe = self._job.recipe.model_copy(
            update={"guidance": (), "exemplars": ExemplarsRequest(), "per_class": asked.per_class, "seed": 0}
        )
        job = prepare_sweep(
            SweepRequest(
                recipe=recipe,
                methods={NONE: MethodRequest(guidance=()), **methods},
                seeds=seeds,
                real=asked.real,
                judge=asked.judge,
                objective=asked.objective,
                utility=UtilityRequest() if "utility" in asked.objective else None,
            ),
            out,
        )
        return run_sweep(job, self._progress, outputs=outputs)
