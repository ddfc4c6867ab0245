"""CADS: the paper's formula, computed here with NumPy alone, in every family; and all that it must not touch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.adm import Variant, saved
from support.edm import Preconditioned
from support.pipelines import tiny_sdxl, tiny_stable_diffusion
from support.pipelines_dit import tiny_dit
from support.pipelines_flow import tiny_flux, tiny_sd3
from torch import Tensor, nn

from handful.core.denoiser import Condition, Denoiser, NetworkDenoiser
from handful.core.noise import VP, Level
from handful.core.samplers import ddim, heun
from handful.errors import RequestError
from handful.features.registry import pixels
from handful.guidance import CADS, CFG, Chamfer, Guided, Pull, Step, Timing
from handful.guidance.cads import annealed
from handful.integrations.diffusers import GuidanceCallback, HandfulGuider
from handful.models import from_pipeline, load
from handful.models.edm import EDMDenoiser
from handful.recipe.plan import image_seed

SEEDS = [image_seed(0, "3", index) for index in range(4)]
S, TAU1, TAU2, PSI = 0.3, 0.4, 0.9, 0.7
TEXT, POOLED, LABEL, PURPOSE = 0, 1, 2, 5  # the words of a place of an image's random numbers


def papers(y: np.ndarray, t: float, seed: int, index: int, which: int, psi: float = PSI) -> np.ndarray:
    """One image's y'' (equations 1 to 4 of the paper), from its own stream of numbers."""
    g = 1.0 if t <= TAU1 else 0.0 if t >= TAU2 else (TAU2 - t) / (TAU2 - TAU1)
    if g == 1:
        return y
    n = np.random.RandomState(np.random.Philox(key=seed, counter=[0, index, which, PURPOSE])).standard_normal(y.shape)
    noisy = np.sqrt(g) * y + S * np.sqrt(1 - g) * n
    rescaled = (noisy - noisy.mean()) / noisy.std() * y.std() + y.mean()
    return psi * rescaled + (1 - psi) * noisy


def cads(seeds: list[int] = SEEDS, scale: float = S, timing: Timing | None = None) -> CADS:
    return CADS(seeds, scale, tau1=TAU1, tau2=TAU2, mix=PSI, timing=timing)


def at(index: int, steps: int = 8, denoiser: Denoiser | None = None) -> Level:
    """A level of a path; index 3 of 8 has t = 4/7, inside (tau1, tau2)."""
    return (VP.cosine() if denoiser is None else denoiser.levels).spacing(steps)[index]


def noise(denoiser: Denoiser, n: int = len(SEEDS), seed: int = 1) -> Tensor:
    return torch.randn(n, *denoiser.shape, generator=torch.Generator().manual_seed(seed))


