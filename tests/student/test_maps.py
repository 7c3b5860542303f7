import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.student.align.layer_maps import Layers, block_choice, layer_map


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (3, 6, {1: 2, 2: 4, 3: 6}),
        (4, 10, {1: 3, 2: 5, 3: 8, 4: 10}),  # 2.5 and 7.5 both go up; round() would send 2.5 to 2
        (3, 3, {1: 1, 2: 2, 3: 3}),
        (4, 1, {1: 1, 2: 1, 3: 1, 4: 1}),
        (1, 12, {1: 12}),
    ],
)
def test_uniform(student, teacher, expected):
    options = {"student_layers": student, "teacher_layers": teacher}
    assert layer_map("uniform", Layers(student, teacher, has_embeddings=False)) == expected
    with_embeddings = layer_map("uniform", Layers(student, teacher, has_embeddings=True))
    assert with_embeddings == {0: 0} | expected
    assert block_choice("uniform", **options) == tuple(expected.values())


@given(student=st.integers(1, 40), teacher=st.integers(1, 100))
def test_uniform_rises_ends_at_the_last_layer_and_never_meets_the_embeddings(student, teacher):
    found = layer_map("uniform", Layers(student, teacher, has_embeddings=True))
    assert list(found) == list(range(student + 1))
    assert list(found.values()) == sorted(found.values())
    assert found[student] == teacher
    assert all(1 <= found[layer] <= teacher for layer in range(1, student + 1))
    if student <= teacher:
        assert len(set(found.values())) == student + 1


def test_last_pairs_the_last_layers_alone():
    found = layer_map("last", Layers(3, 6, has_embeddings=True))
    assert found == {3: 6}


def test_a_transport_map_lets_every_block_choose_between_the_captured_layers():
    found = layer_map("emd", Layers(2, 6, has_embeddings=True, captured=[4, 0, 2]))
    assert found == {0: 0, 1: [2, 4], 2: [2, 4]}
    assert 0 not in layer_map("emd", Layers(1, 6, has_embeddings=False, captured=[2]))
    with pytest.raises(IncompatibleError, match=r"emd chooses between .* which has none"):
        layer_map("emd", Layers(1, 6, has_embeddings=True, captured=[0]))


def explicit(spec):
    return layer_map(spec, Layers(3, 6, has_embeddings=False))


def test_an_explicit_map_is_kept_in_order():
    assert list(explicit({3: 6, 0: 0, 1: 5}).items()) == [(0, 0), (1, 5), (3, 6)]


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ({4: 6}, r"student layer 4 asked for, the student has 0\.\.3; change"),
        ({3: 7}, r"teacher layer 7 asked for, the teacher has 0\.\.6; change"),
        ({-1: 1}, "student layer -1 asked for"),
    ],
)
def test_a_layer_that_is_not_there_is_refused_by_number(spec, match):
    with pytest.raises(IncompatibleError, match=match):
        explicit(spec)


def test_an_empty_map_is_refused():
    with pytest.raises(ConfigError, match="layer map is empty"):
        explicit({})


def test_blocks_are_listed_one_for_each_student_block():
    options = {"student_layers": 2, "teacher_layers": 6}
    assert block_choice([6, 1], **options) == (6, 1)
    with pytest.raises(IncompatibleError, match="3 teacher blocks are listed, the student has 2"):
        block_choice([1, 2, 3], **options)
    with pytest.raises(IncompatibleError, match=r"teacher layer 0 asked for, .* 1\.\.6"):
        block_choice([0, 1], **options)
