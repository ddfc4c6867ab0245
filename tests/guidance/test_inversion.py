"""CRDI's sampling: against the paper's update written out in eps, and each image's own randomness."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.inversion import INTERVAL, SHAPE, STEPS, Tiny, embeddings, path, randn, targets
from torch import Tensor

from handful.core.denoiser import Clamped, Condition
from handful.core.noise import EDM, Levels, level
from handful.core.samplers import ddim, heun
from handful.errors import RequestError
from handful.guidance import CFG, Guided, Step
from handful.guidance.embeddings import segment_steps
from handful.guidance.inversion import Embeddings, Inversion, noised_start, normal, own_targets, reconstruct
from handful.recipe.plan import ImageNoise, image_seed

SEEDS = [image_seed(0, "images", index) for index in range(8)]


def alphabars() -> tuple[list[int], Tensor]:
    """The respaced training steps and alphabar, as the paper's code has them; index i counts from the clean end."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    steps = [round(999 / (STEPS - 1) * i) for i in range(STEPS)]
    return steps, torch.cat([torch.ones(1, dtype=torch.float64), abar[steps]])  # [i + 1] is step i's, [0] the clean one


def shift_at(term: Inversion, index: int, n: int | None = None, levels: Levels | None = None) -> Tensor:
    """The term's shift at one level; it looks at neither x_t nor x0_hat."""
    x = torch.zeros(n or len(term.seeds), *SHAPE, dtype=torch.float64)
    return term.shift(Step(Tiny(), x, (levels or path())[index], Condition(), x))


def guided_by_hand(x: Tensor, G: Tensor, which: dict[int, list[int]], seeds: list[int], a: float, s: float = 2.0) -> Tensor:
    """From the interval's top down to x0: the paper's formulas on eps and alphabar. G (N, eta, c, h, w), one segment a step."""
    net, (steps, abar), (lo, hi) = Tiny(torch.float64).network, alphabars(), INTERVAL
    for i in reversed(range(hi)):
        eps = net(x, torch.full((len(x),), steps[i], dtype=torch.float64))
        if i >= lo:
            score = s * G[which[i], i - lo] + a * (i - lo) / (hi - lo) * normal(seeds, SHAPE, i, 0, 3)
            eps = eps - (1 - abar[i + 1]).sqrt() * score
        x0 = (x - (1 - abar[i + 1]).sqrt() * eps) / abar[i + 1].sqrt()
        x = abar[i].sqrt() * x0 + (1 - abar[i]).sqrt() * eps
    return x


@pytest.mark.parametrize("exchange", ["step", "image", "none"])
@torch.no_grad()
def test_guided_ddim_is_the_papers_update_of_eps(exchange: Any):
    told, noise = embeddings(segments=6), randn(4, *SHAPE, seed=1).double()
    term = Inversion(told, SEEDS[:4], exchange=exchange, perturbation=0.3)
    x, levels = noised_start(told.x0.double(), term.own, noise, told.levels, INTERVAL[1])
    found = ddim(Guided(Tiny(torch.float64), [term]), x, levels, Condition())

    _, abar = alphabars()
    by_hand = abar[INTERVAL[1]].sqrt() * told.x0[term.own] + (1 - abar[INTERVAL[1]]).sqrt() * noise
    which = {i: term.targets_at(i) for i in range(*INTERVAL)}
    expected = guided_by_hand(by_hand, told.G, which, SEEDS[:4], 0.3)
    assert torch.allclose(found, expected, atol=1e-9)
    assert not torch.allclose(found, guided_by_hand(by_hand, 0 * told.G, which, SEEDS[:4], 0.0), atol=0.1)


def test_shift_follows_from_the_shift_of_eps():
    told = embeddings(segments=6, scale=1.5)
    term = Inversion(told, SEEDS[:3], exchange="none", own=[0, 1, 2], perturbation=0.0, scale=0.7)
    _, abar = alphabars()
    for i in range(*INTERVAL):
        t = path()[STEPS - 1 - i]
        deps = -(1 - abar[i + 1]).sqrt() * 1.5 * 0.7 * told.G[:, i - INTERVAL[0]].double()
        assert torch.allclose(shift_at(term, STEPS - 1 - i), -t.sigma / t.alpha * deps, atol=1e-5)