class Fixed(nn.Module):
    """Stands for an embedding of labels, and gives what it was made with."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given

    def forward(self, labels: Tensor) -> Tensor:
        return self.given


def by_class_embedding(network: Any, change: Callable[[nn.Module], nn.Module]) -> None:
    network.class_embedding = change(network.class_embedding)


def by_blocks(network: Any, change: Callable[[nn.Module], nn.Module]) -> None:
    for block in network.transformer_blocks:
        block.norm1.emb.class_embedder = change(block.norm1.emb.class_embedder)


def by_linear(network: Any, change: Callable[[nn.Module], nn.Module]) -> None:
    network.map_label = change(network.map_label)


def dit() -> NetworkDenoiser:
    return from_pipeline(tiny_dit())


# By family: the denoiser, how its embedding is replaced, and what that embedding is given.
LABELLED: dict[str, tuple[Callable[[Path], Any], Callable[..., None]]] = {
    "unet": (lambda _: load("digits"), by_class_embedding),
    "adm": (lambda folder: load(saved(folder, Variant(classes=5)), null_class=4), by_class_embedding),
    "dit": (lambda _: dit(), by_blocks),
    "edm": (lambda _: EDMDenoiser(Preconditioned(), null_class=4), by_linear),
}
PROMPTED: dict[str, Callable[[], Any]] = {"sd": tiny_stable_diffusion, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
LABELS = [0, 1, 2, 2]


def test_the_formula_of_a_few_numbers_by_hand():
    y, n = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, -1.0]])
    noisy = torch.tensor([[0.6 * 0 + 2 * 0.8, 0.6 * 2 - 2 * 0.8]])  # g = 0.36, s = 2: 1.6 and -0.4
    torch.testing.assert_close(annealed(y, n, 0.36, 2.0, 0.0), noisy)
    torch.testing.assert_close(annealed(y, n, 0.36, 2.0, 1.0), torch.tensor([[2.0, 0.0]]))  # y's mean 1 and deviation 1
    torch.testing.assert_close(annealed(y, n, 0.36, 2.0, 0.25), 0.25 * torch.tensor([[2.0, 0.0]]) + 0.75 * noisy)


def test_an_embedding_without_spread_keeps_its_mean_and_nothing_is_nan():
    y = torch.full((1, 5), 3.0)
    torch.testing.assert_close(annealed(y, torch.randn(1, 5), 0.5, 0.3, 1.0), y)
    assert annealed(torch.zeros(1, 1), torch.zeros(1, 1), 0.0, 0.3, 1.0).isfinite().all()


def test_the_signal_falls_linearly_between_the_two_times_left():
    term = CADS(SEEDS, 0.1, tau1=0.25, tau2=0.75)
    path = VP.cosine().spacing(5)  # t = 1, 3/4, 1/2, 1/4, 0
    assert [term.signal(level) for level in list(path)[:5]] == [0.0, 0.0, 0.5, 1.0, 1.0]
    step = CADS(SEEDS, 0.1, tau1=0.5, tau2=0.5)
    assert [step.signal(level) for level in list(path)[:5]] == [0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("index", [0, 3])
@pytest.mark.parametrize("family", LABELLED)
def test_a_labels_embedding_is_noised_by_the_formula(family: str, index: int, tmp_path: Path):
    """Against a network whose embedding gives the noised rows: both noise alone (t = 1) and signal with noise (t = 4/7)."""
    make, put = LABELLED[family]
    denoiser = make(tmp_path)
    condition, x_t, level = denoiser.condition(LABELS), noise(denoiser), at(index, denoiser=denoiser)
    given = torch.tensor(LABELS)
    given = nn.functional.one_hot(given, 4).float() if family == "edm" else given

    def noised(embedding: nn.Module) -> nn.Module:
        rows = zip(embedding(given).numpy(), SEEDS, strict=True)
        return Fixed(torch.from_numpy(np.stack([papers(row, 1 - index / 7, seed, index, LABEL) for row, seed in rows])).float())

    other = copy.deepcopy(denoiser)
    put(other.network, noised)
    found, wanted = Guided(denoiser, [cads()])(x_t, level, condition), other(x_t, level, condition)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert not torch.allclose(found, denoiser(x_t, level, condition), rtol=1e-3, atol=1e-4), "the noise must matter"
    assert not any(module._forward_hooks for module in denoiser.network.modules()), "no hook may be left"


@pytest.mark.parametrize("family", PROMPTED)
def test_prompts_are_noised_by_name_and_sizes_never(family: str):
    denoiser = from_pipeline(PROMPTED[family](), resolution=(64, 64))
    condition = denoiser.condition(["a cat", "a dog", "a cat", "a cat"])
    path = denoiser.levels.spacing(8)
    told = cads().tell(condition, path[3])
    assert told.perturbation is None
    assert told.embeddings.keys() == condition.embeddings.keys()
    for name, given in condition.embeddings.items():
        if name == "time_ids":
            assert torch.equal(told.embeddings[name], given)
            continue
        which = {"text": TEXT, "pooled": POOLED}[name]
        wanted = [papers(one, 4 / 7, seed, 3, which) for one, seed in zip(given.numpy(), SEEDS, strict=True)]
        torch.testing.assert_close(told.embeddings[name], torch.from_numpy(np.stack(wanted)).float(), rtol=1e-4, atol=1e-5)
    assert ("pooled" in told.embeddings) == (family != "sd")
    x_t = noise(denoiser)
    found = Guided(denoiser, [cads()])(x_t, path[3], condition)
    assert torch.equal(found, denoiser(x_t, path[3], told))
    assert not torch.allclose(found, denoiser(x_t, path[3], condition), rtol=1e-3, atol=1e-4)


def test_masks_and_whole_numbers_are_left_as_they_are():
    embeddings = {"text": torch.randn(4, 3, 5), "text_mask": torch.ones(4, 3), "pooled": torch.ones(4, 2, dtype=torch.int64)}
    told = cads().tell(Condition(embeddings=embeddings), at(0)).embeddings
    assert told["text_mask"] is embeddings["text_mask"]
    assert told["pooled"] is embeddings["pooled"]
    assert not torch.equal(told["text"], embeddings["text"])


def test_scale_zero_and_the_clean_end_of_the_path_are_no_guidance_to_the_bit():
    denoiser = load("digits")
    condition, x_t = denoiser.condition(LABELS), noise(denoiser)
    for index in range(8):
        level = at(index, denoiser=denoiser)
        plain = denoiser(x_t, level, condition)
        assert torch.equal(Guided(denoiser, [cads(scale=0.0)])(x_t, level, condition), plain)
        same = torch.equal(Guided(denoiser, [cads()])(x_t, level, condition), plain)
        assert same == (1 - index / 7 <= TAU1)


def test_it_costs_no_evaluation_and_shifts_nothing():
    denoiser = load("digits")
    condition, x_t, level = denoiser.condition(LABELS), noise(denoiser), at(0, denoiser=denoiser)
    calls: list[int] = []
    denoiser.network.register_forward_pre_hook(lambda *_: calls.append(1))
    _, shift = Guided(denoiser, [cads()]).parts(x_t, level, condition)
    assert (shift, len(calls)) == (None, 1)
    assert not cads().shift(Step(denoiser, x_t, level, condition, x_t)).any()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("prompted", [False, True])
def test_the_null_prediction_of_cfg_is_untouched(prompted: bool, nested: bool):
    denoiser = from_pipeline(tiny_stable_diffusion()) if prompted else load("digits")
    condition = denoiser.condition(["a cat"] * 4 if prompted else LABELS)  # type: ignore[arg-type]
    x_t, level = noise(denoiser), at(3, denoiser=denoiser)
    noised = Guided(denoiser, [cads()])(x_t, level, condition)
    null = denoiser(x_t, level, condition.null())
    guided = Guided(Guided(denoiser, [cads()]), [CFG(2.0)]) if nested else Guided(denoiser, [cads(), CFG(2.0)])
    torch.testing.assert_close(guided(x_t, level, condition), noised + 2 * (noised - null), rtol=1e-5, atol=1e-5)


def test_a_null_condition_keeps_no_perturbation_and_a_part_of_a_cohort_its_own_noise():
    denoiser = load("digits")
    told = cads().tell(denoiser.condition(LABELS), at(3))
    assert told.null().perturbation is None
    assert told.perturbation is not None
    rows = torch.randn(4, 6)
    part = told[1:3].perturbation
    assert part is not None
    torch.testing.assert_close(part(rows[1:3]), told.perturbation(rows)[1:3])
    with pytest.raises(ValueError, match="the cohort has 4 images, and CADS has 2 seeds"):
        part(rows)


def test_an_image_depends_on_its_own_seed_alone():
    denoiser = load("digits")
    levels = denoiser.levels.spacing(6)
    whole = ddim(Guided(denoiser, [cads(), CFG(1.0)]), noise(denoiser), levels, denoiser.condition(LABELS))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        for i in order[:2]:
            alone = Guided(denoiser, [cads([SEEDS[i]]), CFG(1.0)])
            found = ddim(alone, noise(denoiser)[i : i + 1], levels, denoiser.condition(LABELS[i : i + 1]))
            torch.testing.assert_close(found[0], whole[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_give_the_same_as_the_whole_cohort(chunk: int):
    denoiser = load("digits")
    levels, condition = denoiser.levels.spacing(6), denoiser.condition(LABELS)
    real = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def sampled(chunk: int | None) -> Tensor:
        terms = [cads(), CFG(0.5), Chamfer(pixels(), real, 0.3, pull=Pull("exact"))]
        return ddim(Guided(denoiser, terms, chunk=chunk), noise(denoiser), levels, condition)

    torch.testing.assert_close(sampled(chunk), sampled(None), rtol=1e-3, atol=1e-3)


def test_the_noise_is_fresh_at_every_step_and_the_same_in_every_run():
    denoiser, rows = load("digits"), torch.randn(4, 6)
    condition = denoiser.condition(LABELS)
    told = [cads().tell(condition, at(index)).perturbation for index in (0, 0, 1)]
    first, again, next_ = (one(rows) for one in told if one is not None)
    assert torch.equal(first, again)
    assert not torch.allclose(first, next_)
    assert not torch.allclose(first[2:3], first[3:4]), "images of one class have noise of their own"
    for sampler in (ddim, heun):
        runs = [sampler(Guided(denoiser, [cads()]), noise(denoiser), denoiser.levels.spacing(6), condition) for _ in range(2)]
        assert torch.equal(*runs)


def test_the_noise_averages_to_nothing_and_has_unit_size():
    """Of 20,000 numbers: the mean is off by 5 deviations once in 2 million runs; the seeds are fixed."""
    y = torch.zeros(4, 5000)
    told = CADS(SEEDS, 1.0, tau1=0.0, tau2=0.5, mix=0.0).tell(Condition(labels=torch.zeros(4, dtype=torch.int64)), at(0))
    assert told.perturbation is not None
    found = told.perturbation(y)
    assert abs(float(found.mean())) < 5 / 20_000**0.5
    assert float(found.std()) == pytest.approx(1, abs=0.03)


def test_it_acts_where_its_timing_says():
    denoiser = load("digits")
    condition, x_t = denoiser.condition(LABELS), noise(denoiser)
    term = cads(timing=Timing(every=2))
    for index in (0, 1):
        level = at(index, denoiser=denoiser)
        same = torch.equal(Guided(denoiser, [term])(x_t, level, condition), denoiser(x_t, level, condition))
        assert same == (index == 0)


def test_an_exact_jacobian_goes_through_the_noised_network():
    """With other terms in one run: they see, and go back through, the network as it is told."""
    denoiser = load("digits")
    condition, x_t, level = denoiser.condition(LABELS), noise(denoiser), at(3, denoiser=denoiser)
    real = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    term = Chamfer(pixels(), real, 0.3, pull=Pull("exact"))
    found = Guided(denoiser, [cads(), term])(x_t, level, condition)
    wanted = Guided(denoiser, [term])(x_t, level, cads().tell(condition, level))
    assert torch.equal(found, wanted)


def test_half_precision_keeps_its_dtype():
    told = cads().tell(Condition(labels=torch.tensor(LABELS)), at(3)).perturbation
    assert told is not None
    rows = torch.randn(4, 6)
    half = told(rows.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), told(rows), rtol=0.05, atol=0.05)


class WithoutEmbedding(Denoiser):
    """Told labels, but nobody knows what it makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.levels = (1, 4, 4), VP.cosine()

    def condition(self, labels: Any) -> Condition:
        return Condition(torch.as_tensor(labels), 3)

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        return x_t


