"""plan: what a capture takes, in a project where nothing ran and in one where all did."""

import json
import shutil
from io import StringIO

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.store.upkeep.gc import store_bytes
from pipeline.taps.head import linear_head
from pipeline.teacher.capture.outline import outline
from stages.plan import plan
from stages.planning.sizes import parse_size, show_size
from stages.planning.table import show
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


def test_a_budget_for_all_changes_nothing_and_the_table_says_all_of_it_in_words(empty):
    before = (empty / "params.yaml").read_bytes()
    result = run("main", "--budget", "1TB", "--apply")
    assert result.exit_code == 0
    for words in ("plan of teacher main", "hidden/2", "bfloat16", "in all", "it fits",
                  "time: unknown without --probe", "memory of the capture",
                  "nothing is given up"):  # fmt: skip
        assert words in result.stdout, words
    assert (empty / "params.yaml").read_bytes() == before


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
    assert "the store is whole: planned" in said
    assert "epochs × students; params.yaml plans 1" in said
    found["total"]["took_bytes"], found["disk"]["fits"] = None, False
    assert "it does not fit, capture will refuse it" in shown(found)


@pytest.mark.slow
def test_a_teacher_that_was_not_taught_is_probed_with_random_weights(project):
    shutil.rmtree(project / "data/teachers")
    assert "random weights" in values("--probe")["bytes"]


def test_a_budget_is_written_with_comments_and_order_kept(empty):
    path = empty / "params.yaml"
    text = path.read_text()
    text = "# about the corpus\n" + text.replace("      hidden:", "      # states\n      hidden:")
    text = text.replace("k: 16", "k: 16   # ids")
    path.write_text(text)
    first = values("--budget", "1MB", "--apply")
    found = first["budget"]
    assert found["applied"]
    assert found["bytes"] <= 10**6 < first["total"]["most_bytes"]
    assert found["given_up"]
    written = path.read_text()
    assert written != text
    for line in ("# about the corpus\n", "      # states\n"):
        assert line in written
    before = iter(text.splitlines())
    assert all(line in before for line in written.splitlines() if line in text.splitlines())
    again = values("--budget", "1MB")
    assert not again["budget"]["given_up"]
    assert again["total"]["most_bytes"] <= 10**6


def test_a_student_that_would_break_is_named_with_its_reason(empty):
    found = values("--budget", "420kB")["budget"]
    assert "aligned" in found["breaks"]
    assert "students.aligned" in found["breaks"]["aligned"] or "output term" in str(found["breaks"])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["main", "--apply"], 2, "--apply: writes what --budget chooses"),
        (["main", "--budget", "plenty"], 2, "found 'plenty', expected a number and a unit"),
        (["main", "--budget", "12parsecs"], 2, "as 200GB, 1.5TiB or 500MB"),
        (["main", "--budget", "1kB"], 5, "the least that can be captured takes up to"),
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


def test_a_file_that_changed_meanwhile_is_not_written_over(empty, monkeypatch):
    path = empty / "params.yaml"

    def change(*arguments, **options):
        path.write_text(path.read_text() + "# somebody else\n")
        return {}

    monkeypatch.setattr("stages.planning.budget.Budget._broken", change)
    result = run("main", "--budget", "500kB", "--apply")
    assert result.exit_code == 2
    assert "changed while its plan was made" in error_line(result)
    assert path.read_text().endswith("# somebody else\n")


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
