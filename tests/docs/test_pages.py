"""What the pages say is so: links lead somewhere, tables match the models, snippets are valid."""

import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from pydantic import BaseModel, RootModel
from ruamel.yaml import YAML

from pipeline.corpus.sources.registry import SOURCES
from pipeline.corpus.text.parameters import CorpusParams
from pipeline.evaluate.options import EvaluateParams, GenerateOptions, IntervalOptions
from pipeline.generation.options import GenerationOptions
from pipeline.runtime import Runtime
from pipeline.store.forms.form import options
from pipeline.store.forms.registry import FORMS, forms_of
from pipeline.student.align.layer_maps import LAYER_MAPS
from pipeline.student.align.objective import TERMS, Alignment, Objective
from pipeline.student.align.projectors import PROJECTORS
from pipeline.student.losses.registry import AttentionLoss, FeatureLoss, OutputLoss, built_in
from pipeline.student.model.origin import LoraOptions, StudentModel
from pipeline.student.parameters import StudentParams
from pipeline.teacher.parameters.capture import CaptureParams
from pipeline.teacher.parameters.model import QuantizationIn, TeacherModel
from pipeline.teacher.parameters.tokens import TokenParams
from pipeline.training.options import TrainOptions
from stages.cli import COMMANDS
from stages.parameters import validate
from tests.docs.pages import PAGES, ROOT, Fence, anchor, fences, tables

SECTIONS: dict[str, type[BaseModel]] = {
    "`corpus`": CorpusParams,
    **{f"`corpus.source`, kind `{name}`": kind for name, kind in SOURCES.ours.items()},
    "`teachers.T.tokens`": TokenParams,
    "`teachers.T.tokens.generation`": GenerationOptions,
    "`teachers.T.model`": TeacherModel,
    "`teachers.T.model.quantization`": QuantizationIn,
    "`teachers.T.capture`": CaptureParams,
    "`students.S`": StudentParams,
    "`students.S.model`": StudentModel,
    "`students.S.model.lora`": LoraOptions,
    "`students.S.align`": Alignment,
    "`students.S.loss`": Objective,
    **{f"`students.S.loss.{term}`": type(getattr(Objective(), term)) for term in TERMS},
    "`students.S.train`": TrainOptions,
    "`evaluate`": EvaluateParams,
    "`evaluate.generate`": GenerateOptions,
    "`evaluate.intervals`": IntervalOptions,
    "`runtime.yaml`": Runtime,
}
PARAMETERS = tables((ROOT / "docs/parameters.md").read_text())
EVERYTHING = "\n".join(page.read_text() for page in PAGES)


