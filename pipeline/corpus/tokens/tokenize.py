"""Turns a prepared corpus into the token rows of one tokenizer.

All decisions about ids are made here: special tokens and templates, truncation to the context
length, and which tokens count as targets.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.files import directory_written_whole
from pipeline.corpus.text.examples import SPLITS, CorpusMeta, Split, read_corpus_meta, read_split
from pipeline.corpus.tokens.row_builder import Counts, Overlong, RowBuilder, batches
from pipeline.corpus.tokens.tokenize_chat import DEFAULT_DATE, ChatTemplate, add_chat_rows
from pipeline.corpus.tokens.tokenize_prompt import DEFAULT_TEMPLATE, Template, add_prompt_rows
from pipeline.corpus.tokens.tokenize_sequence import add_sequence_rows
from pipeline.corpus.tokens.tokenize_text import add_text_rows
from pipeline.corpus.tokens.tokenizer import tokenizer_digest
from pipeline.corpus.tokens.tokens import TokenColumns, TokenMeta, token_digest, write_tokens
from pipeline.errors import ConfigError
from pipeline.tasks import models_language, outputs_of

logger = logging.getLogger(__name__)

# Transformers' mark for "no limit known" is 10**30; no context is near this.
SANE_LENGTH = 10**9
# Below this share of rows, a border inside a token comes from the text, not the template.
RARE_BORDERS = 0.01


def tokenize_corpus(
    *,
    corpus: Path,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    overlong: Overlong | None,
    output: Path,
    template: str | None = None,
    chat_template: str | None = None,
    chat_date: str = DEFAULT_DATE,
) -> TokenMeta:
    """Write the token rows of a prepared corpus, and the tokenizer, to the directory `output`.

    Rows keep the order of the corpus. Rows with nothing to predict, and for a sequence task rows of
    special tokens only, are dropped and counted.

    Args:
        corpus: The output of `prepare_corpus`.
        tokenizer: From `load_tokenizer` or `train_tokenizer`.
        max_length: Longest row in tokens, special ones included.
        overlong: What happens to a longer text: consecutive rows (causal-lm only), its start
            (in a pair, the longer text gives first; of a prompt, the end of the text, never the
            target), or an error that names it. None splits for causal-lm and truncates else.
        output: Directory to write, completely or not at all; an earlier one is replaced.
        template: The template with {text} and {target}, for prompt-target.
        chat_template: Jinja template for messages, instead of the tokenizer's own.
        chat_date: The date that chat templates get, such as 2026-01-01.

    Raises:
        ConfigError: If the length, `overlong` or a template does not suit, a text is too long
            under `error`, or a split has no rows left. Nothing has been written then.
        IntegrityError: If the prepared corpus cannot be read.
        ResourceError: If the output cannot be written; an earlier one stays.
    """
    meta = read_corpus_meta(corpus)
    pad_id = tokenizer.pad_token_id
    if not isinstance(pad_id, int):
        raise ConfigError(
            "tokenizer: found no pad token, expected one; add it to its tokenizer_config.json"
        )
    chosen = check_length(meta, tokenizer, max_length, overlong)
    form = form_of(meta, tokenizer, template, chat_template, chat_date)
    if isinstance(form, Template):
        # Added texts do not change the ids of earlier rows.
        own = read_split(corpus, "train")
        form = form.fitted(tokenizer, own.select(range(meta.parts[0])) if meta.parts else own)
    splits: dict[Split, TokenColumns] = {}
    counts: dict[Split, Counts] = {}
    for split in SPLITS:
        rows = RowBuilder(has_types="token_type_ids" in tokenizer.model_input_names)
        counts[split] = Counts()
        texts = read_split(corpus, split)
        add_rows(
            rows, counts[split], texts, tokenizer,
            form=form, meta=meta, max_length=max_length, overlong=chosen,
        )  # fmt: skip
        if not rows.source_row:
            raise ConfigError(
                f"{corpus / split}: no row of {len(texts)} has a token to learn from, expected at "
                "least one; give longer texts"
            )
        splits[split] = rows.columns()
    language = models_language(meta.task)
    found = TokenMeta(
        task=meta.task,
        classes=meta.classes,
        vocab=len(tokenizer),
        max_length=max_length,
        pad_id=pad_id,
        columns=("token_type_ids",) if splits["train"].token_type_ids is not None else (),
        rows={split: len(columns.piece) for split, columns in splits.items()},
        tokens={split: len(columns.input_ids) for split, columns in splits.items()},
        outputs=0 if language else outputs_of(meta.task, meta.classes),
        targets={split: columns.count_targets() for split, columns in splits.items()},
        target_bytes=_sums(splits, "target_bytes"),
        target_words=_sums(splits, "target_words"),
        text_bytes=meta.text_bytes,
        overlong={split: count.overlong for split, count in counts.items()},
        cut_targets={split: count.cut_targets for split, count in counts.items()},
        dropped={split: count.dropped for split, count in counts.items()},
        text_form=_described(form),
        digest=token_digest(splits),
        tokenizer_digest=tokenizer_digest(tokenizer),
        corpus_digest=meta.digest,
        parts=_parts(meta, read_split(corpus, "train"), splits["train"]),
    )
    with directory_written_whole(output) as temporary:
        # The padding and truncation of the last call would be saved with the tokenizer.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        if tokenizer.model_max_length > SANE_LENGTH:
            # A tokenizer trained here has no context length; models of these rows have this one.
            tokenizer.model_max_length = max_length
        if isinstance(form, ChatTemplate):
            tokenizer.chat_template = form.source
        tokenizer.save_pretrained(temporary / "tokenizer")
        write_tokens(temporary, splits, found)
    for split in SPLITS:
        logger.info(
            "tokenized %s: %d rows, %d tokens, %d texts over %d tokens (%s), %d rows dropped",
            split, found.rows[split], found.tokens[split], found.overlong[split], max_length,
            chosen, found.dropped[split],
        )  # fmt: skip
        if counts[split].cut_targets:
            logger.warning(
                "%s: %d targets lost their end, for the target alone is too long; raise max_length",
                split, counts[split].cut_targets,
            )  # fmt: skip
        _warn_of_borders(split, counts[split], form)
    return found


Form = Template | ChatTemplate | None


def add_rows(
    rows: RowBuilder,
    counts: Counts,
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    *,
    form: Form,
    meta: CorpusMeta,
    max_length: int,
    overlong: Overlong,
) -> None:
    """Add the rows of one split, tokenised for the corpus's task.

    Raises:
        ConfigError: If a text is too long under `error`, or a template refuses it.
    """
    place = (rows, counts, texts, tokenizer)
    if isinstance(form, Template):
        add_prompt_rows(*place, max_length=max_length, overlong=overlong, template=form)
    elif isinstance(form, ChatTemplate):
        add_chat_rows(*place, max_length=max_length, overlong=overlong, template=form)
    elif models_language(meta.task):
        add_text_rows(*place, max_length=max_length, overlong=overlong)
    else:
        add_sequence_rows(*place, max_length=max_length, overlong=overlong, meta=meta)


def _warn_of_borders(split: Split, counts: Counts, form: Form) -> None:
    """Warn if more than a few prompts end in other tokens than when tokenised alone."""
    if counts.borders <= RARE_BORDERS * counts.checked:
        return
    share = f"{counts.borders / counts.checked:.1%}"
    if isinstance(form, Template):
        logger.warning(
            "%s: in %s of the rows prompt and target have other tokens than the joined text, which "
            "is what a pretrained teacher knows; let tokens.template have a space or a new line "
            "before {target}", split, share,
        )  # fmt: skip
    else:
        logger.warning(
            "%s: in %s of the chats the answer begins after other tokens than those of the "
            "template's generation prompt, from which a served model writes; let the template's "
            "add_generation_prompt write what stands before {%% generation %%}, and no answer "
            "begin inside a token", split, share,
        )  # fmt: skip


def form_of(
    meta: CorpusMeta,
    tokenizer: PreTrainedTokenizerFast | None,
    template: str | None,
    chat_template: str | None,
    chat_date: str,
) -> Form:
    """Return the template of the task; refuse options that have no effect on it.

    Raises:
        ConfigError: If a template does not suit the task or the columns, or a chat has none.
    """
    for key, value, task in (
        ("template", template, "prompt-target"),
        ("chat_template", chat_template, "messages"),
    ):
        if value is not None and meta.task != task:
            raise ConfigError(
                f"tokens.{key}: given for task {meta.task}, which has none; remove it, or use task "
                f"{task}"
            )
    if meta.task == "prompt-target":
        source = DEFAULT_TEMPLATE if template is None else template
        if template is None and meta.has_pairs:
            source = source.replace("{text}", "{text}\n{pair}")
        return Template.parse(source, has_pairs=meta.has_pairs)
    if meta.task == "messages":
        return ChatTemplate.of(tokenizer, chat_template, chat_date)
    return None


def _described(form: Form) -> dict[str, str]:
    if isinstance(form, Template):
        moved = {"target_begins_with": form.space} if form.space else {}
        return {"template": form.source, **moved}
    if isinstance(form, ChatTemplate):
        return {"chat_template_sha256": form.sha256, "chat_date": form.date}
    return {}


def _sums(splits: dict[Split, TokenColumns], name: str) -> dict[Split, int]:
    found: dict[Split, int] = {}
    for split, columns in splits.items():
        values = getattr(columns, name)
        if values is not None:
            found[split] = int(values.sum())
    return found


def _parts(meta: CorpusMeta, texts: datasets.Dataset, rows: TokenColumns) -> tuple[int, ...]:
    """Return the number of rows of each corpus part of the training split.

    A text may give several rows or none; added texts have later source rows than all before.
    """
    firsts = np.cumsum(meta.parts)[:-1].tolist()
    if not firsts:
        return ()
    later = np.array(texts.select_columns("source_row")[firsts]["source_row"])
    part = np.searchsorted(later, rows.source_row, side="right")
    return tuple(np.bincount(part, minlength=len(meta.parts)).tolist())


def training_texts(
    corpus: Path,
    *,
    template: str | None = None,
    chat_template: str | None = None,
    chat_date: str = DEFAULT_DATE,
) -> Iterator[str]:
    """Return the texts of the training split, with their template, to train a tokenizer on.

    Texts that were added later are left out: a tokenizer trained on them would change all ids.

    Raises:
        ConfigError: If a template does not suit.
        IntegrityError: If the prepared corpus cannot be read.
    """
    meta = read_corpus_meta(corpus)
    form = form_of(meta, None, template, chat_template, chat_date)
    texts = read_split(corpus, "train")
    return as_seen(texts.select(range(meta.parts[0])) if meta.parts else texts, form)


def as_seen(texts: datasets.Dataset, form: Form) -> Iterator[str]:
    """Yield each text with its template, without special tokens."""
    for batch in batches(texts):
        for number, text in enumerate(batch["text"]):
            pair = batch["pair"][number]
            if isinstance(form, Template):
                yield form.filled(text, pair, batch["target"][number])
            elif isinstance(form, ChatTemplate):
                # Special tokens have ids of their own; no merges are learned inside their names.
                none = {"bos_token": "", "eos_token": ""}
                yield form.render(batch["messages"][number], none, batch["source"][number])[0]
            else:
                yield text
                if pair:
                    yield pair


def check_length(
    meta: CorpusMeta, tokenizer: PreTrainedTokenizerFast, max_length: int, overlong: Overlong | None
) -> Overlong:
    """Return what happens to longer texts; refuse a length that does not fit the tokenizer.

    Raises:
        ConfigError: If the length or `overlong` does not suit the tokenizer or the task.
    """
    limit = tokenizer.model_max_length
    if limit < SANE_LENGTH and max_length > limit:
        raise ConfigError(
            f"max_length: found {max_length} tokens, expected at most {limit}, the context of this "
            "tokenizer's model; lower it"
        )
    special = tokenizer.num_special_tokens_to_add(pair=meta.has_pairs)
    if max_length < special + 2:
        raise ConfigError(
            f"max_length: found {max_length} tokens, expected at least {special + 2} ({special} "
            "special tokens and two of the text); raise it"
        )
    if meta.task != "causal-lm" and overlong == "split":
        why = (
            "part a target from its prompt"
            if models_language(meta.task)
            else "give one label to several rows"
        )
        raise ConfigError(
            f"overlong: 'split' would {why}, for {meta.task} "
            "expected 'truncate' or 'error'; change it"
        )
    return overlong or ("split" if meta.task == "causal-lm" else "truncate")
