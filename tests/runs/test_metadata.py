"""What a run directory says of itself: who guided it, by which exemplars."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from handful.runs.metadata import DrawnExemplars, exemplars_of, guided_by


def run(root: Path, told: object) -> Path:
    (root / "images" / "0").mkdir(parents=True)
    (root / "recipe.yaml").write_text(told if isinstance(told, str) else yaml.safe_dump(told))
    return root


def test_a_run_was_guided_by_what_its_provenance_names_by_digest_or_name(tmp_path):
    guides = {"dinov2": "aa", str(tmp_path / "mine.py:load") + " softplus 3": "bb", "net.py:f noisy": "cc"}
    guides["clip-dir@96 prompts 0123abcd softplus 5"] = "ee"
    made = run(tmp_path / "out", {"provenance": {"features_sha256": guides, "features_weights": {"dinov2": "w1 w2"}}})
    for folder in (made, made / "images"):
        assert guided_by(folder, "another name", "aa")
        assert guided_by(folder, "dinov2", "another digest")
        # smooth or not, it is the guide's own network
        assert guided_by(folder, str(tmp_path / "mine.py:load"), "the plain one's digest")
        assert guided_by(folder, "net.py:f", "-")
        # nor does another input size, other prompts, or another name of the same weights make it another
        assert guided_by(folder, "dinov2@112", "-")
        assert guided_by(folder, "clip-dir", "-")
        assert guided_by(folder, "a copy", "-", ["w2", "w9"])
        assert not guided_by(folder, "a stranger", "-", ["w9"])
        assert not guided_by(folder, "clip", "dd")
    assert not guided_by(tmp_path, "dinov2", "aa")


def test_the_drawn_exemplars_are_those_of_the_recipe(tmp_path):
    asked = {"path": "../photos", "per_class": 4, "seed": 2}
    made = run(tmp_path / "out", {"exemplars": asked})
    found = exemplars_of(made)
    assert found == DrawnExemplars(tmp_path / "photos", 4, 2)
    assert found.folder.resolve() == tmp_path / "photos"
    assert exemplars_of(run(tmp_path / "none", {"exemplars": {"path": None}})) is None
    absolute = exemplars_of(run(tmp_path / "all", {"exemplars": {"path": "/photos"}}))
    assert absolute == DrawnExemplars(Path("/photos"), None, 0)


@pytest.mark.parametrize("told", ["", "- 1\n", "a: [", "provenance: 3\nexemplars: x\n"])
def test_a_damaged_recipe_says_nothing(tmp_path, told):
    made = run(tmp_path / "out", told)
    assert not guided_by(made, "dinov2", "aa")
    assert exemplars_of(made) is None
