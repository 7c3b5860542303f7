"""Continues prompts in batches; the result does not depend on how they are batched.

Which prompts run together is a pure function of the prompts and the options, and every batch draws
from a seed of its own. So an interrupted run can resume with the missing batches and gives the same
texts.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from pipeline.errors import IncompatibleError
from pipeline.generation.options import GenerationOptions
from pipeline.taps.row_length import longest_row

Ids = Sequence[int] | NDArray[np.int32]
Mask = Sequence[bool] | NDArray[np.bool_]


def end_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Iterable[tuple[Ids, Mask]] = (),
) -> list[int]:
    """Return the ids that end a generated text.

    They are the tokenizer's, those of the model's generation settings (a chat model ends its turn
    with an id of its own), and the marks that targets end with. Ids of ordinary
    text are left out: they are there by an unintended default, or because a text was truncated.

    Args:
        model: The model that writes.
        tokenizer: The one its prompts were made with.
        rows: `input_ids` and `loss_mask` of rows it was taught on, as many as there are at hand.
    """
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    known = own if isinstance(own, list) else [own]
    taught = {_last_target(ids, mask) for ids, mask in rows}
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {None}
    found = {token for token in {*known, *taught} if token in special}
    eos: Any = tokenizer.eos_token_id
    return sorted({eos, *found} - {None})


def text_of(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """Decode ids without the tokens that begin, end and pad a row.

    Other special tokens are text: a target may hold them, and a model must learn to write them.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id")
    marks: list[Any] = [getattr(tokenizer, name) for name in names]
    unknown: Any = tokenizer.unk_token_id
    return str(tokenizer.decode([one for one in ids if one not in marks or one == unknown]))


