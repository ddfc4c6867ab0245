"""Classifiers in recipes: which class is meant, what is refused before any work, and what a run does with the odd ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.runs import contents
from support.vision import save_vision_model
from torch import nn

from handful import cli, console
from handful.cost.estimate import cost_of
from handful.data.images import read_image
from handful.errors import RequestError
from handful.generate import prepare
from handful.generate.run import run
from handful.guidance.classifier import ClassifierRequest
from handful.guidance.noisy_classifier import NoisyClassifierRequest
from handful.recipe.extractors import targets_of
from handful.recipe.schema import Recipe, recipe_from

OWN = """
import torch
from torch import nn
from handful.features.registry import FeatureExtractor, load_extractor, pixels


def wrapped(change):
    guide = load_extractor("digits-guide").network
    return FeatureExtractor("own", guide, channels=1, size=(8, 8), features=guide.features,
                            classify=lambda images: change(guide(images)))


def good(): return wrapped(lambda logits: logits)
def named():
    made = good()
    made.classes = tuple("zero one two three four five six seven eight nine".split())
    return made
def misnamed():
    made = good()
    made.classes = ("a", "b")
    return made
def huge(): return wrapped(lambda logits: 1e30 * logits)
def infinite(): return wrapped(lambda logits: logits / 0)
def not_a_number(): return wrapped(lambda logits: logits.log())
def infinite_later():
    guide = load_extractor("digits-guide").network
    return FeatureExtractor("own", guide, channels=1, classify=lambda images: guide(images / (images.std() < 0.1)))
def flat(): return wrapped(lambda logits: logits.sum(1))
def detached(): return wrapped(lambda logits: logits.detach())
def rounded(): return wrapped(lambda logits: torch.nn.functional.one_hot(logits.argmax(1), 10).float())
def constant(): return wrapped(lambda logits: 0 * logits)
def single(): return wrapped(lambda logits: logits[:, :1])
def no_classifier(): return pixels()
def module(): return nn.Linear(2, 2)
def fails(): raise RuntimeError("no weights here")
def wrong_size():
    network = nn.Sequential(nn.Flatten(), nn.Linear(5, 10))
    return FeatureExtractor("wrong", network, channels=1, classify=network)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    def forward(self, states, time):
        assert states.shape[1:] == (1, 8, 8) and time.shape == (len(states),)
        return self.body(states) * (1 + time[:, None] / 1000)


class OneTime(Noisy):
    def forward(self, states): return self.body(states)


def noisy(): return Noisy()
def one_time(): return OneTime()
"""
GUIDE = {"classifier": "digits-guide"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet of transformers that knows ant, bee, cow, doe and elk."""
    folder = tmp_path_factory.mktemp("animals")
    save_vision_model(folder, "ResNetForImageClassification")
    return folder


def recipe(*terms: dict[str, Any], **changes: Any) -> Recipe:
    """A quick run of two digits."""
    guidance = [{"method": "classifier", "scale": 0.3, "every": 1, **term} for term in terms]
    data = {
        "model": {"name": "digits"},
        "classes": ["3", "7"],
        "per_class": 2,
        "cohort": 2,
        "sampler": {"steps": 4},
        "guidance": guidance,
    }
    return recipe_from({**data, **changes})


def small(folder: str, *terms: dict[str, Any], **changes: Any) -> Recipe:
    """The same of an untrained model of two classes, for what depends on no digit; the classifier's 3 and 7."""
    said = [{"classes": {"0": 3, "1": 7}, **term} if term.get("method") != "cfg" else term for term in terms]
    return recipe(*said, **{"model": {"name": folder}, "classes": None, **changes})


def energies(out: Path, column: str = "energy_classifier") -> list[float]:
    return pq.ParquetFile(out / "manifest.parquet").read(use_threads=False).column(column).to_pylist()


def pictures(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name.endswith(".png") and name.startswith("images")}


# --- which class is meant ----------------------------------------------------------------------------------------------

