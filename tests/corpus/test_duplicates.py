from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.text.duplicates import containment, normalised, paragraphs, runs, shared_runs

WORDS = "one two three four five six seven eight nine ten"


def test_case_spacing_and_marks_do_not_count():
    assert normalised("One,  TWO\nthree!") == "one two three"
    assert runs(WORDS) == runs(WORDS.upper().replace(" ", ",\n"))


def test_a_text_contains_itself_wholly_and_a_stranger_not_at_all():
    assert containment(WORDS, runs(f"before {WORDS} after")) == 1.0
    assert containment(WORDS, runs(" ".join(reversed(WORDS.split())))) == 0.0


def test_a_text_shorter_than_a_run_is_never_a_copy():
    assert containment("Return the name.", runs("Return the name." * 4)) == 0.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(WORDS.split()), max_size=40).map(" ".join), st.text(max_size=80))
def test_shared_runs_is_the_plain_intersection(left, right):
    assert shared_runs(runs(left), [right, left[:30]]) == runs(left) & (
        runs(right) | runs(left[:30])
    )


def test_paragraphs_end_at_blank_lines_even_with_spaces_in_them():
    assert paragraphs("a\nb\n \t\n\n\nc\n") == ["a\nb", "c\n"]
