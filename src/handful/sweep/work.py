"""The work of a sweep: set by set generated, measured and written down, so that a killed sweep goes on where it was."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from handful.data.exemplars import Exemplars
from handful.data.notebook import html_table
from handful.data.sources import labelled_files
from handful.errors import HandfulError, RequestError, RunError, first_line
from handful.generate import generate
from handful.judge.image_sets import FileImages, common_size
from handful.judge.measure import Referee, Training, train_on
from handful.runs.progress import Progress
from handful.runs.run_directory import explain_full_disk
from handful.sweep.checked import SweepJob
from handful.sweep.choice import Choice, choose
from handful.sweep.columns import TEST
from handful.sweep.counted import Operations
from handful.sweep.outputs import write_outputs
from handful.sweep.planned import PlannedSet, Setting
from handful.sweep.real import read_real
from handful.sweep.request import SweepRequest
from handful.sweep.results import Mean, Record, Row, means, parquet_of, rows_of
from handful.sweep.store import CHOSEN, MARK, OVER_K, PARETO, RESULTS, read_records, record_bytes, record_file, sweep_yaml

_TRIED = 8  # images of the set that warms up


@dataclass
class SweepResult:
    """What a sweep came to.

    Attributes:
        request: With all that is automatic replaced by what it became.
        done, resumed: Sets that were measured now; that had been before.
        failures: What went wrong, a text for each set.
    """

    out: Path
    request: SweepRequest
    rows: list[Row]
    sets: int
    done: int = 0
    resumed: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """Names of what was written beside the sets."""
        return [name for name in (RESULTS, CHOSEN, PARETO, OVER_K) if (self.out / name).is_file()]

    def means(self, split: str = TEST) -> dict[Setting, Mean]:
        """Each setting's means over the seeds on one half of the real images, `validation` or `test`."""
        return means(self.rows, split)

    def _repr_html_(self) -> str:
        columns = ("precision", "coverage", "f1", "robust_f1", "copied", "utility", "flops_ratio")
        rows = [[str(setting), *(mean.mean.get(column) for column in columns)] for setting, mean in self.means().items()]
        return html_table(str(self.out), ["setting", *columns], rows, [*self.failures, *self.notes])

    def choice(self) -> Choice:
        """What the objective prefers."""
        return choose(self.rows, self.request)


def run_sweep(
    job: SweepJob,
    progress: Progress | None = None,
    *,
    order: Iterable[int] | None = None,
    cache: Path | None = None,
    outputs: bool = True,
) -> SweepResult:
    """Generates and measures what is not there yet, and writes the results.

    Args:
        progress: Is notified of every set; None: nobody is.
        order: Places of the pending sets, in the order to make them; None: as planned. It changes no row but its seconds.
        cache: Where exemplar features are kept; see `handful.generate`.
        outputs: Whether the chosen recipe and the pictures are written too; a sweep that is about to grow needs none yet.

    Returns:
        The result. Sets that failed are in `failures`; the next run tries them again.

    Raises:
        RequestError: If another process works in the directory, or has begun there meanwhile.
        RunError: If the disk is full.
    """
    progress = progress or Progress()
    directory, request = job.directory, job.request
    result = SweepResult(directory.path, request, [], len(job.sets), notes=list(job.notes))
    with explain_full_disk(directory.path), directory.locked():
        if directory.stored() != job.stored:
            problem = "meanwhile another process has begun or continued a run there"
            raise RequestError("out", directory.path, problem, "Repeat the same command.")
        records = read_records(directory, job.sets)
        result.resumed = sum(bool(record.get("measured")) for record in records.values())
        directory.publish(MARK, sweep_yaml(request, job.provenance))
        pending = [job.pending[place] for place in (range(len(job.pending)) if order is None else order)]
        if pending:
            work = _Work(job, cache)
            result.notes += [work.note] * bool(work.note)
            progress.begin(result.resumed + len(pending), result.resumed)
            try:
                for planned in pending:
                    try:
                        work.make(planned, records, progress)
                        result.done += 1
                    except OSError:  # a full disk is full for the next set too
                        raise
                    except Exception as error:  # one set of a night's work must not end the others, whatever it raises
                        result.failures.append(f"{planned}: {_said(error)}")
                        progress.note(f"failed: {result.failures[-1]}")
                        continue
                    directory.publish(RESULTS, parquet_of(rows_of(job.sets, records, request.baseline)))
            finally:
                progress.end()
        result.rows = rows_of(job.sets, records, request.baseline)
        directory.publish(RESULTS, parquet_of(result.rows))
        if outputs:
            write_outputs(directory, job.sets, result.rows, request)
    return result


