"""The teacher writes its own targets, once: the text that students are then taught on.

Each batch that is finished is kept, so a run that was cut off goes on where it was, and its text is
that of a run that was not.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.corpus.tokens.tokens import TokenColumns, TokenSet
from pipeline.corpus.tokens.transfer import read_columns, write_transfer
from pipeline.errors import ConfigError, IntegrityError
from pipeline.generation.ends import end_ids, text_of
from pipeline.generation.generate import (
    Continuation,
    GenerationOptions,
    PromptBatch,
    generate_batches,
    plan_batches,
)
from pipeline.provenance import fingerprint, read_json, write_json
from pipeline.tasks import generates
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.placement import Placement, input_device
from pipeline.teacher.source.reference import TeacherReference
from pipeline.training.checkpoints import checkpoint_lock

logger = logging.getLogger(__name__)

# Rises when the same options would give other text.
VERSION = 1


def generate(
    *,
    name: str,
    tokens: Path,
    teacher: Path,
    output: Path,
    work: Path,
    options: GenerationOptions,
    device: str,
    placement: Placement | None = None,
    before_commit: Callable[[], None] = lambda: None,
) -> None:
    """Let a teacher continue every training prompt, and write the token set that comes of it.

    Args:
        name: The teacher's name.
        tokens: Directory of the tokenised corpus.
        teacher: The teacher's directory.
        output: Directory to write, whole or not at all.
        work: Directory for finished batches; they are removed when all is written.
        options: How to continue a prompt.
        device: A torch device.
        placement: How the teacher is spread over devices.
        before_commit: Called before the token set is written; if it raises, an earlier one and
            the finished batches stay.

    Raises:
        ConfigError: If the task has no prompts, or the teacher cannot be found.
        IncompatibleError: If the teacher's weights or tokenizer changed, or a prompt leaves no
            room.
        ResourceError: If the disk is full.
    """
    token_set, reference = TokenSet.load(tokens), TeacherReference.load(teacher)
    meta = token_set.meta
    if not generates(meta.task):
        raise ConfigError(
            f"teachers.{name}.tokens.targets: teacher does not fit the task {meta.task}, which has "
            "no prompts to continue; use corpus, or the task prompt-target or messages"
        )
    token_set.check_tokenizer()
    meta.refuse_others(str(teacher), tokenizer=(reference.made_of or {}).get("tokenizer"))
    train = read_columns(token_set.split("train"))
    if train.prompt_tokens is None:
        raise IntegrityError(f"{tokens}: no column prompt_tokens; run tokenize again")
    prompts = [
        train.input_ids[start : start + count].tolist()
        for start, count in zip(train.offsets[:-1], train.prompt_tokens, strict=True)
    ]
    # The teacher's context holds max_length tokens: teach has seen to it.
    batches = plan_batches(
        [len(ids) for ids in prompts], options, limit=meta.max_length, parts=meta.parts
    )
    identity = fingerprint(
        {
            "version": VERSION,
            "tokens": meta.digest,
            # No part of the token set's digest, which only knows what changes features.
            "prompts": hashlib.sha256(train.prompt_tokens.astype("<i4").tobytes()).hexdigest(),
            "tokenizer": meta.tokenizer_digest,
            "teacher": reference.identity(),
            "options": options.model_dump(mode="json"),
        }
    )
    finished = work / "generate" / f"{name}-{identity[:16]}"
    tokenizer = AutoTokenizer.from_pretrained(token_set.tokenizer_path)
    with checkpoint_lock(finished):
        found = _finished(finished, batches)
        if len(found) < len(batches):
            if found:
                logger.info("%s: going on after %d of %d batches", name, len(found), len(batches))
            place = torch.device(device)
            model = load_teacher(
                teacher,
                reference,
                task=meta.task,
                device=place,
                dtype=torch.float32,
                placement=placement,
            )
            place = input_device(model, place)
            for batch, continuations in generate_batches(
                model,
                prompts,
                batches,
                options=options,
                pad_id=meta.pad_id,
                # Of the corpus itself: what is added to it does not change what was written.
                eos_ids=end_ids(model, tokenizer, _rows(train)[: meta.first_rows]),
                device=place,
                description=f"generate {name}",
                done=frozenset(found),
            ):
                rows = [asdict(one) for one in continuations]
                write_json(_file(finished, batch.number), {"rows": batch.rows, "found": rows})
                found[batch.number] = continuations
        before_commit()
        _write(output, token_set, train, batches, found, tokenizer)
        shutil.rmtree(finished, ignore_errors=True)


def _write(
    output: Path,
    token_set: TokenSet,
    train: TokenColumns,
    batches: Sequence[PromptBatch],
    found: dict[int, list[Continuation]],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Put the batches back into the order of the rows and write them."""
    rows = {
        row: one
        for batch in batches
        for row, one in zip(batch.rows, found[batch.number], strict=True)
    }
    ordered = [rows[row] for row in range(len(rows))]
    ends = {one.end for one in ordered if one.end is not None}
    ids = [[*one.ids, *([] if one.end is None else [one.end])] for one in ordered]
    space = token_set.meta.text_form.get("target_begins_with", "")
    texts = [text_of(tokenizer, one.ids).removeprefix(space) for one in ordered]
    write_transfer(output, token_set, train, ids, texts, end_ids=frozenset(ends))


def _rows(train: TokenColumns) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Ids and loss mask of each row."""
    return [
        (train.input_ids[start:end], train.loss_mask[start:end])
        for start, end in pairwise(train.offsets)
    ]


def _file(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.json"


def _finished(directory: Path, batches: Sequence[PromptBatch]) -> dict[int, list[Continuation]]:
    """Batches that an earlier run finished; a file that is not what was planned is made anew."""
    found = {}
    for batch in batches:
        path = _file(directory, batch.number)
        if not path.exists():
            continue
        try:
            record = read_json(path)
            if record["rows"] == list(batch.rows):
                found[batch.number] = [Continuation(**one) for one in record["found"]]
        except (IntegrityError, KeyError, TypeError) as error:
            logger.warning("%s: not a finished batch (%s); making it again", path, error)
    return found
