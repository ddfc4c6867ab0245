"""From logits to numbers: planted faults are found, what says nothing is not preferred, and the rules of the choice."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.calibration import asked
from torch import Tensor

from handful.calibrate import prepare
from handful.calibrate.analysis import Found, analyse, drawn_steps, roughness
from handful.calibrate.candidates import PLAIN, Candidate, candidates, read_betas, read_taus
from handful.calibrate.cost import affordable
from handful.calibrate.shortlist import by_calibration, preferred, shortlist
from handful.calibrate.watch import Recorded, cohort_file, kept_steps, logits_name
from handful.errors import RequestError
from handful.features.registry import load_extractor
from handful.generate.job import Job
from handful.guidance import Classifier


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The reverse process of 120 images of two classes, in cohorts of 25; nothing is sampled."""
    return prepare(asked(per_class=60, cohort=25), tmp_path_factory.mktemp("run") / "out").run


def plant(run: Job, folder: Path, logits: dict[str, Tensor]) -> tuple[Recorded, Tensor]:
    """Writes the files of a reverse process whose logits are given: (steps, n, classes) by name."""
    first = 0
    for cohort in run.cohorts:
        file = folder / cohort_file(cohort)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: of[:, first : first + cohort.count].contiguous() for name, of in logits.items()}, file)
        first += cohort.count
    recorded = Recorded(run, folder)
    return recorded, torch.tensor([int(name) for name, _ in recorded.places()])


def calibrated(steps: int, labels: Tensor, classes: int, scale: float, seed: int) -> Tensor:
    """Logits (steps, n, classes) that are calibrated for labels of which all are equally likely: f_j ~ N(s^2 [j = y], s^2)."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, len(labels), classes, generator=draw)
    return scale * noise + scale**2 * torch.nn.functional.one_hot(labels, classes)


def test_the_planted_logits_are_calibrated():
    """p(y | f) of Gaussians of one variance s^2 whose means are s^2 apart is softmax(f): checked on many draws."""
    labels = torch.arange(20_000) % 10
    logits = calibrated(1, labels, 10, 1.5, 0)[0].double()
    confidence, place = logits.softmax(1).max(1)
    assert float(confidence.mean()) == pytest.approx(float((place == labels).double().mean()), abs=0.015)


@pytest.fixture(scope="module")
def planted(run: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """x0_hat is informative and eight times too sure, Softplus 5 four times; x_t says nothing, and is sure of it."""
    folder = tmp_path_factory.mktemp("planted")
    labels = torch.tensor([1] * 60 + [4] * 60)
    right = calibrated(4, labels, 10, 1.5, 1)
    nothing = 5 * torch.randn(4, 120, 10, generator=torch.Generator().manual_seed(2))
    logits = {
        logits_name((None, "x0_hat")): 8 * right,
        logits_name((5.0, "x0_hat")): 4 * right,
        logits_name((None, "x_t")): nothing,
        logits_name((5.0, "x_t")): nothing,
    }
    recorded, labels_read = plant(run, folder, logits)
    assert torch.equal(labels_read, labels)
    return analyse(recorded, candidates((None, 5.0), ((1.0, 1.0), (1.0, 0.0), (0.25, 0.25))), labels, run.levels, 0)


def test_planted_overconfidence_is_found_and_fitted_away(planted: dict[str, Found]):
    plain, fitted = planted[PLAIN.name], planted[Candidate(fitted=True).name]
    assert plain.mean("confidence") > plain.mean("accuracy") + 0.2
    assert plain.integral > 0.2
    temperatures = [temperature for _, temperature in fitted.temperatures]
    assert np.exp(np.mean(np.log(temperatures))) == pytest.approx(8, rel=0.15)
    assert fitted.integral < plain.integral / 2
    assert fitted.gain > 4 * fitted.gain_error
    assert planted[Candidate(5.0, tau1=0.25, tau2=0.25).name].integral < plain.integral / 2, "tau1 = 1/4 undoes the factor 4"


def test_the_fitted_pairs_rise_and_can_be_guided_by(planted: dict[str, Found], run: Job):
    fitted = planted[Candidate(fitted=True).name]
    ratios = [ratio for ratio, _ in fitted.temperatures]
    assert ratios == sorted(ratios)
    assert ratios == pytest.approx(sorted(float(level.ratio) for level, _ in run.levels.pairs()), rel=1e-4)
    Classifier(load_extractor("digits-guide"), 1, 0.1, temperatures=fitted.temperatures)  # it would refuse pairs that fall


def test_each_half_is_judged_by_the_other_halfs_temperature(run: Job, tmp_path: Path):
    """Halves that are told apart by a factor: their own temperatures would calibrate both, the other's calibrate neither."""
    labels = torch.tensor([1] * 60 + [4] * 60)
    factor = torch.tensor([10.0, 0.1])[torch.arange(120) % 2]
    logits = calibrated(4, labels, 10, 1.5, 3)
    names = {logits_name((None, "x0_hat")): logits * factor[None, :, None], logits_name((None, "x_t")): logits}
    recorded, _ = plant(run, tmp_path, names)
    found = analyse(recorded, candidates((None,), ((1.0, 1.0),)), labels, run.levels, 0)
    assert found[Candidate(fitted=True).name].integral > 0.3
    assert found[Candidate(looks="x_t", fitted=True).name].integral < 0.15


