"""A budget gives up the least: more bytes never mean less fidelity, and students come first."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ResourceError
from pipeline.planning.budget import Needs, Request, choose, ladder
from pipeline.store.forms.form import options
from pipeline.store.forms.registry import build_form

WIDTH, HEADS = 64, 64
COST = {
    "float16": 2 * WIDTH,
    "bfloat16": 2 * WIDTH,
    "int8": WIDTH + 2,
    "int4": WIDTH // 2 + 2,
    "qk": 2 * HEADS + 8,
    "below": 3,
    "map": 500,
    "head": WIDTH + 2,
    "dense": 8,
}
TOKENS = 1000
FIXED = 500
NEEDS = [Needs("small", {"hidden": frozenset({0, 4, 8}), "attention": frozenset({4, 8})})]


def request(kind, form, *layers, **options):
    return Request(kind, build_form(kind, form, options), layers)


ASKED = {
    "hidden": [request("hidden", "bfloat16", 0, 2, 3, 4, 6, 7, 8)],
    "attention": [request("attention", "qk", 3, 4, 7, 8)],
    "value": [],
    "logits": [request("logits", "head")],
}


def size(signals):
    found = 0
    for one in signals:
        form = one.form
        match form.name:
            case "topk":
                found += 4 * form.k + 4
            case "sampled":
                found += 2 * form.n
            case _:
                found += COST[form.name]
    return TOKENS * found


def accept_all(form):
    return frozenset()


def best(budget, asked=ASKED, needs=NEEDS, accepts=accept_all):
    return choose(asked, budget, size=size, fixed=FIXED, needs=needs, accepts=accepts)


def test_what_fits_is_left_as_it_is_asked_for():
    choice = best(10**9)
    assert not choice.given_up
    assert choice.penalty == 0
    assert choice.bytes == FIXED + size(choice.signals())
    assert [one.name for one in choice.signals()] == [
        one.name for requests in ASKED.values() for r in requests for one in r.signals()
    ]


@settings(deadline=None, max_examples=12)
@given(st.lists(st.integers(60_000, 1_800_000), min_size=2, max_size=2).map(sorted))
def test_a_larger_budget_never_loses_fidelity(budgets):
    small, large = map(best, budgets)
    assert small.bytes <= budgets[0]
    assert large.bytes <= budgets[1]
    assert large.penalty <= small.penalty
    assert set(large.broken) <= set(small.broken)


@settings(deadline=None, max_examples=12)
@given(st.integers(60_000, 1_800_000))
def test_attention_that_is_rebuilt_has_the_states_below_it(budget):
    signals = best(budget).signals()
    fine = [one for one in signals if one.kind == "hidden" and one.form.name != "int4"]
    hidden = {one.layer for one in fine}
    below = [one.layer for one in signals if one.form.name == "below"]
    assert all(layer is not None and layer - 1 in hidden for layer in below)


def test_numbers_are_narrowed_before_layers_are_left_out():
    everything = best(10**9)
    choice = best(everything.bytes - 1)
    kept = {one.kind for one in choice.signals()}
    assert kept == {"hidden", "attention", "logits"}
    assert len(choice.signals()) == len(everything.signals())
    assert choice.given_up


def test_layers_that_a_student_needs_go_last():
    needed = TOKENS * (3 * COST["int8"] + 2 * COST["qk"])
    choice = best(needed + TOKENS * 4 * 16 * 2 + FIXED)
    kept = {(one.kind, one.layer) for one in choice.signals()}
    assert {("hidden", 0), ("hidden", 4), ("hidden", 8), ("attention", 8)} <= kept
    assert choice.broken == ()


def test_who_can_no_longer_be_trained_is_named():
    choice = best(FIXED + TOKENS * (2 * COST["int8"]))
    assert choice.broken == ("small",)


def test_a_form_that_a_student_names_is_not_exchanged_for_another():
    needs = [Needs("picky", {"hidden": frozenset({0, 4, 8})}, {"hidden": "bfloat16"})]
    wanted = FIXED + TOKENS * 4 * COST["bfloat16"]
    choice = best(wanted, needs=needs)
    hidden = [one for one in choice.signals() if one.kind == "hidden"]
    assert {one.form.name for one in hidden} == {"bfloat16"}
    assert choice.broken == ()


def test_logits_that_no_student_could_use_are_not_chosen():
    def only_head(form):
        return frozenset() if form.name == "head" else frozenset({"small"})

    asked = {"logits": [request("logits", "head", values="float16")]}
    cost = FIXED + TOKENS * COST["head"]
    assert best(cost, asked, accepts=only_head).broken == ()
    cheap = {"logits": [request("logits", "topk", k=64)]}
    choice = best(FIXED + TOKENS * 140, cheap)
    assert [options(one.form)["k"] for one in choice.signals()] == [32]


def test_topk_keeps_the_temperatures_that_students_use():
    needs = [Needs("warm", temperature=2.0), Needs("cold", temperature=1.0)]
    rungs = ladder("logits", [request("logits", "head")], needs, accept_all)
    forms = [r.form for rung in rungs for r in rung.requests]
    found = [options(form)["temperatures"] for form in forms if form.name == "topk"]
    assert found == [[1.0, 2.0]] * 5


def test_what_fits_in_no_way_names_the_smallest():
    with pytest.raises(ResourceError, match=r"budget 10 bytes: the least .* takes up to [\d,]+;"):
        best(10)


def test_maps_and_classes_have_no_narrower_form():
    asked = {
        "attention": [request("attention", "map", 1, 2)],
        "logits": [request("logits", "dense")],
    }
    choice = best(FIXED + TOKENS * (COST["map"] + COST["dense"]), asked, needs=[])
    assert [(one.form.name, one.layer) for one in choice.signals()] == [("map", 2), ("dense", None)]
