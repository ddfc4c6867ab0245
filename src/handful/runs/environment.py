"""What `handful doctor` finds: versions, device, caches, extras, and what is broken. No import that breaks is done in here."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from handful import __version__

NEEDED = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
    "pydantic",
    "pyarrow",
)
# What each optional package is for, and how to get it.
EXTRAS = {
    "ray": ("several GPUs or machines (--engine ray)", "pip install 'handful[ray]'"),
    "peft": ("models with LoRA weights", "pip install 'handful[lora]'"),
    "datasets": ("loading a run directory as a data set", "pip install datasets"),
    "webdataset": ("reading tar shards in training", "pip install webdataset"),
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do where it is not well.

    Attributes:
        state: `good`, `absent` (and not needed) or `broken`.
    """

    name: str
    state: Literal["good", "absent", "broken"]
    text: str
    remedy: str = ""


def examine(*, imports: bool = True) -> list[Finding]:
    """Looks at everything.

    Args:
        imports: Import torch and torchvision, in a process of its own; else only versions are read.
    """
    found = [Finding("handful", "good", f"{__version__}, Python {platform.python_version()}, {platform.system()}")]
    found += [_package(name) for name in NEEDED]
    if imports:
        found += [*_device(), _torchvision()]
    found += [_extra(name, *about) for name, about in EXTRAS.items()]
    found += [_handful_cache(), _hub_cache(), _disk()]
    return found


def _package(name: str) -> Finding:
    wanted = next(
        (each for each in requires("handful") or [] if each.replace(" ", "").startswith((f"{name}>", f"{name}="))), ""
    )
    try:
        there = version(name)
    except PackageNotFoundError:
        return Finding(name, "broken", "not installed", f"pip install '{wanted or name}'")
    least = wanted.partition(">=")[2].partition(",")[0].partition(";")[0].strip()
    if least and _numbers(there) < _numbers(least):
        return Finding(name, "broken", f"{there}, older than {least}", f"pip install --upgrade '{wanted}'")
    return Finding(name, "good", there)


def _numbers(text: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0)."""
    parts = text.partition("+")[0].split(".")
    return tuple(int("".join(digit for digit in part if digit.isdigit()) or 0) for part in parts)


def _alone(code: str) -> tuple[bool, str]:
    """Runs code in a process of its own: whether it ended well, and the last line that it said."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return False, "the import took longer than two minutes"
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, said[-1] if said else ""


def _device() -> list[Finding]:
    code = (
        "import torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0;"
        "names = ', '.join(torch.cuda.get_device_name(i) for i in range(n));"
        "print(f'cuda: {names}' if n else 'mps' if torch.backends.mps.is_available()"
        " else f'cpu, {torch.get_num_threads()} threads; no GPU, so large models are slow')"
    )
    well, text = _alone(code)
    if well:
        return [Finding("device", "good", text)]
    return [
        Finding("device", "broken", f"torch can't be imported: {text}", "Install torch again, as described on pytorch.org.")
    ]


def _torchvision() -> Finding:
    try:
        there = version("torchvision")
    except PackageNotFoundError:
        return Finding("torchvision", "absent", "not installed, and not needed")
    well, text = _alone("import torchvision")
    if well:
        return Finding("torchvision", "good", f"{there}, not needed")
    remedy = "pip uninstall torchvision (handful does not need it), or install the build that fits this torch."
    return Finding("torchvision", "broken", f"{there} does not work, and breaks diffusers and transformers: {text}", remedy)


def _extra(name: str, purpose: str, remedy: str) -> Finding:
    try:
        return Finding(name, "good", f"{version(name)}, for {purpose}")
    except PackageNotFoundError:
        return Finding(name, "absent", f"not installed, for {purpose}", remedy)


def _handful_cache() -> Finding:
    from handful.data.exemplars import default_cache

    cache = default_cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        remedy = "Set HANDFUL_CACHE to a folder that you may write into. Until then, features are computed again each time."
        return Finding("cache", "broken", f"{cache} can't be written ({error.strerror or error})", remedy)
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return Finding("cache", "good", f"{cache}, {size / 1e6:.0f} MB of exemplars' features; safe to delete")


def _hub_cache() -> Finding:
    home = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    models = sorted(path.name.removeprefix("models--").replace("--", "/") for path in Path(home).glob("models--*"))
    offline = "; offline (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True", "ON") else ""
    listed = f"{len(models)} models" + (f": {', '.join(models[:5])}" if models else "") + (" ..." if len(models) > 5 else "")
    return Finding("hub cache", "good", f"{home}, {listed}{offline}")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 1e9
    if free < 1:
        return Finding("disk", "broken", f"{free:.2f} GB free here", "Free some space, or work in another folder.")
    return Finding("disk", "good", f"{free:.0f} GB free here")