def test_the_score_is_s_times_the_embedding_and_the_perturbation_which_s_does_not_multiply():
    """The original's line: guidance_scale * G + a (i - lo) / (hi - lo) * noise; here with s = 2 and s = 6 of the same G."""
    lo, hi = INTERVAL
    i = hi - 1
    t = path()[STEPS - 1 - i]
    factor = t.sigma**2 / t.alpha
    shifts = []
    for s in (2.0, 6.0):
        told = replace(embeddings(), scale=s)
        own = [0] * len(SEEDS)
        terms = [Inversion(told, SEEDS, exchange="none", own=own, perturbation=a) for a in (0.0, 0.3)]
        plain, noisy = (shift_at(term, STEPS - 1 - i) for term in terms)
        torch.testing.assert_close(plain / factor, s * told.G[own, told.segment_of(i)].to(plain), rtol=1e-5, atol=1e-5)
        shifts.append(noisy - plain)
    torch.testing.assert_close(*shifts, rtol=1e-4, atol=1e-4)
    assert float(shifts[0].std() / factor) == pytest.approx(0.3 * (i - lo) / (hi - lo), rel=0.2)


def test_perturbation_falls_linearly_from_the_noisy_end_to_nothing_at_the_clean_end():
    silent = replace(embeddings(), G=torch.zeros(3, 3, *SHAPE))
    seeds = list(range(400))
    lo, hi = INTERVAL
    term = Inversion(silent, seeds, perturbation=0.3)
    sizes = []
    for i in range(lo, hi):
        t = path()[STEPS - 1 - i]
        sizes.append(float(shift_at(term, STEPS - 1 - i).std() / (t.sigma**2 / t.alpha)))
    assert sizes[0] == 0
    # 12,800 normals: their deviation is known to 0.6 %, and 4 % is more than six times that
    assert sizes == pytest.approx([0.3 * (i - lo) / (hi - lo) for i in range(lo, hi)], rel=0.04)


def test_perturbation_is_new_at_every_step_and_shares_nothing_with_the_images_noise():
    silent = replace(embeddings(), G=torch.zeros(3, 3, *SHAPE))
    term = Inversion(silent, list(range(400)), perturbation=1.0)
    drawn = [shift_at(term, STEPS - 1 - i).flatten() for i in (4, 5, 6, 7)]
    own = ImageNoise(list(range(400)), SHAPE)
    drawn += [own().double().flatten(), own().double().flatten()]
    between = torch.corrcoef(torch.stack(drawn)) - torch.eye(6)
    assert between.abs().max() < 0.05  # 12,800 numbers: six times the chance deviation of 0.009


def test_default_gives_each_image_a_target_chosen_anew_at_every_guided_step():
    term = Inversion(embeddings(n=5), list(range(2000)))
    assert term.exchange == "step"
    chosen = torch.tensor([term.targets_at(i) for i in range(*INTERVAL)])
    shares = chosen.flatten().bincount(minlength=5) / chosen.numel()
    assert torch.allclose(shares, torch.full((5,), 0.2), atol=0.02)  # 12,000 draws: over five deviations
    same = [float((first == second).float().mean()) for first, second in pairwise(chosen)]
    assert same == pytest.approx([0.2] * len(same), abs=0.05)  # independent from step to step
    own = torch.tensor(own_targets(list(range(2000)), 5))
    assert float((own == chosen[0]).float().mean()) == pytest.approx(0.2, abs=0.05)
    assert torch.allclose(own.bincount(minlength=5) / 2000, torch.full((5,), 0.2), atol=0.05)


def test_one_target_for_the_whole_image_or_its_own():
    told = embeddings(n=5)
    whole = Inversion(told, SEEDS, exchange="image")
    assert len({tuple(whole.targets_at(i)) for i in range(*INTERVAL)}) == 1
    assert len(set(whole.targets_at(2))) > 1
    many = Inversion(told, list(range(2000)), exchange="image")
    same = [chosen == own for chosen, own in zip(many.targets_at(2), many.own, strict=True)]
    assert sum(same) / 2000 == pytest.approx(0.2, abs=0.05)  # chosen anew, whatever it starts from
    named = [4, 3, 2, 1, 0, 0, 1, 2]
    assert Inversion(told, SEEDS, exchange="none", own=named).targets_at(3) == named
    assert Inversion(told, SEEDS, exchange="none").targets_at(3) == own_targets(SEEDS, 5)