def test_models_whose_labels_cannot_be_noised_are_refused():
    denoiser, none = WithoutEmbedding(), Condition()
    x_t = noise(denoiser)
    with pytest.raises(RequestError, match="guidance: 'cads': handful does not know where this model embeds its labels"):
        Guided(denoiser, [cads()])(x_t, at(0), denoiser.condition(LABELS))
    with pytest.raises(RequestError, match="takes neither labels nor prompts"):
        Guided(denoiser, [cads()])(x_t, at(0), none)
    with pytest.raises(RequestError, match="there are two of them"):
        Guided(load("digits"), [cads(), cads()])(noise(load("digits")), at(0), load("digits").condition(LABELS))


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("tau1, tau2", {"tau1": 0.9, "tau2": 0.6}),
        ("tau2", {"tau2": 1.5}),
        ("tau1", {"tau1": float("nan")}),
        ("mix", {"mix": 1.5}),
        ("scale", {"scale": -0.1}),
    ],
)
def test_impossible_settings_are_refused_by_name(field: str, words: dict[str, float]):
    with pytest.raises(RequestError, match=f"^{field}: "):
        CADS(SEEDS, **words)  # type: ignore[arg-type]


def test_diffusers_pipelines_refuse_it_as_they_tell_their_network_themselves():
    pipeline = tiny_sdxl()
    with pytest.raises(RequestError, match="terms: 'cads': it changes the network's condition"):
        GuidanceCallback(pipeline, [cads()], "a cat")
    with pytest.raises(RequestError, match="terms: 'cads': it changes the network's condition"):
        HandfulGuider(from_pipeline(pipeline), [cads()])
