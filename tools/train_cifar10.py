"""Trains a class-conditional diffusion model of small images, colour or gray; it may be killed at any time.

    python tools/train_cifar10.py --data train.parquet --out cifar10 --compile            one GPU; the same command goes on
    python tools/train_cifar10.py --data train.parquet --out cifar10 --minutes 25         a piece of 25 minutes, then the next
    python tools/train_cifar10.py --data photos/ --size 64 --out photos-model             any folder with a folder per class
    python tools/train_cifar10.py --data train.parquet --out more --init cifar10 --constant --rate 4e-4 --batch 64
    python tools/train_cifar10.py --data ../shared/data/fashion-mnist --out fashion --channels 1 --size 28 --no-flip \
        --width 32 --stages 1,2,4 --attention 2 --layers 1 --batch 64 --steps 16000 --rate 5e-4 --minutes 30
                     Fashion-MNIST: 2.7 M parameters, a million images in about four hours of two idle cores, piece by piece

A diffusers `UNet2DModel`: v-prediction, VP cosine, min-SNR-5 weights (Hang et al. 2023, arXiv 2303.09556), 10 % null class,
flips, a moving average of the weights; bfloat16 autocast on a GPU. OUT becomes a model that `handful generate --model OUT`
takes: unet/ (the average, in bfloat16), scheduler/, handful.json; and log.csv, samples.png and state.safetensors, from which
the same command goes on. With test images (--test, or those beside DATA/train.parquet) each piece ends with a row of
measured.csv: the share of drawn images that a classifier of the real ones names as asked, and their Frechet distance. Every
random choice of a step (data order, flips, classes dropped, levels, noise, dropout) is a function of --seed and the step's
number, so a training that was killed ends with the log of one that was not, and on a CPU with its weights, to the bit.
Progress goes to stderr; with --json the last line on stdout is one object.
Exit codes: 0 the piece is done, 1 failed, 2 wrong request, 130 or 143 interrupted and saved.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import torch
from drawn_images import draw, measured
from torch import nn
from training_data import Data, Order, read_data, seed_of, sources
from training_network import export, learning_rate, loss_of, network_from, new_network, scheduler
from training_state import STATE, Course, Learner, Settings, owned, read_state, save_state

from handful.errors import RequestError, RunError
from handful.files.digests import weights_digest
from handful.runs.contact_sheet import contact_sheet
from handful.runs.progress import duration

SAMPLES = "samples.png"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add(
        "--data",
        required=True,
        help="a parquet file as datasets writes it, a folder with a folder of images per class, or one with train.parquet",
    )
    add("--test", help="real images to measure by, as --data (default: DATA/test.parquet, where DATA/train.parquet is read)")
    add("--measure", type=int, default=100, metavar="N", help="draw N of each class for it; 0: none (default: %(default)s)")
    add("--out", required=True, type=Path, help="a new directory, or one in which this training was begun")
    add("--init", help="a model to start from (a directory of diffusers, or `cifar10`): its architecture and weights")
    add("--steps", type=int, default=60_000, help="of the whole training (default: %(default)s)")
    add("--minutes", type=float, help="length of this piece, without saving and sampling (default: until the end)")
    add("--batch", type=int, default=512, help="images a step (default: %(default)s)")
    add("--rate", type=float, default=8e-4, help="peak learning rate of AdamW (default: %(default)s)")
    add("--constant", action="store_true", help="keep the rate after the warm-up; otherwise it falls as a cosine")
    add("--warm-up", type=int, default=500, help="steps of the warm-up (default: %(default)s)")
    add("--width", type=int, default=64, help="channels of the first stage, a multiple of 8 (default: 64, 16 M parameters)")
    add("--layers", type=int, default=2, help="residual blocks a stage (default: %(default)s)")
    add(
        "--stages",
        type=numbers,
        default=[1, 2, 3, 3],
        help="channels of each stage, in multiples of --width (default: 1,2,3,3)",
    )
    add("--attention", type=numbers, default=[1, 2], help="stages with attention, counted from 0; or none (default: 1,2)")
    add("--channels", type=int, choices=(1, 3), default=3, help="3: colour, 1: gray (default: %(default)s)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror images; not shoes that all point one way")
    add("--dropout", type=float, default=0.1, help="(default: %(default)s)")
    add("--average", type=float, default=5e5, help="half-life of the moving average, in images (default: %(default)s)")
    add("--size", type=int, default=32, help="height and width of the images (default: %(default)s)")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 autocast on a GPU")
    add("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    add("--threads", type=int, help="of torch on the CPU (default: as the training was begun)")
    add("--compile", action="store_true", help="torch.compile the network: faster, but for the first minute")
    add("--save-every", type=float, default=300.0, metavar="SECONDS", help="what a kill costs at most (default: %(default)s)")
    add("--log-every", type=int, default=100, metavar="STEPS", help="steps to a row of log.csv (default: %(default)s)")
    add("--samples", type=int, default=8, help="images of each class in samples.png; 0 draws none (default: %(default)s)")
    add("--json", action="store_true", help="print the result as JSON, the last line on stdout")
    return made


def numbers(text: str) -> list[int]:
    """`1,2,4`; `none` is the empty list."""
    return [] if text == "none" else [int(part) for part in text.split(",")]


def check(given: argparse.Namespace) -> None:
    """Refuses numbers without sense, before anything is read."""
    least = {
        "steps": 1,
        "batch": 1,
        "warm_up": 1,
        "width": 8,
        "layers": 1,
        "size": 8,
        "log_every": 1,
        "samples": 0,
        "measure": 0,
    }
    for name, low in least.items():
        if getattr(given, name) < low:
            raise RequestError(f"--{name.replace('_', '-')}", getattr(given, name), "it is too small", f"Give {low} or more.")
    if not given.stages or min(given.stages) < 1:
        raise RequestError("--stages", given.stages, "each stage needs a multiple of 1 or more", "Give 1,2,3,3 or so.")
    if not set(given.attention) <= set(range(len(given.stages))):
        last = len(given.stages) - 1
        raise RequestError("--attention", given.attention, "there is no such stage", f"Give some of 0 to {last}, or none.")
    for name, part in (("width", 8), ("size", 2 ** (len(given.stages) - 1))):  # each stage but the last halves the side
        if getattr(given, name) % part:
            remedy = f"Give {part}, {2 * part}, {3 * part} and so on."
            raise RequestError(f"--{name}", getattr(given, name), f"it is no multiple of {part}", remedy)
    if not 0 <= given.dropout < 1:
        raise RequestError("--dropout", given.dropout, "it is no probability below 1", "Give 0 to 0.9.")
    for name in ("rate", "average"):
        if not 0 < getattr(given, name) < math.inf:
            raise RequestError(f"--{name}", getattr(given, name), "it is not positive", "Give a positive number.")
    if given.device != "auto" and given.device.startswith("cuda") and not torch.cuda.is_available():
        raise RequestError("--device", given.device, "this machine has no such device", "Use auto, or cpu.")


class Interrupt:
    """Ctrl-C and SIGTERM while it is entered: the step is finished and saved first.

    Attributes:
        number: Of the signal; 0 where none came.
    """

    def __enter__(self) -> Interrupt:
        self.number = 0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.number = number


def train(
    given: argparse.Namespace,
    settings: Settings,
    data: Data,
    learner: Learner,
    course: Course,
    until: float,
    interrupt: Interrupt,
) -> None:
    """Goes on until the last step, the end of the piece or a signal; the state is saved when it returns.

    Raises:
        RunError: The loss is not finite; the last saved state is kept.
    """
    device = data.images.device
    abar = scheduler().alphas_cumprod.to(device)
    alphas, sigmas = abar.sqrt(), (1 - abar).sqrt()
    network: Any = torch.compile(learner.network) if given.compile else learner.network
    order = Order(len(data.images), settings.batch, settings.seed)
    total = torch.tensor(course.loss_sum, dtype=torch.float64, device=device)
    begun = saved = told = time.monotonic()
    before, at_told = course.seconds, course.step

    def save_now() -> None:
        course.loss_sum, course.seconds = float(total), before + time.monotonic() - begun
        if not math.isfinite(course.loss_sum):
            raise RunError(
                f"the loss is not finite at step {course.step}; lower --rate. '{given.out}' keeps the last good state"
            )
        save_state(given.out, settings, course, learner)

    # Reading the data can take a short piece's time: each piece makes a step, so that pieces come to an end.
    first = course.step
    while course.step < given.steps and (course.step == first or time.monotonic() < until) and not interrupt.number:
        rate = learning_rate(course.step, settings)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed_of(settings.seed, "step", course.step))
        pick = order(course.step).to(device)
        loss = loss_of(network, data, pick, alphas, sigmas, settings.precision == "bfloat16", settings.flip)
        learner.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learner.parameters, 1.0)
        learner.optimizer.step()
        course.step += 1
        total += loss.detach() + 0 * norm  # an infinite gradient spoils the sum too, and so is never saved
        # The half-life grows to 1/20 of the training so far, so that the random first weights are soon forgotten.
        half_life = min(settings.average, 0.05 * settings.batch * course.step + 1)
        torch._foreach_lerp_(learner.averages, learner.parameters, 1 - 0.5 ** (settings.batch / half_life))
        now = time.monotonic()
        if course.step % settings.log_every == 0:
            mean = float(total) / settings.log_every
            course.log.append([course.step, course.step * settings.batch, mean, rate])
            total.zero_()
            speed = (course.step - at_told) / max(1e-9, now - told)
            left = duration((given.steps - course.step) / max(1e-9, speed))
            say(f"step {course.step} of {given.steps}, loss {mean:.4f}, {speed * settings.batch:.0f} images/s, {left} left")
            told, at_told = now, course.step
            if not math.isfinite(mean):
                total.fill_(math.nan)
                save_now()
        if now - saved > given.save_every:
            save_now()
            saved = time.monotonic()
    if course.step:
        save_now()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(given: argparse.Namespace) -> int:
    began = time.monotonic()
    check(given)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device)
    precision = ("bfloat16" if device.type == "cuda" else "float32") if given.precision == "auto" else given.precision
    with owned(given.out):
        source, tested = sources(given)
        data = read_data(source, given)
        test = read_data(tested, given, "--test", data.classes) if tested and given.measure else None
        network = network_from(given.init, data) if given.init else new_network(given, len(data.classes))
        settings = Settings(
            given.width,
            given.layers,
            given.dropout,
            given.batch,
            given.rate,
            None if given.constant else given.steps,
            given.constant,
            given.warm_up,
            given.average,
            given.seed,
            precision,
            given.size,
            given.log_every,
            weights_digest(network) if given.init else None,
            data.digest(),
            given.flip,
        )
        state = read_state(given.out, settings, network)
        course = state[0] if state else Course()
        if threads := given.threads or (state[2] if state else None):
            torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = True
        learner = Learner(network, given.rate, device)
        if state:
            learner.take(state[1], course.step, given.out / STATE)
        data = Data(data.images.to(device), data.labels.to(device), data.classes)
        count = sum(one.numel() for one in learner.parameters)
        say(
            f"{device}: {count / 1e6:.1f} M parameters, {len(data.images)} images of {len(data.classes)} classes, "
            + (f"going on at step {course.step}" if course.step else "from the beginning")
        )
        first = course.step
        until = began + 60 * given.minutes if given.minutes else math.inf
        clock = time.monotonic()
        with Interrupt() as interrupt:
            train(given, settings, data, learner, course, until, interrupt)
        if interrupt.number:
            say(f"interrupted: saved at step {course.step}; the same command goes on")
            return 128 + interrupt.number
        weights = export(given.out, learner.average, data.classes)
        found = None
        if most := max(given.samples, given.measure if test else 0):
            drawn = draw(given.out, data.classes, most, device)
            if given.samples:
                contact_sheet({}, drawn, given.out / SAMPLES, columns=given.samples, rows=1)
            if test:
                made = {name: images[: given.measure] for name, images in drawn.items()}
                found = measured(given.out, made, data, test, given.flip, course.step * given.batch)
                say(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in found.items()))
    finished = course.step >= given.steps
    say(
        f"{'finished' if finished else 'to be continued by the same command'}: {course.step} steps, "
        f"{course.step * given.batch / 1e6:.2f} M images, {duration(course.seconds)}"
    )
    if given.json:
        print(
            json.dumps(
                {
                    "out": str(given.out),
                    "weights": str(weights),
                    "finished": finished,
                    "step": course.step,
                    "images": course.step * given.batch,
                    "loss": course.log[-1][2] if course.log else None,
                    "seconds": round(course.seconds, 1),
                    "parameters": count,
                    "measured": found,
                    "images_per_second": round((course.step - first) * given.batch / max(1e-9, time.monotonic() - clock), 1),
                }
            )
        )
    return 0


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        return run(given)
    except (RequestError, RunError, OSError) as error:
        say(f"error: {error}")
        if given.json:
            kind = "request" if isinstance(error, RequestError) else "run"
            print(json.dumps({"error": {"kind": kind, "message": str(error), "field": getattr(error, "field", None)}}))
        return 2 if isinstance(error, RequestError) else 1


if __name__ == "__main__":
    sys.exit(main())