IMAGENET = ("tench, Tinca tinca", "crane", "Golden_Retriever", "crane, machine", "a", "A")


def targets(
    said: dict[str, Any],
    labels: dict[str, int | None],
    names: tuple[str, ...] = IMAGENET,
    count: int | None = None,
    model: tuple[str, ...] = (),
) -> dict[str, int]:
    request = ClassifierRequest(classifier="some", **said)
    return targets_of(request, names, count or len(names), labels, model)


def test_a_class_is_found_by_its_name_in_any_case_by_a_synonym_or_as_it_is_said():
    labels: dict[str, int | None] = {"tench": None, "golden retriever": None, "tinca_TINCA": None, "a": None, "A": None}
    assert targets({}, labels) == {"tench": 0, "golden retriever": 2, "tinca_TINCA": 0, "a": 4, "A": 5}
    said = {"classes": {"dog": "golden_retriever", "bird": 1}}
    assert targets(said, {"dog": 9, "bird": 8, "tench": 7}) == {"dog": 2, "bird": 1, "tench": 0}


def test_without_names_the_models_labels_are_taken_where_there_are_as_many():
    assert targets({}, {"x": 1, "y": 0}, (), 2, ("y", "x")) == {"x": 1, "y": 0}
    assert targets({"classes": {"x": 0}}, {"x": 1, "y": 0}, (), 2, ("y", "x")) == {"x": 0, "y": 0}


def test_by_label_the_names_are_of_no_account():
    assert targets({"by_label": True}, {"207": 3, "tench": 1}) == {"207": 3, "tench": 1}
    assert targets({"by_label": True, "classes": {"tench": "tench"}}, {"207": 3, "tench": 1}) == {"207": 3, "tench": 0}
    noisy = NoisyClassifierRequest(classifier="a.py:b", by_label=True)
    assert targets_of(noisy, (), 1000, {"207": 207}, ()) == {"207": 207}


def test_a_mapping_may_say_more_than_is_generated_if_it_says_all_that_is():
    assert targets({"classes": {"x": 0, "y": 1}}, {"x": None}) == {"x": 0}
    with pytest.raises(RequestError, match=r"^classes: 'y': no such class is generated\. The classes are: x\."):
        targets({"classes": {"y": 1}}, {"x": None})


@pytest.mark.parametrize(
    ("said", "labels", "names", "count", "field", "text"),
    [
        ({}, {"tenc": None}, IMAGENET, 6, "classes", "among its 6; the nearest is 'tench'. Give"),
        ({}, {"fox": 3}, IMAGENET, 6, "classes", "classes: {fox: NUMBER or NAME}; or by_label: true"),
        ({"classes": {"fox": "wolf"}}, {"fox": 3}, IMAGENET, 6, "classes", "'wolf': the classifier has no class of this name"),
        (
            {},
            {"CRANE": None},
            IMAGENET,
            6,
            "classes",
            "2 of the classifier's classes have this name: 1 (crane), 3 (crane, mach",
        ),
        (
            {"classes": {"fox": 6}},
            {"fox": 3},
            IMAGENET,
            6,
            "classes.fox",
            "6: the classifier has 6 classes. Write a number from 0 to 5",
        ),
        ({"classes": {"fox": -1}}, {"fox": 3}, IMAGENET, 6, "classes.fox", "-1: "),
        ({"by_label": True}, {"fox": 6}, IMAGENET, 6, "by_label, class 'fox'", "6: the classifier has 6 classes"),
        ({"by_label": True}, {"fox": None}, IMAGENET, 6, "by_label", "takes no class labels"),
        ({}, {"fox": 3}, (), 7, "classes", "7 classes have no names, and the model has unknown ones"),
        ({"classes": {"fox": "ant"}}, {"fox": 3}, (), 7, "classes", "no class of this name among its 0"),
        ({}, {"a": None}, ("a", "b"), 3, "classifier", "has names of 2 classes, but 3 logits"),
        ({}, {"a": None}, ("a",), 1, "tau2", "with a single class"),
    ],
)
def test_what_is_not_certain_is_refused_with_what_to_say(said, labels, names, count, field, text):
    with pytest.raises(RequestError) as caught:
        targets(said, labels, names, count)
    assert caught.value.field == field
    assert text in str(caught.value)


