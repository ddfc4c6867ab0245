"""The training tool: a killed training ends as one that was not, and nothing foreign is taken up or written over."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from support.killed import killed

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import drawn_images  # noqa: E402
import train_cifar10 as tool  # noqa: E402
import training_data  # noqa: E402
import training_network  # noqa: E402
from training_state import KIND, STATE, VERSION  # noqa: E402

from handful.files.sealed import seal, unseal  # noqa: E402
from handful.models import load  # noqa: E402

TINY = [
    "--size",
    "16",
    "--width",
    "8",
    "--layers",
    "1",
    "--batch",
    "4",
    "--log-every",
    "5",
    "--samples",
    "0",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of each of two classes, a colour gradient each."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    ramp = np.linspace(0, 1, 16)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for place in range(10):
            low, high = draw.integers(0, 256, (2, 3))
            values = low + np.add.outer(ramp, ramp)[..., None] / 2 * (high - low)
            Image.fromarray(values.astype(np.uint8)).save(root / name / f"{place}.png")
    return root


def run(pictures: Path, out: Path, *options: object) -> int:
    return tool.main(["--data", str(pictures), "--out", str(out), *TINY, *map(str, options)])


@pytest.fixture(scope="module")
def begun(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of two steps, done."""
    out = tmp_path_factory.mktemp("begun") / "out"
    assert run(pictures, out, "--steps", 2) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    return told


def parts(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("log.csv", "unet/diffusion_pytorch_model.safetensors", "handful.json")}


@pytest.mark.slow
def test_a_training_killed_without_warning_ends_with_the_log_and_the_weights_of_one_that_was_not(pictures, tmp_path):
    steps = ["--steps", "30", "--dropout", "0.2"]
    assert run(pictures, tmp_path / "whole", *steps) == 0
    saved = tmp_path / "killed" / STATE
    killed(lambda: run(pictures, tmp_path / "killed", *steps, "--save-every", "0.1"), saved.exists)
    told, _ = unseal(tmp_path / "killed" / STATE, KIND, VERSION, field="state", remedy="")
    assert 0 < told["course"]["step"] < 30
    assert run(pictures, tmp_path / "killed", *steps) == 0
    assert parts(tmp_path / "killed") == parts(tmp_path / "whole")
    ends = [unseal(tmp_path / name / STATE, KIND, VERSION, field="state", remedy="")[1] for name in ("killed", "whole")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items()), "optimizer and average too"
    rows = (tmp_path / "whole" / "log.csv").read_text().splitlines()
    assert rows[0] == "step,images,loss,learning_rate"
    assert len(rows) == 1 + 30 // 5


def test_sigterm_saves_and_the_same_command_goes_on(pictures, tmp_path, monkeypatch):
    def say(text: str) -> None:
        if text.startswith("step 5 "):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(tool, "say", say)
        assert run(pictures, tmp_path / "out", "--steps", 8) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    told, _ = unseal(tmp_path / "out" / STATE, KIND, VERSION, field="state", remedy="")
    assert told["course"]["step"] == 5
    assert run(pictures, tmp_path / "out", "--steps", 8) == 0
    assert run(pictures, tmp_path / "whole", "--steps", 8) == 0
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")


def test_a_piece_too_short_for_its_reading_makes_one_step_and_the_next_goes_on(pictures, tmp_path, capsys):
    for step in (1, 2):
        assert run(pictures, tmp_path / "out", "--steps", 8, "--minutes", 1e-6, "--json") == 0
        assert json.loads(capsys.readouterr().out)["step"] == step


def test_a_constant_rate_can_be_trained_longer(pictures, tmp_path):
    for steps in (3, 6):
        assert run(pictures, tmp_path / "pieces", "--steps", steps, "--constant") == 0
    assert run(pictures, tmp_path / "whole", "--steps", 6, "--constant") == 0
    assert parts(tmp_path / "pieces") == parts(tmp_path / "whole")


