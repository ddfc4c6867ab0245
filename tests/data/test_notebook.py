"""What results show in a notebook: their numbers and pictures, and never a user's text as HTML."""

import torch

from handful.data.exemplars import Exemplars
from handful.data.notebook import html_table


def test_a_table_shows_numbers_short_and_texts_escaped():
    shown = html_table("<b>", ["a", "b"], [["<script>", 0.12345], ["x", None]], ["5 < 6"])
    assert "<script>" not in shown
    for said in (
        "<caption>&lt;b&gt;</caption>",
        "<td>&lt;script&gt;</td><td>0.123</td>",
        "<td>x</td><td>-</td>",
        "<p>5 &lt; 6</p>",
    ):
        assert said in shown


def test_exemplars_show_a_row_of_pictures_for_each_class():
    shown = Exemplars.from_tensors({"<cat>": torch.zeros(3, 1, 4, 4), "dog": torch.zeros(9, 1, 4, 4)})._repr_html_()
    assert shown.count("<img ") == 3 + 8
    assert "<th>&lt;cat&gt;</th>" in shown
    assert "<td>9</td>" in shown