def test_of_two_classes_called_alike_the_one_spelt_so_is_meant_if_there_is_one():
    assert targets({}, {"crane": None}) == {"crane": 1}
    with pytest.raises(RequestError, match="have this name"):
        targets({}, {"x": None}, ("x", "x", "y"))
    assert targets({"classes": {"x": 1}}, {"x": None}, ("x", "x", "y")) == {"x": 1}


def test_terms_share_an_extractor_only_where_they_look_alike():
    one = ClassifierRequest(classifier="net")
    assert one.key == ClassifierRequest(classifier="net", scale=2.0, tau2=0.0, classes={"a": 1}).key
    assert one.key != ClassifierRequest(classifier="net", softplus=3.0).key
    assert ClassifierRequest(classifier="a.py:b").key != NoisyClassifierRequest(classifier="a.py:b").key


# --- what is refused before any work -----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # name: the term, the recipe beside it, the field, what is said
    "pixels": ({"classifier": "pixels"}, {}, "classifier", "this network has no logits"),
    "features only": ({"classifier": "OWN:no_classifier"}, {}, "classifier", "classify="),
    "a module": ({"classifier": "OWN:module"}, {}, "classifier", "FeatureExtractor"),
    "nothing there": ({"classifier": "/nowhere"}, {}, "classifier", "no such extractor"),
    "misspelt": ({"classifier": "digits-gide"}, {}, "classifier", "Did you mean 'digits-guide'?"),
    "no such file": ({"classifier": "/nowhere.py:net"}, {}, "classifier", "no such Python file"),
    "no such function": ({"classifier": "OWN:nothing"}, {}, "classifier", "FeatureExtractor"),
    "the name of a function": ({"classifier": "OWN"}, {}, "classifier", "OWN:FUNCTION"),
    "code that fails": ({"classifier": "OWN:fails"}, {}, "classifier", "RuntimeError: no weights here"),
    "another size": ({"classifier": "OWN:wrong_size"}, {}, "classifier", "can't take images of (1, 8, 8)"),
    "a side of its own": ({"classifier": "digits-guide@16"}, {}, "classifier", "only transformers models"),
    "infinite logits": ({"classifier": "OWN:infinite"}, {}, "classifier", "its logits contain NaN or infinite"),
    "NaN logits": ({"classifier": "OWN:not_a_number"}, {}, "classifier", "its logits contain NaN or infinite"),
    "one number an image": ({"classifier": "OWN:flat"}, {}, "classifier", "for one image it returns the shape (1,)"),
    "no gradient": ({"classifier": "OWN:detached"}, {}, "classifier", "no gradient flows through it"),
    "decisions": ({"classifier": "OWN:rounded"}, {}, "classifier", "no gradient flows through it"),
    "one logit": ({"classifier": "OWN:single", "classes": {"3": 0, "7": 0}}, {}, "tau2", "with a single class"),
    "too few names": ({"classifier": "OWN:misnamed"}, {}, "classifier", "has names of 2 classes, but 10 logits"),
    "other names": ({"classifier": "OWN:named"}, {}, "classes", "no class of this name among its 10"),
    "other classes": ({"classifier": "ANIMALS"}, {}, "classes", "'3': the classifier has no class of this name among its 5"),
    "too few classes": ({"classifier": "ANIMALS", "by_label": True}, {}, "by_label, class '7'", "the classifier has 5 classes"),
    "number too large": ({**GUIDE, "classes": {"3": 10}}, {}, "classes.3", "Write a number from 0 to 9"),
    "unknown class": ({**GUIDE, "classes": {"8": 8}}, {}, "classes", "no such class is generated. The classes are: 3, 7."),
    "falling levels": ({**GUIDE, "temperatures": [[2, 1], [1, 1]]}, {}, "temperatures", "must rise"),
    "no temperatures": ({**GUIDE, "tau1": 0, "tau2": 0}, {}, "tau1, tau2", "both inverse temperatures are 0"),
    "no ReLU": ({"classifier": "digits-judge", "softplus": 3}, {}, "softplus", "calls no ReLU"),
    "prompts": ({**GUIDE, "prompts": {"3": "a three"}}, {}, "prompts", "takes no prompts"),
    "ancestral elsewhere": ({**GUIDE, "rule": "ancestral", "normalize": "none", "jacobian": "identity"}, {}, "rule", "ddpm"),
    "ancestral by rms": ({**GUIDE, "rule": "ancestral"}, {"sampler": {"name": "ddpm"}}, "normalize, jacobian", "none"),
    "held elsewhere": ({**GUIDE, "rule": "held"}, {"sampler": {"name": "heun"}}, "rule", "ddim or ddpm"),
    "before an estimate": ({**GUIDE, "rule": "before"}, {"sampler": {"name": "heun"}}, "input", "Use the input x_t"),
    "hold elsewhere": ({**GUIDE, "rule": "held", "hold": True}, {"sampler": {"name": "ddim"}}, "hold", "Set hold to false"),
    "no turn": ({**GUIDE, "every": 5}, {}, "every", "on none of 4 steps"),
    "too small": ({**GUIDE, "reduce": 3}, {}, "reduce", "can't be shrunk"),
    "no noisy module": ({"method": "noisy-classifier", "classifier": "OWN:good"}, {}, "classifier", "noisy states"),
    "not told the time": ({"method": "noisy-classifier", "classifier": "OWN:one_time"}, {}, "classifier", "can't take"),
    "noisy, no file": ({"method": "noisy-classifier", "classifier": "/no.py:net"}, {}, "classifier", "no such Python file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_field_value_and_remedy_with_nothing_written(case, own, animals, tmp_path):
    term, beside, field, said = REFUSED[case]
    term = {**term, "classifier": term["classifier"].replace("OWN", str(own)).replace("ANIMALS", str(animals))}
    with pytest.raises(RequestError) as caught:
        prepare(recipe(term, **beside), tmp_path / "out")
    assert caught.value.field == f"guidance[0].{field}", str(caught.value)
    assert said.replace("OWN", str(own)) in str(caught.value)
    assert len(caught.value.remedy) > 10
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("term", "field", "said"),
    [
        ({"method": "classifier"}, "classifier", "--classifier NAME"),
        ({"method": "noisy-classifier"}, "classifier", "FILE.py:FUNCTION"),
        ({"method": "noisy-classifier", "classifier": "digits-guide"}, "classifier", "it is not of the form FILE.py:FUNCTION"),
        ({"method": "classifier", "classifier": ""}, "classifier", "at least 1"),
        ({"method": "classifier", **GUIDE, "classes": {"3": 1.5}}, "classes.3", "neither a name nor a whole number"),
        ({"method": "classifier", **GUIDE, "classes": {"3": True}}, "classes.3", "neither a name nor a whole number"),
        ({"method": "classifier", **GUIDE, "temperatures": [1, 2]}, "temperatures[0]", "Give a list"),
        ({"method": "classifier", **GUIDE, "temperatures": [[0, 2]]}, "temperatures[0][0]", "greater than 0"),
        ({"method": "classifier", **GUIDE, "softplus": 0}, "softplus", "greater than 0"),
        ({"method": "classifier", **GUIDE, "tau1": -1}, "tau1", "greater than or equal to 0"),
        ({"method": "classifier", **GUIDE, "rule": "shifted"}, "rule", "Did you mean 'shift'?"),
        ({"method": "noisy-classifier", "classifier": "a.py:b", "input": "x0_hat"}, "input", "Choices: state"),
        ({"method": "noisy-classifier", "classifier": "a.py:b", "softplus": 3.0}, "softplus", "there is no such key"),
    ],
)
def test_a_recipe_that_says_it_wrong_is_refused_by_the_key(term, field, said):
    with pytest.raises(RequestError) as caught:
        recipe_from({"model": {"name": "digits"}, "guidance": [term]})
    assert caught.value.field == f"guidance[0].{field}", str(caught.value)
    assert said in str(caught.value)


