"""plan: what a capture takes, in a project where nothing ran and in one where all did."""

import json
import shutil
from io import StringIO

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.planning.sizes import parse_size, show_size
from pipeline.store.upkeep.gc import store_bytes
from pipeline.taps.head import linear_head
from pipeline.teacher.capture.outline import outline
from stages.plan import plan
from stages.plan_table import show
from tests.cases import LAYERS, error_line, tiny_params, write_params

SIGNALS = ["hidden/0", "hidden/2", "attention/2", "logits"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(plan, list(arguments), catch_exceptions=False)


def values(*arguments: str) -> dict:
    result = run("main", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def shown(found: dict) -> str:
    text = StringIO()
    show(Console(file=text, width=500), found)
    return text.getvalue()


def test_a_project_in_which_nothing_ran_is_planned_from_its_texts(empty):
    found = values()
    assert found["tokens"]["origin"] == "texts read for this, all of it tokenised for this"
    assert [one["signal"].rsplit("/", 1)[0] for one in found["signals"]] == SIGNALS
    assert found["time"] is None
    assert found["total"]["took_bytes"] is None
    assert found["disk"]["fits"]
    assert set(found["memory"]["students"]) == {"soft", "aligned"}
    # Nothing was written.
    assert not (empty / "data").exists()


def test_the_tables_say_all_of_it_in_words(empty):
    result = run("main", "--budget", "1TB")
    assert result.exit_code == 0
    for words in ("estimate for teacher main", "hidden/2", "bfloat16", "in all", "it fits",
                  "time: unknown without --probe", "memory of the capture",
                  "choices for a budget of 1 TB", "as in params.yaml"):  # fmt: skip
        assert words in result.stdout, words


def test_a_plan_made_before_is_the_plan_made_after(project):
    after = values()
    assert after["tokens"]["origin"] == "counted in data/corpus/tokens/main"
    for place in ("data/corpus/tokens", "data/corpus/transfer", "data/teachers"):
        shutil.rmtree(project / place)
    before = values()
    assert before["tokens"]["origin"].startswith("texts of data/corpus/text")
    assert before["tokens"]["splits"] == after["tokens"]["splits"]
    for one, other in zip(before["signals"], after["signals"], strict=True):
        assert one["most_bytes"] == other["most_bytes"]


def test_beside_a_whole_store_stands_what_it_took_within_five_percent(project):
    found = values("--probe")
    (store,) = (project / "data/stores").iterdir()
    assert found["total"]["took_bytes"] == store_bytes(store)
    for one in found["signals"]:
        assert one["is_measured"]
        assert one["expected_bytes"] == pytest.approx(one["took_bytes"], rel=0.05), one["signal"]
    assert found["total"]["expected_bytes"] == pytest.approx(store_bytes(store), rel=0.25)
    time = found["time"]
    assert 0 < time["forward_seconds"] <= time["capture_seconds"]
    assert time["planned"] == 1
    said = shown(found)
    assert "the store is complete: estimated" in said
    assert "epochs × students; params.yaml plans 1" in said
    found["total"]["took_bytes"], found["disk"]["fits"] = None, False
    assert "it does not fit, capture will refuse it" in shown(found)


@pytest.mark.slow
def test_a_teacher_that_was_not_taught_is_probed_with_random_weights(project):
    shutil.rmtree(project / "data/teachers")
    assert "random weights" in values("--probe")["bytes"]


def test_a_budget_lists_choices_with_their_size_and_the_students_they_exclude(empty):
    plan = values("--budget", "500kB")
    choices = plan["budget"]["choices"]
    requested, *others = choices
    assert requested["change"] == "as in params.yaml"
    assert requested["bytes"] == plan["total"]["most_bytes"]
    assert not requested["excludes"]
    for choice in choices:
        assert choice["fits"] == (choice["bytes"] <= 500_000)
    assert {choice["kind"] for choice in others} == {"hidden", "attention", "logits"}
    by_change = {(choice["kind"], choice["change"]): choice for choice in others}
    int8, int4 = (by_change["hidden", f"form {form}"] for form in ("int8", "int4 (group 64)"))
    assert int4["bytes"] < int8["bytes"] < requested["bytes"]
    assert not int8["excludes"]
    assert set(by_change["logits", "left out"]["excludes"]) == {"aligned", "soft"}
    assert set(by_change["hidden", "left out"]["excludes"]) == {"aligned"}
    k = [choice["bytes"] for key, choice in by_change.items() if key[1].startswith("form topk")]
    assert k == sorted(k, reverse=True)


def test_a_choice_takes_what_a_capture_of_it_is_planned_to_take(empty):
    offered = values("--budget", "1MB")["budget"]["choices"]
    (int8,) = [choice for choice in offered if choice["change"] == "form int8"]
    params = tiny_params()
    params["teachers"]["main"]["capture"]["hidden"]["form"] = "int8"
    write_params(empty, params)
    assert values()["total"]["most_bytes"] == int8["bytes"]


def test_layers_that_no_student_uses_may_be_left_out(empty):
    params = tiny_params()
    params["teachers"]["main"]["capture"]["hidden"]["layers"] = "all"
    write_params(empty, params)
    (used,) = [
        choice
        for choice in values("--budget", "1MB")["budget"]["choices"]
        if choice["change"].startswith("only layers")
    ]
    assert used["change"] == "only layers 0, 2, which students use"
    assert not used["excludes"]


def test_a_budget_that_no_choice_fits_is_told_what_else_helps(empty):
    told = run("main", "--budget", "1kB").output
    assert "no single change fits: combine several" in told


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["main", "--budget", "plenty"], 2, "found 'plenty', expected a number and a unit"),
        (["main", "--budget", "12parsecs"], 2, "such as 200GB, 1.5TiB or 500MB"),
        (["nobody"], 2, "teachers has no 'nobody'"),
    ],
)
def test_errors_are_one_line_and_come_early(empty, arguments, code, words):
    result = run(*arguments)
    assert result.exit_code == code
    assert words in error_line(result)


