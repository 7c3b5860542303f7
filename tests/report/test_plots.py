"""Pictures are the same bytes for the same numbers, load nothing and show only what exists."""

import re

import pytest

from pipeline.report.compare import compare
from pipeline.report.plots import plot_bytes, plot_quality, plot_term, terms_of
from pipeline.report.results import Curve, ModelMetrics
from tests.report.examples import student, teacher


def curve(**terms):
    length = len(next(iter(terms.values())))
    return Curve(step=tuple(range(length)), terms={k: tuple(v) for k, v in terms.items()})


CURVES = {
    "labels-only": curve(loss=[3.0, 2.0], labels=[3.0, 2.0], output=[None, None]),
    "aligned": curve(loss=[5.0, 0.1], feature=[1.0, 0.5], extra=[1.0, 1.0]),
}


def test_terms_are_those_that_some_student_has():
    assert terms_of(CURVES) == ["loss", "feature", "labels", "extra"]
    assert terms_of({}) == []


def lines(picture):
    return len(re.findall(r'id="[\w-]*-line2d_\d+"', picture))


def test_a_student_without_a_term_has_no_line():
    order = ["labels-only", "aligned"]
    both, one = (plot_term(term, CURVES, order) for term in ("loss", "feature"))
    assert "#0072b2" in both
    assert "#d55e00" in both
    assert "#0072b2" not in one
    assert "#d55e00" in one
    assert "of aligned" in one


def test_a_long_curve_is_thinned_by_averages():
    many = curve(loss=[float(value) for value in range(10_000)])
    assert len(plot_term("loss", {"s": many}, ["s"])) < 30_000


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-1.0, 100.0], [1e-9, 1e9]])
def test_odd_values_do_not_stop_a_plot(values):
    assert "<svg" in plot_term("loss", {"s": curve(loss=values)}, ["s"])


def test_pictures_are_deterministic_and_load_nothing():
    comparison = compare([teacher()], [student("a"), student("b", 81.0)])

    def pictures():
        return [
            plot_term("loss", CURVES, ["labels-only", "aligned"]),
            plot_quality(comparison, ["a", "b"]),
            plot_bytes("big", teacher().signals),
        ]

    first = pictures()
    assert first == pictures()
    ids = [found for picture in first for found in re.findall(r'\bid="([^"]*)"', picture)]
    assert len(ids) == len(set(ids))
    for picture in first:
        assert picture.startswith('<svg role="img" aria-label="')
        assert "http" not in picture
        assert "#010203" not in picture
        used = set(re.findall(r'(?:href="#|url\(#)([^")]*)', picture))
        assert used <= set(ids)


def test_names_are_text_not_formulas_or_markup():
    comparison = compare([teacher()], [student("a_$x$<b>&")])
    picture = plot_quality(comparison, ["a_$x$<b>&"])
    assert "a_$x$&lt;b&gt;&amp;" in picture
    assert "<b>" not in picture


def test_nothing_known_is_no_picture():
    bare = teacher(metrics=ModelMetrics(name="big", task="causal-lm"), signals=())
    assert plot_quality(compare([bare], []), []) is None
    assert plot_bytes("big", ()) is None