@pytest.mark.parametrize("sampler", [ddim, heun])
@torch.no_grad()
def test_an_image_depends_on_its_seed_alone(sampler: Any):
    told, model = embeddings(), Tiny(torch.float64)

    def made(seeds: list[int], chunk: int | None = None) -> Tensor:
        noise = ImageNoise(seeds, SHAPE)().double()
        term = Inversion(told, seeds, perturbation=0.3)
        x, levels = noised_start(told.x0, term.own, noise, told.levels, INTERVAL[1])
        return sampler(Guided(model, [term], chunk), x, levels, Condition())

    eight = made(SEEDS)
    assert torch.allclose(torch.cat([made(SEEDS[:4]), made(SEEDS[4:])]), eight, atol=1e-12)
    assert torch.allclose(made(SEEDS[::-1]).flip(0), eight, atol=1e-12)
    assert torch.allclose(made(SEEDS, chunk=3), eight, atol=1e-12)
    assert not torch.allclose(made([*SEEDS[:7], 1])[7], eight[7], atol=0.01)


def test_a_level_evaluated_again_sees_the_same_draws():
    term = Inversion(embeddings(), SEEDS, perturbation=0.3)
    first = {index: shift_at(term, index) for index in (3, 4, 5)}
    assert all(torch.equal(shift_at(term, index), first[index]) for index in (5, 3, 4))
    parts = [shift_at(Inversion(embeddings(), SEEDS[part], perturbation=0.3), 4) for part in (slice(0, 3), slice(3, 8))]
    assert torch.equal(torch.cat(parts), first[4])


@torch.no_grad()
def test_scale_0_and_levels_outside_the_interval_are_the_model_to_the_bit():
    told, model = embeddings(), Tiny()
    x, levels = noised_start(told.x0, [0, 1, 2], randn(3, *SHAPE), told.levels, INTERVAL[1])
    plain = ddim(model, x, levels, Condition())
    none = Guided(model, [Inversion(told, SEEDS[:3], scale=0.0, perturbation=0.3)])
    assert torch.equal(ddim(none, x, levels, Condition()), plain)
    full = Guided(model, [Inversion(told, SEEDS[:3])])
    for index, at in enumerate(path()):
        if index < STEPS:
            same = torch.equal(full(x, at, Condition()), model(x, at, Condition()))
            assert same == (not INTERVAL[0] <= STEPS - 1 - index < INTERVAL[1])
    assert not torch.equal(ddim(full, x, levels, Condition()), plain)


@torch.no_grad()
def test_it_adds_to_other_terms():
    class Nulled(Tiny):
        def condition(self, labels: Any) -> Condition:
            return Condition(torch.as_tensor(labels), null_label=1)

        def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
            assert condition.labels is not None
            return super().call(scaled, time, condition) + condition.labels[:, None, None, None]

    model, told, at = Nulled(), embeddings(), path()[4]
    x, labels = randn(3, *SHAPE), model.condition([0, 0, 0])
    inversion, cfg = Inversion(told, SEEDS[:3]), CFG(0.5)
    both = Guided(model, [inversion, cfg])(x, at, labels)
    apart = sum(Guided(model, [term])(x, at, labels) - model(x, at, labels) for term in (inversion, cfg))
    assert torch.allclose(both, model(x, at, labels) + apart, atol=1e-5)


@torch.no_grad()
def test_the_same_model_on_another_process_is_guided_to_the_same_images():
    told, model = embeddings(), Tiny(torch.float64)
    m = told.levels.alpha + told.levels.sigma
    flow = Levels(told.levels.alpha / m, told.levels.sigma / m)
    edm = Levels(torch.ones_like(m), told.levels.sigma / told.levels.alpha)
    noise, found = randn(3, *SHAPE).double(), []
    for levels in (told.levels, flow, edm):
        x, rest = noised_start(told.x0, [0, 1, 2], noise, levels, INTERVAL[1])
        found.append(ddim(Guided(model, [Inversion(told, SEEDS[:3])]), x, rest, Condition()))
    assert torch.allclose(found[1], found[0], atol=1e-9)
    assert torch.allclose(found[2], found[0], atol=1e-9)


