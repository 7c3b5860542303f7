"""Generate training targets with the teacher, for sequence-level distillation.

Every finished batch is saved, so an interrupted run resumes and gives the same text as one that was
not interrupted.
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
from pipeline.generation.generate import (
    Continuation,
    PromptBatch,
    end_ids,
    generate_batches,
    plan_batches,
    text_of,
)
from pipeline.generation.options import GenerationOptions
from pipeline.provenance import fingerprint, read_json, write_json
from pipeline.tasks import generates
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.placement import Placement, input_device
from pipeline.teacher.source.reference import TeacherReference
from pipeline.training.checkpoints import checkpoint_lock

logger = logging.getLogger(__name__)

VERSION = 1
"""Increased whenever the same options would give other text."""


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
    """Let a teacher continue every training prompt, and write the resulting token set.

    Args:
        name: The teacher's name.
        tokens: Directory of the tokenised corpus.
        teacher: The teacher's directory.
        output: Directory to write atomically.
        work: Directory for finished batches; they are removed at the end.
        options: Decoding options.
        device: A torch device.
        placement: How the teacher is spread over devices.
        before_commit: Called before the token set is written; if it raises, a previous token set
            and the finished batches stay.

    Raises:
        ConfigError: If the task has no prompts, or the teacher cannot be found.
        IncompatibleError: If the teacher's weights or tokenizer changed, or a prompt leaves no
            room for a continuation.
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
    # The teach stage checked that the teacher's context holds max_length tokens.
    batches = plan_batches(
        [len(ids) for ids in prompts], options, limit=meta.max_length, parts=meta.parts
    )
    identity = fingerprint(
        {
            "version": VERSION,
            "tokens": meta.digest,
            # Not in the token set's digest, which covers only what changes features.
            "prompts": hashlib.sha256(train.prompt_tokens.astype("<i4").tobytes()).hexdigest(),
            "tokenizer": meta.tokenizer_digest,
            "teacher": reference.identity(),
            "options": options.model_dump(mode="json"),
        }
    )
    finished = work / "generate" / f"{name}-{identity[:16]}"
    tokenizer = AutoTokenizer.from_pretrained(token_set.tokenizer_path)
    with checkpoint_lock(finished):
        continuations = _finished(finished, batches)
        if len(continuations) < len(batches):
            if continuations:
                logger.info(
                    "%s: resuming after %d of %d batches", name, len(continuations), len(batches)
                )
            torch_device = torch.device(device)
            model = load_teacher(
                teacher,
                reference,
                task=meta.task,
                device=torch_device,
                dtype=getattr(torch, options.dtype),
                placement=placement,
            )
            for batch, generated in generate_batches(
                model,
                prompts,
                batches,
                options=options,
                pad_id=meta.pad_id,
                # Only of the first part: added text must not change what was generated before.
                eos_ids=end_ids(model, tokenizer, _rows(train)[: meta.first_rows]),
                device=input_device(model, torch_device),
                description=f"generate {name}",
                done=frozenset(continuations),
            ):
                records = [asdict(continuation) for continuation in generated]
                write_json(_file(finished, batch.number), {"rows": batch.rows, "found": records})
                continuations[batch.number] = generated
        before_commit()
        _write(output, token_set, train, batches, continuations, tokenizer)
        shutil.rmtree(finished, ignore_errors=True)


def _write(
    output: Path,
    token_set: TokenSet,
    train: TokenColumns,
    batches: Sequence[PromptBatch],
    continuations: dict[int, list[Continuation]],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Reorder the batches' continuations by row and write the token set."""
    by_row = {
        row: continuation
        for batch in batches
        for row, continuation in zip(batch.rows, continuations[batch.number], strict=True)
    }
    ordered = [by_row[row] for row in range(len(by_row))]
    ends = {text.end for text in ordered if text.end is not None}
    ids = [[*text.ids, *([] if text.end is None else [text.end])] for text in ordered]
    space = token_set.meta.text_form.get("target_begins_with", "")
    texts = [text_of(tokenizer, text.ids).removeprefix(space) for text in ordered]
    write_transfer(output, token_set, train, ids, texts, end_ids=frozenset(ends))


def _rows(train: TokenColumns) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Return ids and loss mask of each row."""
    return [
        (train.input_ids[start:end], train.loss_mask[start:end])
        for start, end in pairwise(train.offsets)
    ]


def _file(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.json"


def _finished(directory: Path, batches: Sequence[PromptBatch]) -> dict[int, list[Continuation]]:
    """Return the batches that an earlier run finished, without unreadable or different files."""
    continuations = {}
    for batch in batches:
        path = _file(directory, batch.number)
        if not path.exists():
            continue
        try:
            record = read_json(path)
            if record["rows"] == list(batch.rows):
                continuations[batch.number] = [
                    Continuation(**continuation) for continuation in record["found"]
                ]
        except (IntegrityError, KeyError, TypeError) as error:
            logger.warning("%s: not a finished batch (%s); generating it again", path, error)
    return continuations