# --- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_goes_to_its_classes_and_scale_zero_is_no_guidance_to_the_bit(tmp_path: Path):
    for name, terms in (("none", []), ("zero", [{**GUIDE, "scale": 0.0}]), ("some", [GUIDE])):
        job = prepare(recipe(*terms), tmp_path / name)
        assert run(job).failures == []
        assert job.targets == {"3": {0: 3}, "7": {0: 7}} if terms else {"3": {}, "7": {}}
    assert pictures(tmp_path / "zero") == pictures(tmp_path / "none") != pictures(tmp_path / "some")
    assert sum(energies(tmp_path / "some")) < sum(energies(tmp_path / "zero"))


def test_a_target_of_anothers_number_is_gone_to(tmp_path: Path):
    """The model is told 3 and 7, the classifier wants 8: its energy says which class it is of."""
    for name, term in (("as told", {}), ("eight", {"classes": {"3": 8, "7": 8}})):
        run(prepare(recipe({**GUIDE, "scale": 2.0, **term}), tmp_path / name))
    eight = recipe({**GUIDE, "scale": 0.0, "classes": {"3": 8, "7": 8}})
    run(prepare(eight, tmp_path / "plain"))
    assert sum(energies(tmp_path / "eight")) < 0.5 * sum(energies(tmp_path / "plain"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_in_half_precision_is_guided(dtype: str, tiny_model: Callable[..., str], tmp_path: Path):
    model = {"name": tiny_model(2), "dtype": dtype}
    for name, term in (("zero", {**GUIDE, "scale": 0.0}), ("some", {**GUIDE, "softplus": 3.0})):
        summary = run(prepare(small("", term, model=model), tmp_path / name))
        assert (summary.failures, summary.images) == ([], 4)
    assert pictures(tmp_path / "zero") != pictures(tmp_path / "some")


def test_a_classifier_of_ones_own_file_guides_as_the_packaged_one_and_its_text_counts(own, tiny_model, tmp_path):
    model = tiny_model(2)
    for name, term in (("own", {"classifier": f"{own}:good"}), ("packaged", GUIDE)):
        run(prepare(small(model, term), tmp_path / name))
    assert pictures(tmp_path / "own") == pictures(tmp_path / "packaged")
    (tmp_path / "other.py").write_text(OWN + "\n# another text\n")
    for function, method in (("good", "classifier"), ("noisy", "noisy-classifier")):
        digests = [
            prepare(small(model, {"method": method, "classifier": f"{path}:{function}"}), tmp_path / "x").provenance
            for path in (own, tmp_path / "other.py")
        ]
        assert len({next(iter(each["features_sha256"].values())) for each in digests}) == 2


def test_a_classifier_directory_with_other_classes_guides_where_it_is_said_which(animals: Path, tmp_path: Path):
    term = {"classifier": str(animals), "classes": {"3": "Doe", "7": 4}, "softplus": 5.0}
    job = prepare(recipe(term), tmp_path / "out")
    assert job.targets == {"3": {0: 3}, "7": {0: 4}}
    assert run(job).failures == []
    prepare(recipe(term, classes=["7"]), tmp_path / "narrowed")


def test_a_constant_classifier_gives_the_unguided_images(own: Path, tiny_model: Callable[..., str], tmp_path: Path):
    model = tiny_model(2)
    ways = {
        "shift": {},
        "held": {"rule": "held"},
        "absolute": {"normalize": "none"},
        "ancestral": {"rule": "ancestral", "normalize": "none", "jacobian": "identity", "boost": 0.3},
        "before": {"rule": "before", "input": "x_t", "normalize": "sample", "gain": "edm"},
    }
    for name, way in ways.items():
        sampler = {"name": {"held": "ddim", "ancestral": "ddpm", "before": "heun"}.get(name, "dpmpp_2m"), "steps": 4}
        for kind, terms in (("constant", [{"classifier": f"{own}:constant", "scale": 5.0, **way}]), ("none", [])):
            assert run(prepare(small(model, *terms, sampler=sampler), tmp_path / name / kind)).failures == []
        assert pictures(tmp_path / name / "constant") == pictures(tmp_path / name / "none")


def test_logits_of_1e30_guide(own: Path, tiny_model: Callable[..., str], tmp_path: Path):
    """The logit alone, whose gradient's direction does not depend on its size."""
    model = tiny_model(2)
    for name, term in (("plain", GUIDE), ("huge", {"classifier": f"{own}:huge"})):
        assert run(prepare(small(model, {**term, "tau2": 0.0}), tmp_path / name)).failures == []
    assert run(prepare(small(model, {"classifier": f"{own}:huge"}), tmp_path / "both")).failures == []
    read = [pictures(tmp_path / name) for name in ("plain", "huge")]
    for name in read[0]:
        one, other = (read_image(tmp_path / kind / name, channels=1) for kind in ("plain", "huge"))
        assert float((one - other).abs().max()) < 0.02


def test_logits_that_become_infinite_fail_the_cohort_and_say_so(own: Path, tiny_model: Callable[..., str], tmp_path: Path):
    summary = run(prepare(small(tiny_model(2), {"classifier": f"{own}:infinite_later", "scale": 3.0}), tmp_path / "out"))
    assert summary.cohorts_failed > 0
    assert all("guidance classifier: the gradient is not finite" in failure for failure in summary.failures)


def test_temperatures_of_a_recipe_change_the_images_and_are_written_out(tiny_model: Callable[..., str], tmp_path: Path):
    model = tiny_model(2)
    run(prepare(small(model, GUIDE), tmp_path / "none"))
    run(prepare(small(model, {**GUIDE, "temperatures": [[0.1, 1.0], [3.0, 9.0]]}), tmp_path / "some"))
    run(prepare(small(model, {**GUIDE, "temperatures": [[1.0, 1.0]]}), tmp_path / "one"))
    assert pictures(tmp_path / "one") == pictures(tmp_path / "none") != pictures(tmp_path / "some")
    assert "- - 3.0" in (tmp_path / "some" / "recipe.yaml").read_text()
    prepare(small(model, {**GUIDE, "temperatures": [[0.1, 1.0], [3.0, 9.0]]}), tmp_path / "some")


def test_a_noisy_classifier_guides_by_any_rule(own: Path, tiny_model: Callable[..., str], tmp_path: Path):
    model = tiny_model(2)
    noisy = {"method": "noisy-classifier", "classifier": f"{own}:noisy"}
    ancestral = {"rule": "ancestral", "normalize": "none", "jacobian": "identity", "scale": 5.0}
    for name, terms, sampler in (("none", [], "ddpm"), ("mean", [{**noisy, **ancestral}], "ddpm"), ("shift", [noisy], "heun")):
        job = prepare(small(model, *terms, sampler={"name": sampler, "steps": 4}), tmp_path / name)
        assert run(job).failures == []
        assert job.targets["1"] == ({0: 7} if terms else {})
    assert pictures(tmp_path / "mean") != pictures(tmp_path / "none")


def test_terms_together_and_two_classifiers_go_each_to_its_class(animals: Path, tmp_path: Path):
    terms = [GUIDE, {"classifier": str(animals), "classes": {"3": 0, "7": 1}}, {"method": "cfg", "scale": 1.0}]
    job = prepare(recipe(*terms), tmp_path / "out")
    assert job.targets["3"] == {0: 3, 1: 0}
    assert run(job).failures == []
    assert len(energies(tmp_path / "out", "energy_classifier_2")) == 4


def test_cost_counts_a_classifier_with_softplus_as_without(animals: Path, own: Path, tiny_model: Callable[..., str]):
    model, term = tiny_model(2), {"classifier": str(animals)}
    plain, soft = (cost_of(small(model, {**term, **more})).recipe for more in ({}, {"softplus": 3.0}))
    assert plain.parts == soft.parts
    assert plain.parts["features"] > 0
    assert plain.parts["features backward"] > 0
    noisy = cost_of(small(model, {"method": "noisy-classifier", "classifier": f"{own}:noisy"})).recipe
    assert noisy.parts["features"] == 4 * 2 * 64 * 10
    with pytest.raises(RequestError, match="calls no ReLU"):
        cost_of(small(model, {"classifier": "digits-judge", "softplus": 3.0}))


def test_torchscript_gives_features_not_logits(tmp_path: Path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.jit.trace(network, torch.zeros(1, 1, 8, 8)).save(str(tmp_path / "net.pt"))
    with pytest.raises(RequestError, match=r"^guidance\[0\]\.classifier: .*no logits"):
        prepare(recipe({"classifier": str(tmp_path / "net.pt")}), tmp_path / "out")


# --- the command line --------------------------------------------------------------------------------------------------

QUICK = ("--per-class", 2, "--classes", "3,7", "--steps", 4, "--guidance", "classifier")


def handful(*arguments: object) -> int:
    return console.answer(cli.app, [str(argument) for argument in arguments])


def test_the_command_line_guides_by_a_classifier(tmp_path: Path, capfd):
    assert (
        handful(
            "generate",
            "--model",
            "digits",
            *QUICK,
            "--classifier",
            "digits-guide",
            "--scale",
            0.3,
            "--set",
            "guidance.classifier.every=1",
            "--out",
            tmp_path / "out",
            "--json",
        )
        == 0
    )
    told = json.loads(capfd.readouterr().out)
    assert (told["images"], told["failures"]) == (4, [])
    run(prepare(recipe(GUIDE, cohort=64), tmp_path / "same"))
    assert pictures(tmp_path / "out") == pictures(tmp_path / "same")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "guidance[0].classifier: it is missing. Name a classifier (--classifier NAME)"),
        (("--classifier", "pixels"), "guidance[0].classifier: 'pixels': this network has no logits"),
        (("--classifier", "ANIMALS"), "guidance[0].classes: '3': the classifier has no class of this name among its 5"),
        (("--classifier", "digits-guide", "--set", "guidance.classifier.classes={'3': 12}"), "guidance[0].classes.3: 12: "),
        (("--classifier", "digits-guide", "--set", "guidance.classifier.rule=ancestral"), "guidance[0].normalize, jacobian: "),
        (("--classifier", "digits-guide", "--set", "guidance.classifier.softplus=-1"), "guidance[0].softplus: -1: "),
        (("--classifier", "digits-judge", "--set", "guidance.classifier.softplus=3"), "guidance[0].softplus: 3.0: "),
        (("--classifier", "digits-guide", "--set", "guidance.classifier.temperatures=[[1, 2], [1, 3]]"), "sigma / alpha must"),
    ],
)
def test_the_command_line_refuses_in_one_line_with_exit_code_2(options, said, animals, tmp_path, capfd):
    given = [str(option).replace("ANIMALS", str(animals)) for option in options]
    assert handful("generate", "--model", "digits", *QUICK, *given, "--out", tmp_path / "out") == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert said in told[0]
    assert not (tmp_path / "out").exists()


def test_a_classifier_without_its_guidance_is_refused(tmp_path: Path, capfd):
    assert handful("generate", "--model", "digits", "--classifier", "digits-guide", "--out", tmp_path / "out") == 2
    assert "--classifier: 'digits-guide': there is no guidance that has this setting" in capfd.readouterr().err