def test_what_comes_out_is_a_model_that_handful_loads_and_init_takes(begun, pictures, tmp_path, capsys):
    denoiser = load(begun)
    assert denoiser.shape == (3, 16, 16)
    assert tuple(denoiser.classes) == ("cat", "dog")
    assert denoiser.null_class == 2
    capsys.readouterr()
    assert run(pictures, tmp_path / "more", "--steps", 1, "--init", begun, "--samples", 1, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["finished"] is True
    assert (told["step"], told["images"]) == (1, 4)
    with Image.open(tmp_path / "more" / "samples.png") as sheet:
        assert sheet.height > 2 * 16
    first, second = (load(out).network.state_dict() for out in (begun, tmp_path / "more"))
    assert all(value.shape == second[name].shape for name, value in first.items())
    assert "--init" in refused(capsys, run(pictures, tmp_path / "more", "--steps", 1))


def test_gray_images_of_other_stages_train_and_each_piece_is_measured(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("drawn_images.JUDGE_STEPS", 10)
    gray = ["--channels", 1, "--size", 12, "--stages", "1,2,4", "--attention", 2, "--no-flip", "--steps", 2]
    for _ in range(2):
        assert run(pictures, tmp_path / "out", *gray, "--test", pictures, "--measure", 3, "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["measured"]
    rows = (tmp_path / "out" / "measured.csv").read_text().splitlines()
    assert rows[0].split(",") == list(found)
    assert rows[1:] == [",".join(map(str, found.values()))] * 2, "the classifier is kept, the images are the seed's"
    denoiser = load(tmp_path / "out")
    assert denoiser.shape == (1, 12, 12)
    config = denoiser.network.config
    assert tuple(config["block_out_channels"]) == (8, 16, 32)
    assert [kind.startswith("Attn") for kind in config["down_block_types"]] == [False, False, True]
    assert refused(capsys, run(pictures, tmp_path / "out", *gray, "--flip")).startswith("error: --flip: ")


def test_the_measurement_knows_classes_and_distance(tmp_path, monkeypatch):
    monkeypatch.setattr(drawn_images, "JUDGE_STEPS", 30)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (40, 1, 12, 12), generator=draw)
    images[20:] += 190  # dark ones, then bright ones
    real = training_data.Data(images.to(torch.uint8), torch.arange(2).repeat_interleave(20), ["dark", "bright"])
    dark, bright = (part.float() / 127.5 - 1 for part in images.split(20))
    right, wrong, noise = (
        drawn_images.measured(tmp_path, dict(zip(real.classes, pair, strict=True)), real, real, False, 0)
        for pair in ((dark, bright), (bright, dark), (torch.rand(20, 1, 12, 12, generator=draw) * 2 - 1,) * 2)
    )
    assert (right["named_right"], wrong["named_right"], right["test_images_named_right"]) == (1, 0, 1)
    assert right["frechet"] == pytest.approx(0, abs=1e-3)
    assert noise["frechet"] > 10 * max(right["frechet"], 0.01)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped", "foreign", "other network"])
def test_a_damaged_or_foreign_state_is_refused_by_name_and_kept(begun, pictures, tmp_path, capsys, damage):
    out = tmp_path / "out"
    shutil.copytree(begun, out)
    held = (out / STATE).read_bytes()
    told, tensors = unseal(out / STATE, KIND, VERSION, field="state", remedy="")
    broken = {
        "cut": lambda: held[: len(held) // 2],
        "empty": lambda: b"",
        "garbage": lambda: b"x" * 1000,
        "flipped": lambda: held[:-9] + bytes([held[-9] ^ 4]) + held[-8:],
        "foreign": lambda: save({"weight": torch.zeros(2)}),
        "other network": lambda: seal(KIND, VERSION, told, dict(list(tensors.items())[1:])),
    }[damage]()
    (out / STATE).write_bytes(broken)
    capsys.readouterr()
    text = refused(capsys, run(pictures, out, "--steps", 2))
    assert STATE in text
    assert "--out" in text
    assert (out / STATE).read_bytes() == broken


@pytest.mark.parametrize("option", [("--width", 16), ("--batch", 8), ("--seed", 1), ("--steps", 3), ("--rate", 0.1)])
def test_a_state_of_other_settings_is_refused_by_the_option(begun, pictures, capsys, option):
    capsys.readouterr()
    text = refused(capsys, run(pictures, begun, "--steps", 2, *option))
    assert text.startswith(f"error: {option[0]}: ")


def test_a_state_of_other_images_is_refused(begun, pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "other")
    (tmp_path / "other" / "cat" / "3.png").unlink()
    capsys.readouterr()
    assert "begun with other images" in refused(capsys, run(tmp_path / "other", begun, "--steps", 2))


def test_a_directory_of_something_else_is_refused_and_kept(pictures, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "thesis.txt" in refused(capsys, run(pictures, tmp_path, "--steps", 2))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_init_that_does_not_fit_is_refused_by_name(begun, pictures, tmp_path, capsys):
    cut = tmp_path / "cut"
    shutil.copytree(begun, cut)
    file = cut / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    eps = tmp_path / "eps"
    shutil.copytree(begun, eps)
    config = json.loads((eps / "scheduler" / "scheduler_config.json").read_text())
    (eps / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "epsilon"}))
    linear = tmp_path / "linear"
    shutil.copytree(begun, linear)
    (linear / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"beta_schedule": "linear"}))
    for init, problem in (
        (cut, "can't be loaded"),
        (eps, "predicts v"),
        (linear, "noise levels"),
        ("digits", "its images"),
        (tmp_path / "nothing", "there is no such"),
    ):
        text = refused(capsys, run(pictures, tmp_path / "out", "--steps", 2, "--init", init))
        assert text.startswith("error: --init: ")
        assert problem in text
    assert not any((tmp_path / "out").glob("[!.]*"))


