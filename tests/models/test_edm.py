"""EDM networks: our samplers against EDM's algorithm 1, and how networks and pickles are taken or refused.

diffusers has no pipeline for such networks: its EDM schedulers keep the preconditioning to themselves. So the independent
side is the paper's algorithm 1 (Karras et al. 2022, Euler and trapezoid in sigma, no churn), written out below in float64.
"""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.edm import Preconditioned
from torch import Tensor, nn

from handful.core.denoiser import Denoiser
from handful.core.noise import EDM
from handful.core.samplers import SAMPLERS, ddim, heun, start
from handful.errors import RequestError
from handful.guidance.cfg import CFG
from handful.guidance.guided import Guided
from handful.models import load, skeleton
from handful.models.edm import EDMDenoiser
from handful.models.placement import Placement, check_placement, place


class Casting(Preconditioned):
    """One that casts by itself, as NVIDIA's do: float32 in and out whatever its weights are, float16 by a flag."""

    use_fp16 = True

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert self.first.weight.dtype == torch.float32  # nothing else may have cast it
        return super().forward(x.float(), sigma.float(), class_labels)


def noise(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def algorithm_1(steps: int, labels: list[int], w: float, *, second_order: bool = True) -> Tensor:
    """Karras et al. 2022, algorithm 1, with the levels of equation 5; w: of classifier-free guidance."""
    net = Preconditioned().double()
    rows = torch.zeros(len(labels), 4, dtype=torch.float64)
    for row, label in enumerate(labels):
        rows[row, label] = 1

    def denoise(x: Tensor, t: float) -> Tensor:
        sigma = torch.full((len(labels),), t, dtype=torch.float64)
        told = net(x, sigma, rows)
        return told + w * (told - net(x, sigma, torch.zeros_like(rows)))

    def level(i: int) -> float:
        return (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7

    t = [level(i) for i in range(steps)] + [0.0]
    x = t[0] * noise(len(labels)).double()
    with torch.no_grad():
        for i in range(steps):
            d = (x - denoise(x, t[i])) / t[i]
            after = x + (t[i + 1] - t[i]) * d
            if second_order and t[i + 1] != 0:
                d_after = (after - denoise(after, t[i + 1])) / t[i + 1]
                after = x + (t[i + 1] - t[i]) * (d + d_after) / 2
            x = after
    return x


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


# --- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-5)])
@pytest.mark.parametrize("steps", [4, 18])
@pytest.mark.parametrize("w", [0.0, 1.5])
@pytest.mark.parametrize(("sampler", "second_order"), [(heun, True), (ddim, False)])
def test_our_sample_is_that_of_the_papers_algorithm_1(sampler, second_order, w, steps, dtype, tolerance):
    """In float64 to 1e-10; in float32, what is left is the rounding of a state that starts at 80 times the images' range."""
    denoiser = EDMDenoiser(Preconditioned().to(dtype), null_class=4)
    levels = denoiser.levels.spacing(steps)
    with torch.no_grad():
        found = sampler(Guided(denoiser, [CFG(w)]), start(noise().to(dtype), levels), levels, denoiser.condition([0, 3, 1]))
    assert found.dtype == dtype
    assert off(found, algorithm_1(steps, [0, 3, 1], w, second_order=second_order)) < tolerance


def test_what_is_compared_differs_by_order_label_and_guidance():
    plain = algorithm_1(4, [0, 3, 1], 0.0)
    for other in (
        algorithm_1(4, [0, 3, 1], 0.0, second_order=False),
        algorithm_1(4, [0, 2, 1], 0.0),
        algorithm_1(4, [0, 3, 1], 1.5),
    ):
        assert off(other, plain) > 1e-3


# --- what the network says of itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "levels"),
    [((0, float("inf")), (0.002, 80)), ((0.02, 100), (0.02, 80)), ((0.0064, 50), (0.0064, 50)), (None, (0.002, 80))],
)
def test_the_levels_are_the_papers_within_the_networks_bounds(said, levels):
    network: Any = nn.Conv2d(3, 3, 1)
    if said:
        network.sigma_min, network.sigma_max = said
    found = EDMDenoiser(network, shape=(3, 8, 8)).levels
    assert isinstance(found, EDM)
    assert (found.sigma_min, found.sigma_max) == levels


def test_the_shape_is_the_networks_or_the_one_stated():
    assert EDMDenoiser(Preconditioned()).shape == (3, 8, 8)
    assert EDMDenoiser(Preconditioned(), shape=(1, 4, 6)).shape == (1, 4, 6)
    with pytest.raises(RequestError, match=r"^model: 'Conv2d': .*img_channels"):
        EDMDenoiser(nn.Conv2d(3, 3, 1))


def test_a_network_of_latents_is_refused():
    network = Preconditioned()
    network.img_channels = 4
    with pytest.raises(RequestError, match=r"^model: 'img_channels 4': .*latents"):
        EDMDenoiser(network)


def test_bounds_without_levels_between_them_are_refused():
    network = Preconditioned()
    network.sigma_min, network.sigma_max = 90, 100
    with pytest.raises(RequestError, match=r"^model: 'sigma_min 90.*no noise levels"):
        EDMDenoiser(network)


# --- labels ------------------------------------------------------------------------------------------------------------


def heard(denoiser: EDMDenoiser, condition: Any) -> Any:
    """The class_labels that reach the network."""
    told: list[Any] = []
    handle = denoiser.network.register_forward_pre_hook(lambda _, given: told.append(given[2]))
    denoiser(noise(len(condition.labels) if condition.labels is not None else 2), denoiser.levels.spacing(4)[1], condition)
    handle.remove()
    return None if told[0] is None else told[0].tolist()


def test_labels_are_told_one_hot_and_no_class_by_zeros():
    denoiser = EDMDenoiser(Preconditioned(), null_class=4)
    assert (denoiser.label_count, denoiser.null_class, denoiser.has_null) == (5, 4, True)
    condition = denoiser.condition([3, 0])
    assert heard(denoiser, condition) == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert heard(denoiser, condition.null()) == [[0, 0, 0, 0]] * 2


def test_without_a_stated_null_class_there_is_none():
    denoiser = EDMDenoiser(Preconditioned(), classes=["a", "b", "c", "d"])
    assert (denoiser.label_count, denoiser.null_class, denoiser.has_null) == (4, None, False)
    with pytest.raises(RequestError, match="no null class"):
        denoiser.condition([0]).null()


def test_one_of_the_labels_can_be_the_null_class():
    denoiser = EDMDenoiser(Preconditioned(), null_class=2)
    assert denoiser.label_count == 4
    assert heard(denoiser, denoiser.condition([1]).null()) == [[0, 0, 1, 0]]


def test_an_unconditional_network_is_told_none():
    network = Preconditioned()
    network.label_dim = 0
    denoiser = EDMDenoiser(network)
    assert denoiser.label_count == 0
    assert heard(denoiser, denoiser.condition([5, 9])) is None
    with pytest.raises(RequestError, match=r"^null_class: 0: the model takes no class labels"):
        EDMDenoiser(network, null_class=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"null_class": 5}, r"^null_class: 5: the model's labels are 0 to 4"),
        ({"null_class": -1}, r"^null_class: -1: the model's labels are 0 to 3"),
        ({"classes": ["a", "b", "c"]}, r"^classes: '3 names': the model has 4 classes"),
        ({"classes": ["a", "b", "c"], "null_class": 4}, r"^classes: '3 names': the model has 4 classes"),
    ],
)
def test_names_and_labels_that_do_not_fit_are_refused(words, said):
    with pytest.raises(RequestError, match=said):
        EDMDenoiser(Preconditioned(), **words)


