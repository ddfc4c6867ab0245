"""Class names become prompts."""

from typing import Any

import pytest

from handful.errors import RequestError
from handful.recipe.file import anchored
from handful.recipe.prompting import all_prompts, prompt_for, prompts_of, read_prompts
from handful.recipe.schema import ModelRequest, recipe_from


def asked(**words: Any) -> ModelRequest:
    return ModelRequest(name="m", **words)


def test_the_template_takes_the_class_name_with_spaces_for_underscores():
    assert prompts_of(["cat", "golden_retriever"], asked()) == {
        "cat": "a photo of a cat",
        "golden_retriever": "a photo of a golden retriever",
    }


def test_a_field_of_any_name_takes_the_whole_class_name():
    assert prompts_of(["bag"], asked(template="{object}, studio light")) == {"bag": "bag, studio light"}


def test_fields_of_a_pattern_fill_the_template():
    found = prompts_of(
        ["Africa--hand_soap", "West-Asia--bag"], asked(template="{object} in {region}", class_pattern="{region}--{object}")
    )
    assert found == {"Africa--hand_soap": "hand soap in Africa", "West-Asia--bag": "bag in West-Asia"}


def test_a_class_may_have_a_prompt_of_its_own():
    found = prompts_of(["crane", "dog"], asked(prompts={"crane": "a crane, the bird"}))
    assert found == {"crane": "a crane, the bird", "dog": "a photo of a dog"}


def test_braces_that_are_meant_stay():
    assert prompts_of(["x"], asked(template="{{set}} of {}")) == {"x": "{set} of x"}


@pytest.mark.parametrize(
    ("words", "field", "said"),
    [
        ({"template": "a photo"}, "model.template", "Write {}"),
        ({"template": "a {"}, "model.template", "can't be read"),
        ({"template": "a {0.__class__}"}, "model.template", "plain name"),
        ({"template": "a {:>9}"}, "model.template", "plain name"),
        ({"template": "{object} in {region}"}, "model.template", "class_pattern"),
        ({"template": "{object} in {place}", "class_pattern": "{region}--{object}"}, "model.template", "region, object"),
        ({"class_pattern": "{region}--{object}"}, "model.template", "region, object"),
        ({"class_pattern": "{}"}, "model.class_pattern", "needs a name"),
        ({"class_pattern": "{a}--{b}", "template": "{a}"}, "model.class_pattern", "'cat' does not fit"),
        ({"prompts": {"kat": "a cat"}}, "model.prompts", "Did you mean 'cat'?"),
    ],
)
def test_what_cannot_be_filled_is_refused_by_name(words: dict[str, Any], field: str, said: str):
    with pytest.raises(RequestError) as caught:
        prompts_of(["cat"], asked(**words))
    assert caught.value.field == field
    assert said in str(caught.value)


def test_prompts_may_say_more_than_is_generated_and_an_empty_one_is_meant():
    said = asked(prompts={"cat": "", "dog": "a dog"})
    assert prompts_of(["cat"], said) == {"cat": ""}


FILES = {
    "p.csv": 'class,prompt\ncat,"a cat, asleep"\ndog,a dog\ncat,a cat at night\n',
    "p.jsonl": '{"class": "cat", "prompt": "a cat, asleep"}\n{"class": "dog", "prompt": "a dog"}\n'
    '{"class": "cat", "prompt": "a cat at night"}\n',
    "p.json": '{"cat": ["a cat, asleep", "a cat at night"], "dog": "a dog"}',
}


@pytest.mark.parametrize("name", FILES)
def test_prompts_come_from_csv_json_and_jsonl_and_are_drawn_by_the_images_seed(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    given = read_prompts(tmp_path / name)
    assert given == {"cat": ["a cat, asleep", "a cat at night"], "dog": ["a dog"]}
    recipe = recipe_from({"model": {"name": "x", "prompts": given}})
    prompts = prompts_of(["cat", "dog"], recipe.model)
    drawn = [prompt_for(prompts["cat"], seed) for seed in range(64)]
    assert drawn == [prompt_for(prompts["cat"], seed) for seed in range(64)]
    assert 16 < drawn.count("a cat at night") < 48  # of 64 fair draws: a false alarm in 30,000
    assert prompt_for("alone", 3) == "alone"
    assert all_prompts(prompts) == ["a cat, asleep", "a cat at night", "a dog"]


@pytest.mark.parametrize("text", ["", "name,text\ncat,a cat\n", "class,prompt\ncat,\n"])
def test_a_file_that_holds_no_prompts_is_refused(tmp_path, text):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(RequestError, match=r"^--prompts: .*(columns class and prompt)"):
        read_prompts(tmp_path / "p.csv")


def test_labels_are_read_from_a_file_that_a_recipe_names(tmp_path):
    written = {"labels.csv": "class,label\ncat,281\ndog,n02099601\n", "labels.json": '{"cat": 281, "dog": "n02099601"}'}
    written["labels.jsonl"] = '{"class": "cat", "label": 281}\n{"class": "dog", "label": "n02099601"}\n'
    for name, text in written.items():
        (tmp_path / name).write_text(text)
        recipe = recipe_from(anchored({"model": {"name": "digits", "labels": name}}, tmp_path))
        assert {key: str(label) for key, label in recipe.model.labels.items()} == {"cat": "281", "dog": "n02099601"}
    (tmp_path / "twice.csv").write_text("class,label\ncat,1\ncat,2\n")
    for name, why in (("twice.csv", "two labels"), ("none.csv", "can't be read as labels")):
        with pytest.raises(RequestError, match=why):
            anchored({"model": {"name": "digits", "labels": name}}, tmp_path)