@pytest.mark.parametrize(
    "option",
    [
        ("--width", 12),
        ("--size", 0),
        ("--size", 20),
        ("--stages", "0,1"),
        ("--attention", 4),
        ("--rate", "nan"),
        ("--steps", 0),
        ("--dropout", 1),
    ],
)
def test_numbers_without_sense_are_refused_before_anything_is_written(pictures, tmp_path, capsys, option):
    assert refused(capsys, run(pictures, tmp_path / "out", *option)).startswith(f"error: {option[0]}: ")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_never_saved(pictures, tmp_path, capsys):
    assert run(pictures, tmp_path / "out", "--steps", 50, "--rate", 1e30, "--warm-up", 1, "--save-every", 0) == 1
    assert "not finite" in capsys.readouterr().err
    if (tmp_path / "out" / STATE).exists():
        _, tensors = unseal(tmp_path / "out" / STATE, KIND, VERSION, field="state", remedy="")
        assert all(bool(value.isfinite().all()) for value in tensors.values())


def test_every_image_is_seen_once_an_epoch_and_the_order_is_the_seeds():
    order = training_data.Order(10, 4, seed=3)
    seen = torch.cat([order(step) for step in range(5)])  # two epochs
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert torch.equal(training_data.Order(10, 4, seed=3)(2), order(2)), "a step's images do not depend on the steps before"
    assert not torch.equal(torch.cat([training_data.Order(10, 4, seed=4)(step) for step in range(5)]), seen)
    assert len(training_data.Order(3, 8, seed=0)(0)) == 8


def test_the_loss_weighs_the_error_of_x0_by_the_signal_to_noise_ratio_up_to_five():
    """A network that knows the only image but for an offset d: the loss is d^2 times the mean of min(SNR, 5)."""
    offset, value = 0.25, 51
    data = training_data.Data(torch.full((4, 3, 8, 8), value, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ["only"])
    abar = training_network.scheduler().alphas_cumprod.double()
    alphas, sigmas = abar.sqrt(), (1 - abar).sqrt()
    expected: list[float] = []

    def knows(x_t, t, class_labels, return_dict):
        alpha, sigma = alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)
        expected.append(offset**2 * float((alpha / sigma).square().clamp(max=5).mean()))
        assert set(class_labels.tolist()) <= {0, 1}
        return ((alpha * x_t - (value / 127.5 - 1 + offset)) / sigma,)

    torch.manual_seed(0)
    loss = training_network.loss_of(knows, data, torch.zeros(64, dtype=torch.int64), alphas, sigmas, bfloat16=False)  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(expected[0], rel=1e-3)


def test_the_rate_warms_up_and_falls_to_two_percent():
    given = argparse.Namespace(rate=1.0, warm_up=10, constant=False, steps=100)
    rates = [training_network.learning_rate(step, given) for step in range(101)]  # type: ignore[arg-type]
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0.02)
    assert all(before >= after for before, after in itertools.pairwise(rates[10:]))