def names(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{names(page)}: {target}"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert fragment in map(anchor, headings), f"{names(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_no_path_of_anybody_s_machine(page):
    assert not re.search(r"(?<![\w.~])/(home|work|tmp|root|Users)\b", page.read_text())


def test_pictures_are_small_and_need_nothing():
    assert (ROOT / "docs/report.png").stat().st_size < 300_000
    picture = ET.parse(ROOT / "docs/flow.svg").getroot()
    text = "".join(picture.itertext())
    assert "prefers-color-scheme: dark" in text
    loads = [value for node in picture.iter() for key, value in node.items() if "href" in key]
    assert loads == []


def test_every_stage_is_in_the_picture_and_in_the_readme():
    picture = (ROOT / "docs/flow.svg").read_text()
    readme = (ROOT / "README.md").read_text()
    for stage in YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]:
        assert stage in picture
        assert f"decant {stage}" in readme
    for command in COMMANDS:
        assert re.search(rf"`?decant {command}\b", EVERYTHING), command


def test_every_folder_of_code_and_data_is_described():
    ignored = (ROOT / "data/.gitignore").read_text().split()
    data = (ROOT / "data/README.md").read_text()
    for name in [*ignored, "manifests"]:
        assert f"| `{name.strip('/')}" in data
    readme = (ROOT / "README.md").read_text()
    for folder in ("pipeline", "tests", "."):
        tracked = {path.parent for path in (ROOT / folder).glob("*/*.py")}
        if folder in {"pipeline", "."}:
            for path in tracked:
                assert f"`{path.relative_to(ROOT)}/`" in readme or path.name == "pipeline", path


def test_every_section_has_its_table():
    described = {heading for heading, rows in PARAMETERS.items() if rows[0][0] == "key"}
    assert described == set(SECTIONS)


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_table_has_the_keys_and_defaults_of_its_model(heading):
    model = SECTIONS[heading]
    rows = {row[0].strip("`"): row[1].strip("`") for row in PARAMETERS[heading][1:]}
    assert set(rows) == set(model.model_fields)
    for key, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        is_section = isinstance(default, BaseModel) and not isinstance(default, RootModel)
        if field.is_required() or is_section:
            assert rows[key] == "", key
            continue
        plain = default.root if isinstance(default, RootModel) else default
        said = YAML(typ="safe").load(rows[key])
        assert said == (list(plain) if isinstance(plain, tuple) else plain), key


@pytest.mark.parametrize(
    ("heading", "key", "known"),
    [
        *(
            (f"`students.S.loss.{kind.term}`", "loss", [loss.name for loss in built_in(kind)])
            for kind in (FeatureLoss, AttentionLoss, OutputLoss)
        ),
        ("`students.S.loss.feature`", "projector", list(PROJECTORS)),
        ("`students.S.align`", "layers", list(LAYER_MAPS)),
    ],
)
def test_every_name_of_a_registry_is_described(heading, key, known):
    (row,) = [row for row in PARAMETERS[heading] if row[0] == f"`{key}`"]
    assert set(known) <= set(re.findall(r"`([\w-]+)`", " ".join(row[1:])))
    if heading == "`students.S.loss.output`":
        (options,) = [row[2] for row in PARAMETERS[heading] if row[0] == "`options`"]
        for loss in built_in(OutputLoss):
            for name, field in loss.options.model_fields.items():
                assert name == "skew" or f"`{name}` ({field.default})" in options


def test_every_form_and_option_is_described():
    rows = [row for row in PARAMETERS["Forms"] if forms_of(row[0])]
    assert [(row[0], row[1].strip("`")) for row in rows] == [
        (kind, name)
        for kind in ("hidden", "attention", "value", "logits")
        for name in forms_of(kind)
    ]
    for row in rows:
        said = dict(re.findall(r"`(\w+)` \(`([^`]*)`\)", row[3]))
        form = FORMS[f"{row[0]}.{row[1].strip('`')}"]
        assert {key: YAML(typ="safe").load(value) for key, value in said.items()} == options(form())


@pytest.mark.parametrize("fence", list(fences("yaml")), ids=lambda fence: fence.text[:40])
def test_a_yaml_snippet_is_valid(fence: Fence):
    value: dict[str, Any] = YAML(typ="safe").load(fence.text)
    assert set(value) <= {"corpus", "teachers", "students", "evaluate"}
    if "evaluate" in value:
        validate(value["evaluate"], EvaluateParams, file=fence.page, key="evaluate")
    if "corpus" in value:
        validate(value["corpus"], CorpusParams, file=fence.page, key="corpus")
    for name, teacher in value.get("teachers", {}).items():
        for key, kind in {
            "tokens": TokenParams,
            "model": TeacherModel,
            "fit": TrainOptions | None,
            "capture": CaptureParams,
        }.items():
            validate(teacher[key], kind, file=fence.page, key=f"teachers.{name}.{key}")
    for name, student in value.get("students", {}).items():
        validate(student, StudentParams, file=fence.page, key=f"students.{name}")


def test_the_readme_says_in_ten_lines_what_it_is():
    opening = (ROOT / "README.md").read_text().split("```")[0]
    assert len([line for line in opening.splitlines()[1:] if line]) <= 10
    assert "make repro" in (ROOT / "README.md").read_text().split("```")[1]


def test_every_fault_is_in_the_table():
    table = tables((ROOT / "docs/reliability.md").read_text())["What happens when"]
    told = {name for row in table[1:] for name in row[-1].split(", ")}
    there = {p.stem.removeprefix("test_") for p in (ROOT / "tests/faults").glob("test_*.py")}
    assert told == there