@pytest.mark.parametrize(
    ("segments", "expected"),
    [(1, [[5, 6, 7, 8, 9]]), (2, [[5, 6, 7], [8, 9]]), (3, [[5, 6], [7, 8], [9]]), (5, [[5], [6], [7], [8], [9]])],
)
def test_segments_are_contiguous_runs_as_equal_as_can_be(segments: int, expected: list[list[int]]):
    assert [list(run) for run in segment_steps((5, 10), segments)] == expected


def test_each_guided_step_has_its_segment_and_no_other_step_has_one():
    told = embeddings(segments=4)  # of 6 steps: 2, 2, 1, 1
    assert [told.segment_of(step) for step in range(*INTERVAL)] == [0, 0, 1, 1, 2, 3]
    for step in (1, 8, -1):
        with pytest.raises(ValueError, match="not inside"):
            told.segment_of(step)


def test_a_level_finds_its_step_on_sub_paths_and_on_other_paths():
    told = embeddings()
    steps = [told.step_of(at) for at, _ in told.levels.pairs()]
    assert steps == [None, None, 7, 6, 5, 4, 3, 2, None, None]
    _, rest = noised_start(told.x0, [0], randn(1, *SHAPE), told.levels, INTERVAL[1])
    assert [told.step_of(at) for at, _ in rest.pairs()] == steps[2:]
    nearly = level(told.levels.alpha[4].float(), told.levels.sigma[4].float() * 1.0001)  # through another's float32
    assert told.step_of(nearly) == 5
    finer = path(40)
    found = [told.step_of(at) for at, _ in finer.pairs()]
    guided = [step for step in found if step is not None]
    assert guided == sorted(guided, reverse=True)
    assert set(guided) == set(range(*INTERVAL))
    lo, hi = (39 - index for index in (max(i for i, step in enumerate(found) if step is not None), found.index(guided[0])))
    assert [step is not None for step in found] == [lo <= 39 - index <= hi for index in range(40)]


def test_noise_above_the_fitted_path_is_not_guided():
    told = embeddings(interval=(2, 10), segments=2)
    top = told.levels[0]
    assert told.step_of(top) == 9
    assert told.step_of(level(top.alpha / 10, top.sigma)) is None
    assert told.step_of(level(0.0, 1.0)) is None
    with pytest.raises(ValueError, match="each image"):
        told.step_of(level([0.5, 0.6], [0.5, 0.4]))
    assert told.step_of(EDM(sigma_max=1e6).spacing(1)[0]) is None


def test_a_start_is_the_target_at_the_level_of_the_first_guided_step():
    x0, noise = targets(3), randn(2, *SHAPE)
    x, rest = noised_start(x0, [2, 0], noise, path(), 8)
    _, abar = alphabars()
    assert torch.allclose(x, (abar[8].sqrt() * x0[[2, 0]] + (1 - abar[8]).sqrt() * noise).float(), atol=1e-6)
    assert rest.steps == 8
    assert torch.equal(rest.sigma, path().sigma[2:])
    with pytest.raises(RequestError, match=r"^interval: 11: the path has only 10 steps"):
        noised_start(x0, [0], noise[:1], path(), 11)


@torch.no_grad()
def test_reconstruction_starts_from_each_target_and_takes_its_own_embeddings():
    told, model = embeddings(segments=6), Tiny(torch.float64)
    told = replace(told, x0=told.x0.double())
    found = reconstruct(model, told, seed=3)
    keys = [3 + ((place + 1) << 64) for place in range(3)]
    _, abar = alphabars()
    x = abar[8].sqrt() * told.x0 + (1 - abar[8]).sqrt() * normal(keys, SHAPE, 0, 0, 4)
    expected = guided_by_hand(x, told.G, {step: [0, 1, 2] for step in range(*INTERVAL)}, keys, 0.0)
    assert torch.allclose(found, expected, atol=1e-9)
    assert not torch.equal(reconstruct(model, told, seed=4), found)
    assert torch.allclose(reconstruct(model, told, seed=3, chunk=2), found, atol=1e-12)
    two = replace(told, G=told.G[:2], x0=told.x0[:2])
    assert torch.allclose(reconstruct(model, two, seed=3), found[:2], atol=1e-12)


