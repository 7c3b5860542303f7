"""Text that is added changes neither the teacher that is trained here nor what it wrote before."""

from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.generation.generate import plan_batches
from pipeline.generation.options import GenerationOptions
from pipeline.teacher.source.teach import teach
from tests.captured import Captured, prepared
from tests.grown import grown
from tests.teacher.test_teach import FIT, SCRATCH

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=20)


def taught(store: Captured, root: Path) -> dict[str, Any]:
    reference = teach(
        name="main",
        tokens=store.tokens,
        output=root / "teacher",
        work=root / "work",
        scratch=SCRATCH,
        path=None,
        revision=None,
        trust_remote_code=False,
        fit=FIT,
        device="cpu",
    )
    return reference.identity()


def test_a_teacher_is_trained_on_the_corpus_as_it_was(tmp_path):
    small = prepared(tmp_path / "small", "llama", layers=1)
    large = grown(small, tmp_path / "large", with_stores=False)
    assert taught(large, tmp_path / "a") == taught(small, tmp_path / "b")


@settings(max_examples=60, deadline=None)
@given(LENGTHS, LENGTHS, st.integers(1, 4))
def test_added_prompts_run_in_batches_of_their_own_after_the_others(first, added, size):
    options = GenerationOptions(max_new_tokens=4, batch_size=size)
    before = plan_batches(first, options, limit=12)
    assert plan_batches(first, options, limit=12, parts=[len(first)]) == before
    parts = [len(first), len(added)]
    after = plan_batches([*first, *added], options, limit=12, parts=parts)
    assert after[: len(before)] == before
    assert [batch.number for batch in after] == list(range(len(after)))
    rows = [row for batch in after for row in batch.rows]
    assert sorted(rows) == list(range(sum(parts)))
    assert min(rows[len(first) :]) == len(first)