def test_tau2_changes_no_calibration(planted: dict[str, Found]):
    one, other = planted[PLAIN.name], planted[Candidate(tau2=0.0).name]
    assert [at.ece for at in one.steps] == [at.ece for at in other.steps]
    assert one.candidate != other.candidate


def test_integrals_are_means_over_the_steps_and_by_gain(planted: dict[str, Found]):
    for each in planted.values():
        eces = np.array([at.ece for at in each.steps])
        progress = np.arange(4) / 3
        assert each.integral == pytest.approx(eces.mean())
        assert each.weighted["linear"] == pytest.approx(float((eces * (1 - progress)).sum() / (1 - progress).sum()))
        assert each.weighted["sine"] == pytest.approx(
            float((eces * np.sin(np.pi * progress)).sum() / np.sin(np.pi * progress).sum())
        )
        assert all(0 < at.chance < 0.3 for at in each.steps)


def test_what_says_nothing_is_calibrated_but_not_preferred(planted: dict[str, Found]):
    """Fitted to logits that know nothing, a temperature ends where the error is small; what knows more is taken."""
    nothing = planted[Candidate(looks="x_t", fitted=True).name]
    assert nothing.integral < min(0.1, planted[Candidate(fitted=True).name].integral), "the compass alone would take it"
    chosen = preferred(planted.values())
    assert chosen is not None
    assert chosen.candidate.looks == "x0_hat"
    assert chosen.mean("nll") < nothing.mean("nll")
    listed = [each.candidate for each in shortlist(planted)]
    assert listed[0] == PLAIN
    assert {(each.looks, each.fitted) for each in listed} == {
        (looks, fitted) for looks in ("x0_hat", "x_t") for fitted in (True, False)
    }
    assert "calibration alone" in by_calibration(planted).notes[0]


def test_what_has_no_gradient_is_never_preferred(planted: dict[str, Found]):
    best = preferred(planted.values())
    assert best is not None
    rest = {name: replace(each, guides=each is not best) for name, each in planted.items()}
    second = preferred(rest.values())
    assert second is not None and second.candidate != best.candidate  # noqa: PT018 - the first narrows the type
    assert preferred(replace(each, guides=False) for each in planted.values()) is None


def test_candidates_are_each_named_once_and_the_plain_one_comes_first():
    made = candidates()
    assert made[0] == PLAIN
    assert len({each.name for each in made}) == len(made) == 4 * 2 * 5


def test_betas_and_taus_are_read_from_text():
    assert read_betas("none, 3,5.5,3") == (None, 3.0, 5.5)
    assert read_taus("1:1,1:0, 0.5") == ((1.0, 1.0), (1.0, 0.0), (0.5, 0.5))


@pytest.mark.parametrize("text", ["", "0", "-3", "nan", "three", "inf", "3,,5"])
def test_betas_that_make_no_sense_are_refused(text: str):
    with pytest.raises(RequestError, match="--betas"):
        read_betas(text)


@pytest.mark.parametrize("text", ["", "0:0", "0:1", "1:-1", "1:x", "inf:1", "1:1,"])
def test_taus_that_make_no_sense_are_refused(text: str):
    with pytest.raises(RequestError, match="--taus"):
        read_taus(text)


def test_roughness_tells_smooth_gradients_from_rough_ones():
    place = torch.arange(16.0)
    wave = torch.sin(2 * math.pi * place / 16).expand(1, 1, 16, 16)
    checks = ((-1.0) ** (place[:, None] + place[None, :])).expand(1, 1, 16, 16)
    assert float(roughness(wave)) == pytest.approx(0, abs=1e-9)
    assert float(roughness(checks)) == pytest.approx(1)
    assert float(roughness(1e-30 * checks)) == pytest.approx(1), "whatever its size"
    mixed = wave * math.sqrt(2) + checks  # equal energies
    assert float(roughness(mixed)) == pytest.approx(0.5, abs=1e-6)
    noise = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert float(roughness(noise).mean()) == pytest.approx(1 - (7 / 16) ** 2, abs=0.02)
    assert roughness(torch.zeros(2, 1, 8, 8)).isnan().all()


def test_steps_are_kept_and_drawn_over_the_whole_path():
    assert kept_steps(18) == [0, 3, 7, 10, 14, 17]
    assert kept_steps(3) == [0, 1, 2]
    assert drawn_steps(18) == [3, 8, 14]
    assert drawn_steps(1) == [0]


def test_guidance_acts_as_often_as_the_bound_on_the_time_allows(tmp_path: Path):
    job = prepare(asked(sampler={"steps": 18}), tmp_path / "out").run
    assert affordable(job, 0.0, 1.15) == (1, 1.0)
    assert affordable(job, 0.15, 1.15) == (1, pytest.approx(1.15))
    # of 18 steps every 7th is two, every 6th three: 1 + 3/18 is too much
    assert affordable(job, 1.0, 1.15) == (7, pytest.approx(1 + 2 / 18))
    assert affordable(job, 3.0, 1.1) is None
    heun = prepare(asked(sampler={"name": "heun", "steps": 4}), tmp_path / "out").run
    # evaluated at the levels 0 1 | 1 2 | 2 3 | 3: every 2nd acts at 1, 1, 3, 3
    assert affordable(heun, 1.0, 1.6) == (2, pytest.approx(1 + 4 / 7))
    assert affordable(heun, 1.0, 1.5) == (3, pytest.approx(1 + 2 / 7))