def _last_target(ids: Ids, mask: Mask) -> int | None:
    """Return the last id of a row that counts as a target; None if there is none."""
    places = np.flatnonzero(np.asarray(mask, dtype=bool))
    return int(ids[places[-1]]) if len(places) else None


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts that run together, longest first.

    Attributes:
        number: Index among the batches; its seed follows from it.
        rows: Indices of the prompts.
        new_tokens: Maximum number of new tokens per prompt.
    """

    number: int
    rows: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """The text generated after a prompt.

    Attributes:
        ids: The new ids without the one that ended them.
        end: The end-of-sequence id; None if generation stopped at the maximum number of tokens.
    """

    ids: list[int]
    end: int | None


def plan_batches(
    lengths: Sequence[int],
    options: GenerationOptions,
    *,
    limit: int | None,
    parts: Sequence[int] = (),
) -> list[PromptBatch]:
    """Assign prompts to batches of similar length, so that little is padding.

    Prompts with less room than `max_new_tokens` have batches of their own, so that no prompt gets
    less room because of another.

    Args:
        lengths: Tokens of each prompt.
        options: Batch size and number of new tokens.
        limit: Most tokens of prompt and continuation together; None where there is no limit.
        parts: Prompts of each part of a corpus, in order: a part has batches of its own, after
            those of the parts before it, which are what they were without it.

    Raises:
        IncompatibleError: If a prompt is empty or leaves no room for a token.
    """
    for row, length in enumerate(lengths):
        if length == 0 or (limit is not None and length >= limit):
            raise IncompatibleError(
                f"prompt {row}: found {length} tokens, expected 1 to "
                f"{'any number' if limit is None else limit - 1}, so that one more fits the "
                "context; shorten it, or lower max_length"
            )
    rooms = [
        options.max_new_tokens if limit is None else min(options.max_new_tokens, limit - length)
        for length in lengths
    ]
    part = np.repeat(np.arange(len(parts)), parts).tolist() if parts else [0] * len(lengths)
    # Longest first, so that running out of memory shows at once.
    order = sorted(range(len(lengths)), key=lambda row: (part[row], -lengths[row], row))
    batches: list[PromptBatch] = []
    rows: list[int] = []
    for row in order:
        like = (part[row], rooms[row])
        if rows and (len(rows) == options.batch_size or like != (part[rows[0]], rooms[rows[0]])):
            batches.append(PromptBatch(len(batches), tuple(rows), rooms[rows[0]]))
            rows = []
        rows.append(row)
    if rows:
        batches.append(PromptBatch(len(batches), tuple(rows), rooms[rows[0]]))
    return batches


def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    options: GenerationOptions,
    pad_id: int,
    eos_ids: Sequence[int],
    device: torch.device,
    description: str,
) -> list[list[int]]:
    """Continue every prompt.

    Greedy continuations do not depend on what else is in a batch, up to rounding.

    Args:
        model: A causal language model, on `device`.
        prompts: Ids of each prompt, at least one each.
        options: How to continue them.
        pad_id: Id to pad with.
        eos_ids: Ids that end a continuation; none where only the number of tokens does.
        device: Where the model is.
        description: What the progress bar says.

    Returns:
        The new ids of each prompt, in the prompts' order, without the id that ended them.

    Raises:
        IncompatibleError: If a prompt is empty or leaves no room in the model's context.
    """
    batches = plan_batches([len(prompt) for prompt in prompts], options, limit=longest_row(model))
    found: list[list[int]] = [[] for _ in prompts]
    for batch, continuations in generate_batches(
        model,
        prompts,
        batches,
        options=options,
        pad_id=pad_id,
        eos_ids=eos_ids,
        device=device,
        description=description,
    ):
        for row, continuation in zip(batch.rows, continuations, strict=True):
            found[row] = continuation.ids
    return found


def generate_batches(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    batches: Sequence[PromptBatch],
    *,
    options: GenerationOptions,
    pad_id: int,
    eos_ids: Sequence[int],
    device: torch.device,
    description: str,
    done: Collection[int] = (),
) -> Iterator[tuple[PromptBatch, list[Continuation]]]:
    """Yield each batch with the continuations of its prompts, as they come.

    Args:
        model: A causal language model, on `device`.
        prompts: Ids of each prompt.
        batches: From `plan_batches`, all of them.
        options: How to continue them.
        pad_id: Id to pad with.
        eos_ids: Ids that end a continuation.
        device: Where the model is.
        description: What the progress bar says.
        done: Numbers of batches to leave out.
    """
    finished = sum(len(batch.rows) for batch in batches if batch.number in done)
    with (
        tqdm(
            total=len(prompts), initial=finished, desc=description, unit="row", mininterval=1.0
        ) as bar,
        _undisturbed(model),
    ):
        for batch in batches:
            if batch.number in done:
                continue
            ids = _continue(model, [prompts[row] for row in batch.rows], batch, options, pad_id,
                            eos_ids, device)  # fmt: skip
            yield batch, [_cut(row, eos_ids) for row in ids]
            bar.update(len(batch.rows))


def _continue(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    batch: PromptBatch,
    options: GenerationOptions,
    pad_id: int,
    eos_ids: Sequence[int],
    device: torch.device,
) -> list[list[int]]:
    """Return the new ids of each prompt, including anything after the end."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        # To the left: the next token is the last position's, in every row.
        ids[row, longest - len(prompt) :] = torch.as_tensor(np.asarray(prompt, dtype=np.int64))
        mask[row, longest - len(prompt) :] = 1
    samples = options.temperature > 0
    config = GenerationConfig(
        max_new_tokens=batch.new_tokens,
        num_beams=options.num_beams,
        do_sample=samples,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=list(eos_ids) or None,
        # Transformers' own default cuts to the 50 likeliest.
        **({"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
           if samples else {}),
    )  # fmt: skip
    seed = np.random.SeedSequence((options.seed, batch.number)).generate_state(1, np.uint64)
    with (
        torch.inference_mode(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(int(seed[0]))
        found = model.generate(  # pyright: ignore[reportCallIssue]
            ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
    return found[:, longest:].tolist()


def _cut(ids: Sequence[int], eos_ids: Collection[int]) -> Continuation:
    """Return the ids before the first end; only padding follows it."""
    for place, token in enumerate(ids):
        if token in eos_ids:
            return Continuation(list(ids[:place]), token)
    return Continuation(list(ids), None)


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Suspend dropout and the checkpoint's own generation defaults.

    `generate` fills what a given configuration leaves open from the model's own: a repetition
    penalty or a number of beams in its `generation_config.json` would change the text unasked.
    """
    own, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)