class _Work:
    """What all sets are made and measured with."""

    def __init__(self, job: SweepJob, cache: Path | None) -> None:
        assert job.judge is not None
        assert job.image_shape is not None
        self.job, self.cache = job, cache
        # as `handful evaluate` reads them, so that both find the same; classifiers are trained at the images' own size
        request, self.channels, self.made_size = job.request, job.judge.channels or 3, job.image_shape[1:]
        listed = labelled_files(job.real.root, classes=job.classes, field="real")
        self.size, self.note = common_size(job.judge.size, self.made_size, [FileImages(listed, "real")])
        self.real = read_real(request, job.real, job.test, channels=self.channels, size=self.size, test_size=self.made_size)
        self.referees = {
            split: Referee(
                half,
                job.judge,
                k=request.neighbours,
                audit=request.audit,
                judge_class=request.judge_class,
                test=self.real.tests.get(split),
            )
            for split, half in self.real.halves.items()
        }
        self.operations = Operations(request)
        self._generating = 0.5  # share of a set's time that sampling takes; known after the first
        self._warm_up()

    def make(self, planned: PlannedSet, records: dict[str, Record], progress: Progress) -> None:
        """Generates and measures one set, and writes its record."""
        directory, record = self.job.directory, records.get(planned.name)
        began = perf_counter()
        out = directory.path / planned.name
        inside = _Inside(progress, self._generating, str(planned))
        summary = generate(
            planned.recipe, out, progress=inside, cache=self.cache, allow_version_change=self.job.allow_version_change
        )
        generated = perf_counter()
        if summary.failures:
            raise RunError(summary.failures[0])
        # of a run that went on, so many seconds as the whole would have taken at its rate
        seconds = summary.images / summary.images_per_second if summary.images_per_second else (record or {}).get("seconds")
        record = {
            "recipe": planned.recipe.as_dict(),
            "images": summary.images,
            "seconds": seconds,
            "flops_ratio": self.operations.ratio(planned),
            "measured": None,
        }
        directory.publish(record_file(planned), record_bytes(record))
        record["measured"] = self.measured(planned, out)
        directory.publish(record_file(planned), record_bytes(record))
        records[planned.name] = record
        self._generating = (generated - began) / (perf_counter() - began)
        inside.finish()

    def measured(self, planned: PlannedSet, folder: Path) -> dict[str, dict[str, Any]]:
        """What both halves of the real images say of a set."""
        listed = labelled_files(folder, classes=self.job.classes, field="set")
        made = FileImages(listed, "set").seen_as(self.channels, self.size)
        asked, networks = self.job.request.utility, []
        if asked is not None:
            training = Training(asked.steps, asked.seeds, asked.augment, asked.flip)
            own = listed.read(channels=self.channels, size=self.made_size, field="set")
            networks = train_on(own, self.job.classes, training, seed=planned.seed)
        exemplars, seen = self._exemplars(planned), next(iter(self.referees.values())).see(made)
        return {split: referee.row(made, exemplars, networks, seen) for split, referee in self.referees.items()}

    def _exemplars(self, planned: PlannedSet) -> dict[str, Any] | None:
        """What a copy would be a copy of: the set's exemplars, or the most that any method has where none guided it."""
        pool = self.job.exemplars
        most = planned.setting.k or max(each.setting.k for each in self.job.sets)
        if pool is None or not most:
            return None
        return Exemplars.from_folder(
            pool.root, channels=self.channels, size=self.size, k=most, seed=planned.seed, minimum=1
        ).images

    def _warm_up(self) -> None:
        """Samples a few images and forgets them: what a process does once must not count as the first set's seconds."""
        baseline = next(each for each in self.job.sets if each.setting.method == self.job.request.baseline)
        few = {"classes": (self.job.classes[0],), "per_class": _TRIED, "cohort": _TRIED}
        with tempfile.TemporaryDirectory() as folder:
            try:
                generate(baseline.recipe.model_copy(update=few), Path(folder) / "warm-up", cache=self.cache)
            except (HandfulError, RuntimeError):
                return  # the set itself reports it, when it is made


class _Inside(Progress):
    """Passes a run's progress on as fractions of one set."""

    def __init__(self, outer: Progress, share: float, now: str) -> None:
        self._outer, self._share, self._now = outer, share, now
        self._total, self._told = 1, 0.0

    def begin(self, total: int, done: int) -> None:
        self._total = max(1, total)
        self._tell(self._share * done / self._total)

    def advance(self, amount: float, now: str = "") -> None:
        self._tell(self._share * amount / self._total)

    def note(self, text: str) -> None:
        self._outer.note(f"{self._now}: {text}")

    def finish(self) -> None:
        """The set is measured too."""
        self._tell(1 - self._told)

    def _tell(self, amount: float) -> None:
        self._told += amount
        self._outer.advance(amount, self._now)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, HandfulError) else f"{type(error).__name__}: {first_line(error)}"
