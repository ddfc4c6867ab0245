"""How each family of pretrained networks is loaded and called: one file a family; `load` finds the right one."""

from __future__ import annotations

import json
from pathlib import Path

from handful.denoiser import NetworkDenoiser
from handful.errors import RequestError
from handful.zoo import ZOO, zoo_path


def load(name_or_path: str | Path, *, null_class: int | None = None, classes: list[str] | None = None) -> NetworkDenoiser:
    """Loads a pretrained model as a `Denoiser`.

    Args:
        name_or_path: A name of the zoo (`digits`), or a directory that diffusers wrote: a pipeline's (`unet/` and
            `scheduler/`), or a UNet2DModel's own.
        null_class: The label that stands for "no class"; None takes what the model's own handful.json says.
        classes: Names of its classes, by label; None takes what the model says.

    Raises:
        RequestError: If nothing that handful can load lies there, saying what was looked for.
    """
    from handful.models.unet2d import load_unet2d

    folder = zoo_path(str(name_or_path)) if str(name_or_path) in ZOO else Path(name_or_path)
    if not folder.is_dir():
        raise RequestError("model", str(name_or_path), "there is no such directory, and the zoo has no such model",
                           f"Give a directory that diffusers wrote, or one of: {', '.join(ZOO)}.")  # fmt: skip
    for config in (folder / "unet" / "config.json", folder / "config.json"):
        if config.is_file() and _class_of(config) == "UNet2DModel":
            return load_unet2d(folder, null_class=null_class, classes=classes)
    raise RequestError("model", str(folder), "it holds no UNet2DModel (looked for unet/config.json and config.json)",
                       "Give the directory that a diffusers pipeline's save_pretrained wrote.")  # fmt: skip


def _class_of(config: Path) -> str:
    try:
        return json.loads(config.read_text()).get("_class_name", "")
    except (OSError, ValueError, AttributeError) as error:
        raise RequestError("model", str(config), f"its config can't be read ({error})",
                           "Copy the model again: the file is damaged.") from error  # fmt: skip
