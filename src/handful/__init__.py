"""handful: turn a handful of real images into a training set.

    import handful

    recipe = handful.read_recipe("recipe.yaml")
    summary = handful.generate(recipe, "out")

Names are imported when they are first used: `import handful` costs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from handful.denoiser import Condition as Condition
    from handful.denoiser import Denoiser as Denoiser
    from handful.errors import HandfulError as HandfulError
    from handful.errors import RequestError as RequestError
    from handful.errors import RunError as RunError
    from handful.exemplars import Exemplars as Exemplars
    from handful.features import FeatureExtractor as FeatureExtractor
    from handful.features import load_extractor as load_extractor
    from handful.generate import generate as generate
    from handful.generate.recipe import Recipe as Recipe
    from handful.generate.recipe_file import read_recipe as read_recipe
    from handful.guidance import Guided as Guided
    from handful.models import from_pipeline as from_pipeline
    from handful.models import load as load

# Where each public name lives. `handful.generate` is the package of that name, which can be called.
_HOME = {
    "Condition": "handful.denoiser",
    "Denoiser": "handful.denoiser",
    "HandfulError": "handful.errors",
    "RequestError": "handful.errors",
    "RunError": "handful.errors",
    "Exemplars": "handful.exemplars",
    "FeatureExtractor": "handful.features",
    "load_extractor": "handful.features",
    "Recipe": "handful.generate.recipe",
    "read_recipe": "handful.generate.recipe_file",
    "Guided": "handful.guidance",
    "from_pipeline": "handful.models",
    "load": "handful.models",
}

__all__ = [
    "Condition",
    "Denoiser",
    "Exemplars",
    "FeatureExtractor",
    "Guided",
    "HandfulError",
    "Recipe",
    "RequestError",
    "RunError",
    "__version__",
    "from_pipeline",
    "generate",
    "load",
    "load_extractor",
    "read_recipe",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in ("generate", "guidance", "metrics", "models", "samplers", "features", "noise", "zoo", "diffusers"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