def test_a_clamped_model_is_told_nothing_too():
    """Clamping before the shift is the original's way: a `Clamped` inside `Guided`."""
    import handful

    digits = handful.load("digits")
    levels = digits.levels.spacing(10)
    told = Embeddings(torch.zeros(1, 1, 1, 8, 8), torch.zeros(1, 1, 8, 8), levels, (2, 8))
    seen: list[Any] = []
    digits.network.register_forward_pre_hook(lambda module, args, words: seen.append(words["class_labels"]), with_kwargs=True)
    reconstruct(Clamped(digits), told)
    assert [labels.tolist() for labels in seen] == [[10]] * 8


def test_a_file_holds_all_and_the_same_bytes_again(tmp_path):
    told = embeddings(scale=1.5, perturbation=0.2, targets=("a", "b", "c"), fitted={"epochs": 3, "losses": [0.1, 0.25]})
    told.save(tmp_path / "sge.safetensors")
    found = Embeddings.load(tmp_path / "sge.safetensors")
    for name in ("G", "x0"):
        assert torch.equal(getattr(found, name), getattr(told, name))
    assert torch.equal(found.levels.alpha, told.levels.alpha)
    assert torch.equal(found.levels.sigma, told.levels.sigma)
    for name in ("interval", "scale", "perturbation", "model", "targets", "fitted"):
        assert getattr(found, name) == getattr(told, name)
    found.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "sge.safetensors").read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir() if each.suffix != "") == ["again.safetensors", "sge.safetensors"]


def test_another_model_and_another_size_are_refused_by_name():
    told = embeddings(model="abcdef0123456789")
    told.check(SHAPE, "abcdef0123456789")
    with pytest.raises(RequestError, match=r"^embeddings: .*on a model of 2 x 4 x 4, and this one has 3 x 4 x 4\."):
        told.check((3, 4, 4), "abcdef0123456789")
    with pytest.raises(RequestError, match=r"^embeddings: .*its weights are abcdef012345 and this one's 999999999999\."):
        told.check(SHAPE, "9" * 64)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ({"scale": -1.0}, "scale"),
        ({"exchange": "often"}, "exchange"),
        ({"perturbation": -0.1}, "perturbation"),
        ({"perturbation": float("nan")}, "perturbation"),
        ({"own": [0, 3]}, "own"),
        ({"own": [0]}, "own"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(words: dict[str, Any], field: str):
    with pytest.raises(RequestError, match=f"^{field}: "):
        Inversion(embeddings(), [1, 2], **words)


@pytest.mark.parametrize(
    ("interval", "segments", "told"),
    [
        ((5, 5), 1, r"interval: \(5, 5\)"),
        ((6, 5), 1, "interval"),
        ((-1, 5), 1, "interval"),
        ((5, 11), 1, "interval"),
        ((2, 8), 0, "segments: 0: 6 guided steps can be cut into 1 to 6"),
        ((2, 8), 7, "segments: 7"),
    ],
)
def test_intervals_and_segments_out_of_range_are_refused_by_name(interval: tuple[int, int], segments: int, told: str):
    with pytest.raises(RequestError, match=f"^{told}"):
        Embeddings(torch.zeros(1, segments, *SHAPE), torch.zeros(1, *SHAPE), path(), interval)


def test_an_interval_up_to_pure_noise_is_refused():
    flow = Levels(torch.linspace(0, 1, 6, dtype=torch.float64), torch.linspace(1, 0, 6, dtype=torch.float64))
    with pytest.raises(RequestError, match=r"^interval: \(0, 5\): .*pure noise.* 4 or lower"):
        Embeddings(torch.zeros(1, 1, *SHAPE), torch.zeros(1, *SHAPE), flow, (0, 5))
    Embeddings(torch.zeros(1, 1, *SHAPE), torch.zeros(1, *SHAPE), flow, (0, 4))


def test_a_cohort_of_another_length_than_the_seeds_is_refused():
    with pytest.raises(ValueError, match="the cohort has 3 images, and this term has 8 seeds"):
        shift_at(Inversion(embeddings(), SEEDS), 4, n=3)
