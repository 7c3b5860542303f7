"""Loading a teacher, where several threads of a process each want one."""

from concurrent.futures import ThreadPoolExecutor

from transformers import PreTrainedModel

from pipeline.teacher.source.load import load_pretrained
from tests.tiny import tiny_model


def test_threads_that_load_at_once_leave_the_library_as_it_was(tmp_path):
    """It replaces `tie_weights` meanwhile, and the last of two to put it back has the other's."""
    tiny_model("llama").save_pretrained(tmp_path)
    before = PreTrainedModel.tie_weights

    def load(_: int) -> None:
        load_pretrained(str(tmp_path), task="causal-lm", revision=None, trust_remote_code=False)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load, range(8)))
    assert PreTrainedModel.tie_weights is before