@pytest.mark.parametrize(("null_class", "label"), [(None, 4), (4, 5), (None, -1)])
def test_labels_that_the_network_does_not_know_are_refused_by_name(null_class, label):
    with pytest.raises(RequestError, match=r"^labels: "):
        EDMDenoiser(Preconditioned(), null_class=null_class).condition([label])


# --- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_with_a_network_of_half_precision_the_state_stays_float32_and_near(dtype, sampler):
    half, full = EDMDenoiser(Preconditioned(), null_class=4), EDMDenoiser(Preconditioned(), null_class=4)
    half.place("cpu", dtype)
    assert next(half.network.parameters()).dtype == dtype
    levels = full.levels.spacing(6)
    with torch.no_grad():
        ours, theirs = (
            SAMPLERS[sampler](Guided(one, [CFG(1.0)]), start(noise(), levels), levels, one.condition([0, 3, 1]))
            for one in (half, full)
        )
    assert ours.dtype == torch.float32
    assert 0 < off(ours, theirs) < 0.03


def test_in_bfloat16_the_image_itself_is_not_rounded():
    """At little noise the estimate is nearly x_t: rounded to bfloat16 on its way in, it would be off by 2e-3."""
    half, full = EDMDenoiser(Preconditioned()), EDMDenoiser(Preconditioned())
    half.place("cpu", torch.bfloat16)
    x_t, at = noise(), full.levels.spacing(4)[3]
    assert off(half(x_t, at, half.condition([0, 1, 2])), full(x_t, at, full.condition([0, 1, 2]))) < 1e-4


