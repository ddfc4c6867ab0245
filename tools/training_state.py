"""What a training keeps, so that a killed one goes on as if nothing had happened; see train_cifar10.py.

OUT/state.safetensors is sealed (kind, version, checksum) and written whole or not at all: settings, the log so far, network,
moving average and AdamW's moments, all in float32. No random state is in it: every step seeds its own draws.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from handful.data.images import write_atomically
from handful.errors import RequestError, first_line
from handful.files.sealed import seal, unseal

KIND, VERSION = "training state", 1
STATE, LOG = "state.safetensors", "log.csv"
AGAIN = "Choose another --out to train anew, or remove the file to begin again there."


@dataclass(frozen=True)
class Settings:
    """What decides the curve: a state of other settings is refused. Named as the options are."""

    width: int
    layers: int
    dropout: float
    batch: int
    rate: float
    steps: int | None  # None where the rate is constant: it then decides nothing but the end
    constant: bool
    warm_up: int
    average: float
    seed: int
    precision: str
    size: int
    log_every: int
    init: str | None  # digest of the weights begun with
    data: str  # digest of images, labels and class names
    flip: bool = True


@dataclass
class Course:
    """How far a training is.

    Attributes:
        step: Steps done.
        log: Rows of log.csv.
        loss_sum: Of the steps since the last row.
        seconds: Of training, in all pieces.
    """

    step: int = 0
    log: list[list[float]] = field(default_factory=list)
    loss_sum: float = 0.0
    seconds: float = 0.0


class Learner:
    """The network, its moving average and its optimizer, as they are saved and taken up again."""

    def __init__(self, network: UNet2DModel, rate: float, device: torch.device) -> None:
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.network = network.to(device, memory_format=layout).train()  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.parameters, self.averages = list(self.network.parameters()), list(self.average.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the step's number, by name."""
        held = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        held |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for (name, _), one in zip(self.network.named_parameters(), self.parameters, strict=True):
            held |= {f"{moment}.{name}": self.optimizer.state[one][moment] for moment in ("exp_avg", "exp_avg_sq")}
        return held

    def take(self, held: dict[str, Tensor], step: int, file: Path) -> None:
        """The inverse of `tensors`; `file` is where they were read.

        Raises:
            RequestError: They are another network's.
        """
        try:
            self._take(held, step)
        except (RuntimeError, KeyError) as error:
            raise RequestError("--out", file, f"its weights do not fit its network ({first_line(error)})", AGAIN) from error

    def _take(self, held: dict[str, Tensor], step: int) -> None:
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for key, value in held.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        self.network.load_state_dict(parts["network"])
        self.average.load_state_dict(parts["average"])
        for (name, _), one in zip(self.network.named_parameters(), self.parameters, strict=True):
            self.optimizer.state[one] = {
                "step": torch.tensor(float(step), device=one.device if one.is_cuda else "cpu"),
                **{moment: torch.empty_like(one).copy_(parts[moment][name]) for moment in ("exp_avg", "exp_avg_sq")},
            }


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """Makes OUT where it is needed, keeps other processes out, and removes what a kill left half-written.

    Raises:
        RequestError: It holds something else, or another process trains there.
    """
    present = sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) if out.is_dir() else []
    if present and STATE not in present:
        raise RequestError("--out", out, f"it holds no training, but {', '.join(present[:5])}", "Choose a new directory.")
    if out.exists() and not out.is_dir():
        raise RequestError("--out", out, "this is a file", "Choose a new directory.")
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as handle:
        try:
            import fcntl  # Windows has none; there nobody is kept out

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError:
            raise RequestError("--out", out, "another process trains there", "Wait, or choose another --out.") from None
        for left in out.rglob(".*.tmp"):
            left.unlink()
        yield


def save_state(out: Path, settings: Settings, course: Course, learner: Learner) -> None:
    """The state first: what else lies in OUT is made of it."""
    told = {
        "settings": asdict(settings),
        "course": asdict(course),
        "threads": torch.get_num_threads(),
        "network": network_config(learner.network),
    }
    write_atomically(out / STATE, seal(KIND, VERSION, told, learner.tensors()))
    write_log(out, course)


def network_config(network: UNet2DModel) -> dict[str, Any]:
    held: Any = network.config
    return json.loads(json.dumps({key: value for key, value in held.items() if not key.startswith("_")}))


def write_log(out: Path, course: Course) -> None:
    rows = [f"{int(step)},{int(images)},{loss:.6g},{rate:.6g}\n" for step, images, loss, rate in course.log]
    write_atomically(out / LOG, ("step,images,loss,learning_rate\n" + "".join(rows)).encode())


def read_state(out: Path, settings: Settings, network: UNet2DModel) -> tuple[Course, dict[str, Tensor], int] | None:
    """What an earlier piece left: how far it was, its tensors, its threads. None where there is nothing.

    Raises:
        RequestError: The file is damaged, of something else, or of other settings.
    """
    file = out / STATE
    if not file.exists():
        return None
    told, tensors = unseal(file, KIND, VERSION, field="--out", remedy=AGAIN)
    now = asdict(settings)
    try:
        then, course, threads = {"flip": True} | told["settings"], Course(**told["course"]), int(told["threads"])
        differ = [name for name in now if then[name] != now[name]]
        other = told["network"] != network_config(network)
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError("--out", file, f"it is no state of this training ({first_line(error)})", AGAIN) from error
    for name in differ:
        shown = f"--{name.replace('_', '-')}"
        if name in ("data", "init"):
            what = "other images or labels" if name == "data" else "other weights, or none" if now[name] else "--init"
            raise RequestError(shown, None, f"the training in '{out}' was begun with {what}", f"Give the same. {AGAIN}")
        raise RequestError(shown, now[name], f"the training in '{out}' was begun with {then[name]}", f"Give that. {AGAIN}")
    if other:
        raise RequestError("--out", file, "its network has another architecture", AGAIN)
    return course, tensors, threads
