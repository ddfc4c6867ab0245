"""handful: turn a handful of real images into a training set.

    import handful

    recipe = handful.read_recipe("recipe.yaml")
    summary = handful.generate(recipe, "out")

Names are imported when they are first used: `import handful` costs no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from handful.core.denoiser import Condition as Condition
    from handful.core.denoiser import Denoiser as Denoiser
    from handful.data.exemplars import Exemplars as Exemplars
    from handful.errors import HandfulError as HandfulError
    from handful.errors import RequestError as RequestError
    from handful.errors import RunError as RunError
    from handful.features.registry import FeatureExtractor as FeatureExtractor
    from handful.features.registry import load_extractor as load_extractor
    from handful.generate import generate as generate
    from handful.guidance import Guided as Guided
    from handful.models import from_pipeline as from_pipeline
    from handful.models import load as load
    from handful.recipe.file import read_recipe as read_recipe
    from handful.recipe.schema import Recipe as Recipe

# Where each public name lives. `handful.generate` is the package of that name, which can be called.
_HOME = {
    "Condition": "handful.core.denoiser",
    "Denoiser": "handful.core.denoiser",
    "HandfulError": "handful.errors",
    "RequestError": "handful.errors",
    "RunError": "handful.errors",
    "Exemplars": "handful.data.exemplars",
    "FeatureExtractor": "handful.features.registry",
    "load_extractor": "handful.features.registry",
    "Recipe": "handful.recipe.schema",
    "read_recipe": "handful.recipe.file",
    "Guided": "handful.guidance",
    "from_pipeline": "handful.models",
    "load": "handful.models",
}

__all__ = ["__version__", "generate", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

_ROOMS = ("generate", "guidance", "metrics", "models", "features", "zoo", "sweep", "calibrate")

# Modules that stood at the root until 0.1: `from handful.samplers import start` goes on working.
_MOVED = {
    "augmentation": "data.augmentation",
    "contact_sheet": "runs.contact_sheet",
    "denoiser": "core.denoiser",
    "diffusers": "integrations.diffusers",
    "evaluate": "judge.evaluate",
    "exemplars": "data.exemplars",
    "images": "data.images",
    "noise": "core.noise",
    "progress": "runs.progress",
    "samplers": "core.samplers",
    "shared_exemplars": "data.shared_exemplars",
    "softplus": "features.softplus",
    "utility": "judge.utility",
}


class _Moved(MetaPathFinder, Loader):
    """Finds a module of `_MOVED` under its old name: the same module, not a copy."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        room, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if room == __name__ and name in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"{__name__}.{_MOVED[spec.name.partition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Importing has put the old name into the module's spec: it gets its own back."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_Moved())


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _ROOMS or name in _MOVED:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
