"""check finds before anything long starts what the stages would find one after another."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.provenance import read_json
from stages.parameters import read_yaml
from tests.cases import CONTEXT, LAYERS, error_line, tiny_params, write_params

ROOT = Path(__file__).parents[2]


def test_the_repositorys_own_parameters_fit(decant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = decant("check", "--params", str(ROOT / "params.yaml"))
    assert result.exit_code == 0, result.output


def test_its_output_does_not_depend_on_the_parameters(decant, empty):
    assert decant("check").exit_code == 0
    first = Path("data/checked.json").read_bytes()
    params = tiny_params()
    params["students"]["soft"]["train"]["epochs"] = 2
    write_params(empty, params)
    assert decant("check").exit_code == 0
    assert Path("data/checked.json").read_bytes() == first


def teacher(params):
    return params["teachers"]["main"]


def student(params):
    return params["students"]["aligned"]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (
            lambda p: teacher(p)["capture"]["hidden"].update(layers=[0, LAYERS + 1]),
            2,
            f"layer {LAYERS + 1} asked for, the teacher has 0 to {LAYERS}; remove it",
        ),
        (
            lambda p: teacher(p).update(model={"path": "someone/model"}),
            2,
            "teachers.main.model.path: found someone/model, which is no directory here, and no",
        ),
        (
            lambda p: teacher(p)["tokens"].update(max_length=CONTEXT + 1),
            4,
            f"rows may have {CONTEXT + 1} tokens, LlamaForCausalLM takes {CONTEXT}; lower",
        ),
        (
            lambda p: teacher(p)["capture"].update(segment_tokens=16, chunk_tokens=16),
            2,
            "segment_tokens: found 16, expected at least tokens.max_length, 32; raise it",
        ),
        (
            lambda p: student(p)["model"]["architecture"].update(num_hiden_layers=1),
            2,
            "students.aligned.model: model.architecture.num_hiden_layers: no key",
        ),
        (
            lambda p: student(p)["model"]["architecture"].update(
                num_attention_heads=2, num_key_value_heads=2
            ),
            4,
            "students.aligned.loss.attention: the student has 2 attention heads",
        ),
        (lambda p: teacher(p).update(fit=None), 2, "a teacher from scratch must be trained"),
        (lambda p: teacher(p)["tokens"].pop("vocab"), 2, "tokens: no tokenizer; give vocab"),
        (
            lambda p: teacher(p)["capture"].update(logits={"form": "dense"}),
            2,
            "dense does not fit the task causal-lm; use head, topk or sampled",
        ),
        (
            lambda p: student(p).update(teacher="mian"),
            2,
            "students.aligned.teacher: found 'mian', expected one of main; correct it",
        ),
        (
            lambda p: student(p).update(align={"layers": {1: 1}}),
            4,
            "needs hidden/1, which is not in the store",
        ),
        (
            lambda p: student(p).update(align={"layers": {1: LAYERS + 1}}),
            4,
            f"teacher layer {LAYERS + 1} asked for, the teacher has 0..{LAYERS}",
        ),
        (
            lambda p: student(p)["model"].update(init="teacher-layers"),
            4,
            "add them to the teacher's capture.blocks",
        ),
        (
            lambda p: (
                teacher(p)["capture"].update(blocks="all"),
                student(p)["model"].update(init="teacher-layers"),
                student(p)["model"]["architecture"].update(hidden_size=64),
            ),
            4,
            "students.aligned.model: init teacher-layers: the student's hidden_size is 64",
        ),
        (
            lambda p: student(p)["loss"]["output"].update(temperature=2.0),
            4,
            "students.aligned.loss.output.temperature: 2.0, but logits/topk-",
        ),
        (
            lambda p: student(p)["loss"]["output"].update(loss="mse"),
            4,
            "students.aligned.loss.output.loss: mse cannot be computed from logits/topk-",
        ),
        (
            lambda p: (
                teacher(p)["capture"].update(logits={"form": "sampled"}),
                p["students"].pop("soft"),
                student(p)["loss"]["output"].update(loss="jsd"),
            ),
            4,
            "students.aligned.loss.output.loss: jsd cannot be computed from logits/sampled-",
        ),
        (lambda p: p.update(students={}), 2, "students: found none, expected at least one"),
        (
            lambda p: teacher(p)["tokens"].update(template="{text}"),
            2,
            "teachers.main.tokens.template: given for task causal-lm",
        ),
        (
            lambda p: p["students"].update({"a.b": student(p)}),
            2,
            "students.a.b: the name becomes a file's",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_named(decant, empty, change, code, message):
    params = tiny_params()
    change(params)
    write_params(empty, params)
    result = decant("check")
    assert result.exit_code == code, result.output
    line = error_line(result)
    assert message in line
    assert line.startswith("error: params.yaml: ")
    assert not Path("data").exists()


def test_what_this_machine_cannot_train_with_is_found_first(decant, empty, monkeypatch):
    params = tiny_params()
    student(params)["train"]["precision"] = "float16"
    write_params(empty, params)
    monkeypatch.setenv("DECANT_DEVICE", "auto")
    assert decant("check").exit_code == 0
    monkeypatch.setenv("DECANT_DEVICE", "cpu")
    result = decant("check")
    assert result.exit_code == 2
    assert "students.aligned.train.precision: float16 on cpu, expected" in error_line(result)
    monkeypatch.setattr("pipeline.training.options.find_spec", lambda _: None)
    student(params)["train"] |= {"precision": "float32", "optimizer": "adamw_8bit"}
    write_params(empty, params)
    assert "adamw_8bit needs bitsandbytes" in error_line(decant("check"))


def test_layers_of_a_kind_may_be_a_list_of_requests(decant, empty):
    params = tiny_params()
    teacher(params)["capture"].update(
        hidden=[{"layers": [0, LAYERS], "form": "int8"}, {"layers": [1], "form": "bfloat16"}],
        attention=[{"layers": [LAYERS], "form": "below"}],
    )
    write_params(empty, params)
    result = decant("check")
    assert result.exit_code == 0, result.output


def test_a_student_is_checked_against_a_teacher_that_lies_on_disk(decant, empty, poured):
    params = tiny_params()
    model = poured / "data" / "teachers" / "main" / "model"
    teacher(params).update(model={"path": str(model)}, fit=None)
    del teacher(params)["tokens"]["vocab"]
    write_params(empty, params)
    assert decant("check").exit_code == 0
    assert read_json(model / "config.json")["num_hidden_layers"] == LAYERS
    teacher(params)["capture"]["attention"]["layers"] = [LAYERS + 1]
    write_params(empty, params)
    assert "the teacher has 1 to 2" in error_line(decant("check"))


def test_the_repositorys_parameters_name_no_key_twice():
    assert set(read_yaml(ROOT / "params.yaml")) == {"corpus", "teachers", "students", "evaluate"}


@pytest.mark.parametrize("name", ["2024", "007", "true", "null", "1_0", "1e3", "~", "2024-01-01"])
@pytest.mark.parametrize("group", ["teachers", "students"])
def test_a_name_that_yaml_reads_as_something_else_is_refused(decant, empty, group, name):
    path = empty / "params.yaml"
    old = {"teachers": "main", "students": "aligned"}[group]
    path.write_text(path.read_text().replace(f"  {old}:", f"  {name}:"))
    for command in (["check"], ["train", name], ["capture", name]):
        result = decant(*command)
        assert result.exit_code == 2, result.output
        assert "put the name in quotes, or choose one with a letter" in error_line(result)


def test_a_name_in_quotes_is_text(decant, empty):
    params = tiny_params()
    params["students"] = {"2024": params["students"]["aligned"]}
    write_params(empty, params)
    result = decant("check")
    assert result.exit_code == 0, result.output


def test_all_errors_are_said_at_once_in_the_order_of_the_file(decant, empty):
    params = tiny_params()
    params["corpus"]["source"]["files"] = "gone.txt"
    params["teachers"]["main"]["tokens"].pop("vocab")
    params["teachers"]["main"]["capture"]["hidden"]["layers"] = [LAYERS + 1]
    params["students"]["soft"]["train"]["epoch"] = 1
    params["students"]["aligned"]["teacher"] = "mian"
    write_params(empty, params)
    result = decant("check")
    assert result.exit_code == 2
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    wanted = (
        "students.soft.train.epoch: unknown key",
        "students.aligned.teacher: found 'mian'",
        "gone.txt: cannot be read",
        "teachers.main.tokens: no tokenizer",
        f"layer {LAYERS + 1} asked for",
    )
    assert len(said) == len(wanted)
    for line, part in zip(said, wanted, strict=True):
        assert part in line


def test_what_is_wrong_in_parameters_is_found_without_torch(empty):
    params = tiny_params()
    params["students"]["aligned"]["teacher"] = "mian"
    write_params(empty, params)
    program = (
        "import sys\n"
        "from stages.check import check\n"
        "try:\n    check(standalone_mode=False)\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ended.stdout.split() == ["2", "False"], ended.stderr


def test_a_column_that_is_not_there_and_a_chat_without_marks(decant, empty):
    (empty / "rows.tsv").write_text("text\tlabel\none\ta\n")
    params = tiny_params()
    source = {"kind": "table", "files": "rows.tsv", "label": "y"}
    params["corpus"] = {"source": source, "task": "classification"}
    write_params(empty, params)
    assert "rows.tsv: line 2: no column 'y', it has 'text', 'label'" in decant("check").stderr
