"""Which of the teacher's blocks a student starts from, in words and in numbers."""

import pytest
from pydantic import ValidationError

from pipeline.errors import IncompatibleError
from pipeline.student.align.layer_maps import block_choice
from pipeline.student.model.origin import StudentModel, checkpoint_digest
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("spec", "student_layers", "expected"),
    [
        ("uniform", 3, (2, 4, 6)),
        ("first", 2, (1, 2)),
        ("last", 2, (5, 6)),
        ("last", 6, (1, 2, 3, 4, 5, 6)),
        ({"every": 2}, 3, (2, 4, 6)),
        ({"every": 4}, 2, (2, 6)),
        ({"every": 1}, 6, (1, 2, 3, 4, 5, 6)),
        ([6, 6], 2, (6, 6)),
    ],
)
def test_blocks_by_word(spec, student_layers, expected):
    assert block_choice(spec, student_layers=student_layers, teacher_layers=6) == expected


@pytest.mark.parametrize(
    ("spec", "student_layers", "match"),
    [
        ({"every": 2}, 2, "every 2 of the teacher's 6 blocks gives 3, the student has 2"),
        ("first", 7, "teacher layer 7 asked for, the teacher has 1..6"),
        ("last", 7, "teacher layer 0 asked for, the teacher has 1..6"),
        ([1], 2, "1 teacher blocks are listed, the student has 2"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_with_both_numbers(spec, student_layers, match):
    with pytest.raises(IncompatibleError, match=match):
        block_choice(spec, student_layers=student_layers, teacher_layers=6)


@pytest.mark.parametrize("blocks", ["uniform", "first", "last", {"every": 2}, [1, 3], None])
def test_the_section_takes_every_way_to_name_blocks(blocks):
    section = {"architecture": {}, "init": "teacher-layers", "blocks": blocks}
    assert StudentModel.model_validate(section).blocks == blocks


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"architecture": {}, "init": "teacher-layers", "blocks": "middle"}, "blocks"),
        ({"architecture": {}, "init": "teacher-layers", "blocks": {"every": 0}}, "blocks"),
        ({"architecture": {}, "init": "teacher-layers", "blocks": {}}, "blocks"),
        ({"architecture": {}, "blocks": "first"}, "blocks are for init: teacher-layers"),
        ({"architecture": {}, "revision": "main"}, "revision is for checkpoint"),
        ({"architecture": {}, "lora": {}}, "lora adapts weights that are there"),
        ({"checkpoint": "x", "lora": {"r": 0}}, "lora.r"),
        ({"checkpoint": "x", "lora": {"target_modules": "linear"}}, "all-linear"),
        ({"architecture": {}, "vocabulary": "small"}, "vocabulary"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(section, match):
    with pytest.raises(ValidationError, match=match):
        StudentModel.model_validate(section)


def test_the_digest_of_a_checkpoint_is_that_of_what_it_holds(tmp_path):
    tiny_model("llama", layers=1).save_pretrained(tmp_path)
    before = checkpoint_digest(str(tmp_path))
    assert set(before) == {"config.json", "model.safetensors"}
    (tmp_path / "README.md").write_text("more")
    assert checkpoint_digest(str(tmp_path)) == before
    tiny_model("llama", layers=1, seed=1).save_pretrained(tmp_path)
    after = checkpoint_digest(str(tmp_path))
    assert after["config.json"] == before["config.json"]
    assert after["model.safetensors"] != before["model.safetensors"]
    assert checkpoint_digest(None) == checkpoint_digest("someone/somewhere") == {}