def test_a_layer_that_the_teacher_does_not_have_is_refused_before_any_text_is_read(
    empty, monkeypatch
):
    params = tiny_params()
    params["teachers"]["main"]["capture"]["hidden"]["layers"] = [LAYERS + 1]
    write_params(empty, params)
    (empty / "corpus.txt").unlink()
    result = run("main")
    assert result.exit_code == 2
    assert f"layer {LAYERS + 1} asked for" in error_line(result)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("200GB", 200 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("500 MB", 5 * 10**8),
        ("7b", 7),
        ("2kb", 2000),
    ],
)
def test_sizes_are_read_as_people_write_them(text, count):
    assert parse_size(text, key="--budget") == count


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7 B"), (1230, "1.23 kB"), (999_600, "1 MB"), (2.5e12, "2.5 TB")]
)
def test_sizes_are_shown_in_three_digits(count, text):
    assert show_size(count) == text


def test_one_training_segment_cannot_be_resumed_and_the_plan_says_so(project):
    assert "begins anew" not in run("main").output
    params = tiny_params()
    params["teachers"]["main"]["capture"] |= {"segment_tokens": 2**17, "batch_tokens": "auto"}
    write_params(project, params)
    told = run("main").output
    assert "the training text is one segment, so a capture that is interrupted begins anew" in told
    assert "batch_tokens is auto: memory is that of batches of 8,192 tokens" in told


def test_weights_saved_in_half_precision_are_planned_as_stored_before_and_after_teach(
    decant, project
):
    folder, teacher = project / "half", project / "data/teachers/main"
    shutil.move(teacher / "model", folder)
    shutil.rmtree(teacher)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    params = tiny_params()
    params["teachers"]["main"].update(model={"path": str(folder)}, fit=None)
    params["teachers"]["main"]["capture"] |= {"logits": {"form": "head"}, "blocks": [2]}
    write_params(project, params)
    before = values()["assets"]
    assert decant("teach", "main").exit_code == 0
    after = values()["assets"]
    assert after["lm_head"] == before["lm_head"]
    assert after["blocks"] == before["blocks"]
    model = outline(AutoConfig.from_pretrained(folder), task="causal-lm", dtype=torch.bfloat16)
    assert after["lm_head"] == 2 * linear_head(model).weight.numel()