def test_a_network_of_half_precision_is_differentiable():
    denoiser = EDMDenoiser(Preconditioned())
    denoiser.place("cpu", torch.bfloat16)
    x_t = noise().requires_grad_()
    denoiser(x_t, denoiser.levels.spacing(4)[1], denoiser.condition([0, 1, 2])).square().sum().backward()
    assert x_t.grad is not None
    assert x_t.grad.dtype == torch.float32
    assert bool(x_t.grad.isfinite().all())
    assert float(x_t.grad.abs().max()) > 0


def test_a_network_that_casts_itself_is_told_and_not_cast():
    denoiser = EDMDenoiser(Casting())
    for dtype, told in ((torch.float32, False), (torch.float16, True)):
        denoiser.place("cpu", dtype)
        assert denoiser.network.use_fp16 is told
        denoiser(noise(), denoiser.levels.spacing(4)[1], denoiser.condition([0, 1, 2]))
    with pytest.raises(RequestError, match=r"^model\.dtype: 'bfloat16': "):
        denoiser.place("cpu", torch.bfloat16)


# --- FILE.py:FUNCTION --------------------------------------------------------------------------------------------------

FILE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from handful.core.denoiser import Denoiser
from handful.models.edm import EDMDenoiser
from handful.core.noise import EDM
from support.edm import Preconditioned

@dataclass
class Shape:
    side: int = 8

class Network(torch.nn.Conv2d):
    img_resolution, img_channels, label_dim = Shape().side, 3, 4

    def __init__(self):
        super().__init__(3, 3, 1)

    def forward(self, x, sigma, class_labels):
        return super().forward(x) + class_labels.sum(1)[:, None, None, None]

def network():
    return Network()

def denoiser():
    return EDMDenoiser(Network(), classes=["a", "b", "c", "d"])

class Zero(Denoiser):
    shape, levels = (1, 4, 4), EDM()

    def forward(self, x_t, level, condition):
        return 0 * x_t

    def condition(self, labels):
        from handful.core.denoiser import Condition
        return Condition()

def number():
    return 7

def fails():
    raise KeyError("weights.pt")

def needs(argument):
    return network()

def imports():
    import no_such_package_at_all
"""


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.py").write_text(FILE)
    return str(tmp_path / "own.py")


def test_a_network_of_ones_own_file_is_wrapped(own):
    denoiser = load(f"{own}:network", null_class=4, classes=["a", "b", "c", "d"])
    assert isinstance(denoiser, EDMDenoiser)
    assert (denoiser.label_count, list(denoiser.classes)) == (5, ["a", "b", "c", "d"])
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    outline = skeleton(f"{own}:network", null_class=4)
    for name in ("shape", "image_shape", "label_count", "null_class"):
        assert getattr(outline, name) == getattr(denoiser, name), name


def test_a_denoiser_of_ones_own_file_is_taken_as_it_is(own):
    assert list(load(f"{own}:denoiser").classes) == ["a", "b", "c", "d"]
    denoiser = load(f"{own}:denoiser", null_class=0, classes=["x", "y", "z"], dtype=torch.bfloat16)
    assert (denoiser.null_class, list(denoiser.classes)) == (0, ["x", "y", "z"])
    assert {each.dtype for each in denoiser.parameters()} == {torch.bfloat16}


def test_a_denoiser_without_a_network_is_taken_and_placed(own):
    denoiser = load(f"{own}:Zero", dtype=torch.float32)
    assert isinstance(denoiser, Denoiser)
    assert denoiser.shape == (1, 4, 4)
    check_placement(denoiser, Placement(torch.device("cpu")))
    place(denoiser, Placement(torch.device("cpu")))
    with pytest.raises(RequestError, match=r"^null_class: 0: the model takes no class labels"):
        load(f"{own}:Zero", null_class=0)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("number", r"own\.py:number': it returns neither a denoiser nor a network \(int\)"),
        ("absent", r"own\.py:absent': it returns neither a denoiser"),
        ("fails", r"own\.py:fails': running it failed \(KeyError: 'weights\.pt'\)"),
        ("needs", r"own\.py:needs': running it failed \(TypeError"),
        ("imports", r"no_such_package_at_all.*PYTHONPATH"),
    ],
)
def test_what_gives_no_model_is_refused_by_name(own, function, said):
    for call in (load, skeleton):
        with pytest.raises(RequestError, match=rf"^model: .*{said}"):
            call(f"{own}:{function}")


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(RequestError, match=r"^model: .*no such Python file"):
        load(f"{tmp_path / 'none.py'}:network")


@pytest.mark.parametrize(
    "words", [{"resolution": (16, 16)}, {"negative_prompt": "ugly"}, {"preview_decoder": "x"}, {"variant": "fp16"}]
)
def test_what_such_a_model_has_no_use_for_is_refused_by_name(own, words):
    with pytest.raises(RequestError, match=rf"^model\.{next(iter(words))}: "):
        load(f"{own}:network", **words)


# --- pickles -----------------------------------------------------------------------------------------------------------


class Payload:
    """What a pickle may hold: a call, made while it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def importable(tmp_path, monkeypatch) -> nn.Module:
    """A network whose class a pickle can name."""
    (tmp_path / "nets_of_this_test.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nets_of_this_test", raising=False)
    import nets_of_this_test  # type: ignore[import-not-found]

    return nets_of_this_test.Network()


