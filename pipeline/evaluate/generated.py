"""Text that a model generates for the prompts of some test rows, next to its references."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from pipeline.errors import IntegrityError
from pipeline.evaluate.options import GenerateOptions
from pipeline.generation.generate import end_ids, generate_ids, text_of
from pipeline.generation.options import GenerationOptions
from pipeline.written_by import remedy

logger = logging.getLogger(__name__)


def generate_rows(
    model: PreTrainedModel,
    split: datasets.Dataset,
    *,
    tokenizer: Path,
    pad_id: int,
    options: GenerateOptions,
    device: torch.device,
) -> dict[int, dict[str, Any]]:
    """Generate text for the prompts of some rows of a split, the same rows for every model.

    Args:
        model: A causal language model on `device`, in evaluation mode.
        split: Rows with `input_ids`, `prompt_tokens` and `references`.
        tokenizer: Directory of the tokenizer that made the ids.
        pad_id: Id written into padding.
        options: How many rows, and how they are continued.
        device: Where the model is.

    Returns:
        For each row's index `prompt`, and what `answer` returns.

    Raises:
        IntegrityError: If the rows have no prompts, or the tokenizer is not readable.
    """
    words = tokenizer_for(split, tokenizer)
    places = chosen_rows(len(split), options.rows)
    rows = split.select(places)
    prompts = [
        list(ids[:length])
        for ids, length in zip(rows["input_ids"][:], rows["prompt_tokens"][:], strict=True)
    ]
    written = generate_ids(
        model,
        prompts,
        options=GenerationOptions(
            max_new_tokens=options.max_new_tokens,
            num_beams=options.num_beams,
            batch_size=options.batch_size,
        ),
        pad_id=pad_id,
        eos_ids=end_ids(model, words, zip(rows["input_ids"][:], rows["loss_mask"][:], strict=True)),
        device=device,
        description="generate",
    )
    found = {
        place: {
            "prompt": words.decode(prompt, skip_special_tokens=True).strip(),
            **answer(words, ids, references),
        }
        for place, prompt, references, ids in zip(
            places, prompts, rows["references"][:], written, strict=True
        )
    }
    changed = sum("references_as_written" in row for row in found.values())
    if changed:
        logger.warning(
            "%d of %d test rows have references that this tokenizer writes otherwise; text is "
            "scored against what it makes of them", changed, len(found),
        )  # fmt: skip
    return found


def chosen_rows(rows: int, wanted: int) -> list[int]:
    """Return the indices of the rows to generate for, ascending.

    They are drawn at random, because the first rows of a sorted file resemble each other.
    """
    return sorted(np.random.default_rng(0).permutation(rows)[:wanted].tolist())


def tokenizer_for(split: datasets.Dataset, directory: Path) -> Any:
    """Load the tokenizer that a split's prompts are read and answered with.

    Raises:
        IntegrityError: If the rows have no prompts, or the tokenizer is not readable.
    """
    missing = {"prompt_tokens", "references"} - set(split.column_names)
    if missing:
        raise IntegrityError(
            f"test rows: no column {', '.join(sorted(missing))}, expected prompts and references; "
            f"{remedy(directory)}"
        )
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if directory.is_dir() else "it is missing"
        raise IntegrityError(
            f"{directory}: no whole tokenizer ({reason}); {remedy(directory)}"
        ) from error


def answer(tokenizer: Any, ids: Sequence[int], references: Sequence[str]) -> dict[str, Any]:
    """Return generated text and its references, decoded alike.

    Special tokens are text on both sides, but for those that begin, end and pad a row. Where the
    tokenizer cannot write a reference as it is (it has no capitals, or folds wide letters), the
    text is to be compared with what the tokenizer makes of the reference.

    Args:
        tokenizer: The tokenizer of `ids`.
        ids: What a model wrote, without the id that ended it.
        references: What it should have written.

    Returns:
        `text`, `references` as they were given and, where they differ, `references_as_written`.
        Guarantee: `text` of a reference's own tokens is that reference as written.
    """
    found = {"text": text_of(tokenizer, ids).strip(), "references": list(references)}
    encoded = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in references]
    written = [text_of(tokenizer, each).strip() for each in encoded]
    if written != [each.strip() for each in references]:
        found["references_as_written"] = written
    return found
