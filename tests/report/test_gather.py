"""What a report says of a run, in words."""

from __future__ import annotations

import pytest

from handful.report.gather import Shown


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"guidance": []}, "from the model m, without guidance. "),
        (
            {"start": {"depth": 0.5, "of": "class"}},
            "from the model m, from noised exemplars (depth 0.5), with 2 exemplars per class",
        ),
        (
            {"mix": [{"share": 1, "start": {"depth": 0.5}}, {"share": 3, "guidance": [{"method": "cfg", "scale": 1.0}]}]},
            "a mixture: 1 share from noised exemplars (depth 0.5); 3 shares guided by cfg at scale 1, with 2 exemplars",
        ),
    ],
)
def test_a_report_says_where_images_start_and_what_a_mixture_holds(tmp_path, asked, words):
    recipe = {"model": {"name": "m"}, "exemplars": {"path": "d", "k": 2}, "sampler": {}, **asked}
    assert words in Shown(tmp_path, "out", recipe, {}, [], ["a"], 4, None).in_words()
