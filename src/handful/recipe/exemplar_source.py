"""The exemplars of a recipe, from a folder or a file of features: listed before the model is known, drawn after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from handful.data.exemplars import FEWEST_TO_TEST, PER_CLASS_LEFT, Exemplars
from handful.data.shared_exemplars import ExemplarFeatures, View, features_file
from handful.data.sources import labelled_files, split_source
from handful.errors import RequestError, counted, some_of
from handful.features.extractor import FeatureExtractor
from handful.guidance.method import PLAIN_TEMPLATE, Requests, named, potentials
from handful.recipe.schema import Recipe, did_you_mean

Given = Exemplars | ExemplarFeatures


def has_images(recipe: Recipe) -> bool:
    """Whether there are exemplars, and as images: a file of features holds none."""
    return recipe.exemplars.path is not None and features_file(recipe.exemplars.path) is None


def listed_exemplars(recipe: Recipe, out: Path) -> tuple[Recipe, dict[str, int] | None]:
    """How many images each class has, from the folder's listing alone, or from the file of features.

    Returns:
        The recipe, with the seed of the draw that a file of features was made by; and the counts, None without exemplars.

    Raises:
        RequestError: They can't be found, a class is missing, or there are too few.
    """
    asked = recipe.exemplars
    if asked.path is None:
        return recipe, None
    if (file := features_file(asked.path)) is not None:
        stored = ExemplarFeatures.load(file)
        if "seed" in asked.model_fields_set and asked.seed != stored.seed:
            problem = f"the draw in '{asked.path}' was made with seed {stored.seed}, which a file of features can't change"
            raise RequestError("exemplars.seed", asked.seed, problem, "Leave the seed out, or give the folder of images.")
        recipe = recipe.model_copy(update={"exemplars": asked.model_copy(update={"seed": stored.seed})})
        counts = stored.counts
    else:
        root = split_source(asked.path, "exemplars")[1].resolve()
        if root in (resolved := out.resolve(), *resolved.parents):
            problem = f"it is inside the folder of exemplars '{asked.path}', and would be read as a class"
            raise RequestError("out", out, problem, "Choose an --out outside that folder.")
        counts = labelled_files(asked.path, field="exemplars", flat=True).counts
    for name in recipe.classes or ():
        if name not in counts:
            raise RequestError(
                "classes", name, "there are no exemplars of this class", did_you_mean(name, counts, "The exemplars' classes")
            )
    _refuse_few(asked.path, asked.k or 1, {name: counts[name] for name in recipe.classes or counts})
    return recipe, dict(counts)


def too_few_left(recipe: Recipe, counts: Mapping[str, int]) -> list[str]:
    """A note where the draw leaves too few images to evaluate and test the run by; none of a file of features."""
    if not counts or not has_images(recipe):
        return []
    left = {name: count - (recipe.exemplars.k or count) for name, count in counts.items()}
    name = min(left, key=lambda each: left[each])
    if left[name] >= PER_CLASS_LEFT:
        return []
    most = min(counts.values()) - PER_CLASS_LEFT
    what = (
        f"class '{name}' has {counted(left[name], 'image')} besides its exemplars"
        if any(left.values())
        else "all images are exemplars"
    )
    return [
        f"{what}; from the same folder 'handful evaluate' needs {PER_CLASS_LEFT} others of each class for its numbers by "
        f"class, 'handful utility' {FEWEST_TO_TEST}. {f'Use --k {most} or less' if most > 1 else 'Add images'}, or give "
        "them another folder (--real, --test)"
    ]


def with_their_prompts(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with the prompts that the exemplars' source has by class, where it states no prompts; and a note of them."""
    asked, path = recipe.model, recipe.exemplars.path
    if path is None or not split_source(path)[0] or asked.prompts or asked.class_pattern or asked.template != PLAIN_TEMPLATE:
        return recipe, []
    prompts = labelled_files(path, field="exemplars").prompts
    note = f"prompts: {path} has its own, such as '{next(iter(prompts.values()))}'; model.template says otherwise"
    return recipe.model_copy(update={"model": asked.model_copy(update={"prompts": dict(prompts)})}), [note]


def _refuse_few(path: str, wanted: int, counts: Mapping[str, int]) -> None:
    few = [f"'{name}' has {count}" for name, count in counts.items() if count < wanted]
    if few:
        problem = f"'{path}' has fewer: {some_of(few)}"
        raise RequestError("exemplars.k", wanted, problem, f"Ask for {min(counts.values())} (--k), or add images.")


def drawn_exemplars(recipe: Recipe, image_shape: tuple[int, int, int], classes: Sequence[str]) -> Given | None:
    """Draws what the recipe asks for.

    Args:
        image_shape: (c, h, w) of the model's images.

    Raises:
        RequestError: A file can't be used for this model.
    """
    asked = recipe.exemplars
    if asked.path is None:
        return None
    if (file := features_file(asked.path)) is None:
        drawn: Given = Exemplars.from_folder(
            asked.path,
            channels=image_shape[0],
            size=image_shape[1:],
            k=asked.k,
            seed=asked.seed,
            minimum=1 if asked.k == 1 else 2,
        )
        kept = drawn if set(classes) == set(drawn.classes) else drawn.only(classes)
        if recipe.start is None or recipe.start.of == "class":
            return kept
        if len(drawn.classes) < 2:
            problem = "there is one class alone in the exemplars' folder"
            raise RequestError("start.of", recipe.start.of, problem, "Add a folder of another class, or leave it out.")
        return drawn  # whichever classes are generated: images stay the same when classes are added
    if recipe.start is not None:
        problem = f"'{asked.path}' holds only features, and images can start only from images"
        raise RequestError("start", recipe.start.as_text(), problem, "Give the folder of images, or leave out start.")
    drawn = ExemplarFeatures.load(file)
    if drawn.shape != image_shape:
        ours, theirs = (f"{height} x {width} x {channels}" for channels, height, width in (image_shape, drawn.shape))
        problem = f"its features come from images of {theirs}, and the model makes images of {ours}"
        remedy = f"Make it for this model: handful exemplars DIR --model {recipe.model.name} ..."
        raise RequestError("exemplars", asked.path, problem, remedy)
    drawn = drawn.only(classes)
    return drawn if asked.k is None else drawn.select(asked.k)


def fitting(exemplars: Given | None, guidance: Requests, extractors: Mapping[str, FeatureExtractor]) -> Given | None:
    """The exemplars, of a file of features those alone that the terms look at.

    Raises:
        RequestError: The file does not hold what a term needs.
    """
    if not isinstance(exemplars, ExemplarFeatures):
        return exemplars
    views: dict[View, None] = {}
    for index, term in potentials(guidance):
        if "exemplars" in term.needs:
            name, reduce = term.view
            with named(index):
                exemplars.seen_by(extractors[name], reduce)
            views[View(extractors[name].digest, reduce)] = None
    return exemplars.seen_only(list(views))
