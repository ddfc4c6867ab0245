"""The pictures exist, are what they should be, and say what they show."""

from __future__ import annotations

import io

from PIL import Image
from support.sweeps import digits_sweep, made_up

from handful.sweep.pictures import _lines, _styles, over_k_png, pareto_png
from handful.sweep.planned import Setting


def rows(robust=True, several_k=True, methods=("chamfer",)):
    plain = {
        "precision": [0.9, 0.92],
        "coverage": [0.8, 0.82],
        "f1": [0.85, 0.86],
        "cost_ratio": [1.0, 1.1],
        "gain_coverage": [0.1, 0.12],
        "gain_f1": [0.05, 0.06],
    }
    both = {**plain, "robust_precision": [0.7, 0.8], "robust_coverage": [0.6, 0.7]} if robust else plain
    found = {("none", 0.0, 0): both}
    for name in methods:
        found |= {(name, scale, k): both for k in ((2, 32) if several_k else (32,)) for scale in (0.1, 0.3)}
    return made_up(found)


def opened(png):
    assert png is not None
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        return image


def drawn(image):
    """Share of pixels that are not white."""
    return sum(1 for pixel in image.convert("L").tobytes() if pixel < 250) / (image.width * image.height)


def test_the_pareto_picture_has_a_second_panel_where_there_was_an_audit(digits):
    request = digits_sweep(digits)
    one, two = opened(pareto_png(rows(robust=False), request)), opened(pareto_png(rows(), request))
    assert one.format == two.format == "PNG"
    assert two.width > 1.7 * one.width
    assert drawn(one) > 0.01


def test_the_same_rows_give_the_same_picture(digits):
    request = digits_sweep(digits)
    assert pareto_png(rows(), request) == pareto_png(rows(), request)
    assert over_k_png(rows(), request) == over_k_png(rows(), request)


def test_without_several_k_there_is_no_picture_over_k(digits):
    request = digits_sweep(digits)
    assert over_k_png(rows(several_k=False), request) is None
    assert drawn(opened(over_k_png(rows(), request))) > 0.01


def test_without_precision_there_is_no_pareto_picture(digits):
    assert pareto_png(made_up({("none", 0.0, 0): {"utility": [0.5]}}), digits_sweep(digits)) is None


def test_costs_that_are_not_known_leave_points_empty(digits):
    unknown = [{**row, "cost_ratio": None} for row in rows()]
    assert opened(pareto_png(unknown, digits_sweep(digits))).width > 100


def test_lines_go_through_scales_at_each_k_or_through_k():
    a, b, c, d = (Setting("m", scale, k) for k in (2, 8) for scale in (0.1, 0.2))
    assert _lines([b, a, d, c]) == [([a, b], True), ([c, d], True)]
    assert _lines([c, a]) == [([a, c], False)]
    assert _lines([a, Setting("n", 0.0, 0)]) == [([a], True), ([Setting("n", 0.0, 0)], True)]


def test_no_two_methods_look_alike_even_if_there_are_many(digits):
    methods = {"none": {"guidance": []}, **{f"m{at}": {"guidance": [{"method": "cfg"}]} for at in range(40)}}
    styles = _styles(digits_sweep(digits, methods=methods))
    assert len(set(styles.values())) == 41