@pytest.mark.parametrize("held", ["ema", "module"])
def test_a_trusted_pickle_is_loaded(tmp_path, importable, held):
    file = tmp_path / "network-snapshot.pkl"
    file.write_bytes(pickle.dumps({"loss_fn": None, "ema": importable} if held == "ema" else importable))
    denoiser = load(file, trust_pickle=True, null_class=4)
    assert denoiser.label_count == 5
    x_t, at = noise(), denoiser.levels.spacing(4)[1]
    with torch.no_grad():
        wanted = importable(x_t, at.sigma.float().expand(3), torch.eye(4)[:3])
        assert torch.equal(denoiser(x_t, at, denoiser.condition([0, 1, 2])), wanted)
        assert skeleton(file, trust_pickle=True).shape == denoiser.shape


def test_a_pickle_is_refused_before_it_can_run_anything(tmp_path):
    mark, file = tmp_path / "it-ran", tmp_path / "network.pkl"
    file.write_bytes(pickle.dumps({"ema": Payload(mark)}))
    for call in (load, skeleton):
        with pytest.raises(RequestError, match=r"^model: .*runs code from.*--trust-pickle \(model\.trust_pickle: true\)"):
            call(file)
    assert not mark.exists()
    with pytest.raises(RequestError, match=r"^model: .*neither a denoiser nor a network"):
        load(file, trust_pickle=True)
    assert mark.exists()  # the payload works where it is let


def test_nvidias_own_modules_are_named_where_they_are_missing(tmp_path):
    """A pickle that NVIDIA's persistence made, as far as its first import."""
    (tmp_path / "torch_utils").mkdir()
    (tmp_path / "torch_utils" / "persistence.py").write_text("def _reconstruct_persistent_obj(meta): return meta\n")
    script = """
import pickle, torch_utils.persistence as persistence
class Network:
    def __reduce__(self):
        return persistence._reconstruct_persistent_obj, ({},)
open("network.pkl", "wb").write(pickle.dumps({"ema": Network()}))
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    with pytest.raises(RequestError, match=r"^model: .*torch_utils.*github\.com/NVlabs/edm.*PYTHONPATH"):
        load(tmp_path / "network.pkl", trust_pickle=True)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", r"can't be unpickled \(EOFError"),
        (b"\x80\x04\x95", r"can't be unpickled"),
        (pickle.dumps({"net": 1, "opt": 2}), r"holds net, opt, .*but no 'ema' network"),
        (pickle.dumps([1, 2]), r"neither a denoiser nor a network \(list\)"),
        (b"cno_such_package_at_all\nThing\n.", r"needs the module no_such_package_at_all"),
    ],
)
def test_what_is_no_network_is_refused_by_name(tmp_path, data, said):
    file = tmp_path / "network.pkl"
    file.write_bytes(data)
    with pytest.raises(RequestError, match=rf"^model: .*{said}"):
        load(file, trust_pickle=True)
