"""Tokenises one example of each split, so that a wrong template is found at once."""

from collections.abc import Sequence
from dataclasses import replace

import datasets
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.text.examples import CorpusMeta, Example, corpus_schema, corpus_table
from pipeline.corpus.tokens.row_builder import Counts, Overlong, RowBuilder
from pipeline.corpus.tokens.tokenize import SANE_LENGTH, add_rows, as_seen, check_length, form_of
from pipeline.corpus.tokens.tokenize_chat import DEFAULT_DATE
from pipeline.corpus.tokens.tokenizer import train_tokenizer
from pipeline.tasks import Task

SMALLEST_VOCAB = 258


def tokenize_one(
    examples: Sequence[Example],
    *,
    task: Task,
    tokenizer: PreTrainedTokenizerFast | None,
    max_length: int,
    overlong: Overlong | None = None,
    template: str | None = None,
    chat_template: str | None = None,
    chat_date: str = DEFAULT_DATE,
) -> None:
    """Render and tokenise some examples as `tokenize_corpus` would, and write nothing.

    Labels are ignored, and examples without a target are skipped, because a corpus may contain
    them. Needs no torch.

    Args:
        examples: One of each split that a source has, as the source reads them.
        task: The corpus's task.
        tokenizer: The teacher's, from `local_tokenizer`; None where it is yet to be trained: a
            byte-level one stands in, which knows all but the lengths.
        max_length: As for `tokenize_corpus`, and so are the following.
        overlong: What happens to a longer text.
        template: The template with {text} and {target}.
        chat_template: Jinja text for messages.
        chat_date: The day that a chat template is told.

    Raises:
        ConfigError: What `tokenize_corpus` would raise for these rows.
    """
    usable = [
        replace(example, label="0", labels=())
        for example in examples
        if example.target or task != "prompt-target"
    ]
    meta = CorpusMeta(
        task=task,
        classes=("0",),
        has_pairs=any(example.pair is not None for example in examples),
        rows={}, text_bytes={}, dropped={}, splits={}, seed=0, source={}, digest="",
    )  # fmt: skip
    form = form_of(meta, tokenizer, template, chat_template, chat_date)
    texts = datasets.Dataset(corpus_table(usable, corpus_schema(usable)))
    used = tokenizer or train_tokenizer(as_seen(texts, form), vocab=SMALLEST_VOCAB)
    chosen = check_length(meta, used, max_length, overlong)
    add_rows(
        RowBuilder(has_types="token_type_ids" in used.model_input_names),
        Counts(), texts, used,
        form=form,
        meta=meta,
        max_length=max_length if tokenizer else SANE_LENGTH,
        overlong=chosen,
    )  # fmt: skip
