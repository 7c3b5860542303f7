"""Where a prompt ends and its target begins, so that both are the tokens of the joined text.

Many tokenizers write a space as part of the word after it (`" The"` is one token of GPT-2). A
prompt that ends in that space, with a target tokenised alone, gives ids that a pretrained model has
hardly ever seen. So the target's ids are those that the joined text has after the prompt's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.tokens.row_builder import encode
from pipeline.corpus.tokens.spans import ends_of


@dataclass(frozen=True, slots=True)
class Side:
    """The target of a row, in tokens.

    Attributes:
        ids: Its tokens.
        ends: Where in the target, in characters, the text of each of them ends.
        is_joined: Whether prompt and target have together the tokens of the joined text.
    """

    ids: list[int]
    ends: Int[ndarray, " tokens"]
    is_joined: bool


def space_of_target(
    tokenizer: PreTrainedTokenizerFast,
    widest: str,
    prompts: Sequence[str],
    targets: Sequence[str],
) -> str:
    """Return the white space at the prompts' end that belongs to the target.

    It is the shortest with which most prompts keep their tokens when the target follows: none for
    most tokenizers after a line end, the space itself for GPT-2's after `Answer: `.

    Args:
        tokenizer: The tokenizer of both sides.
        widest: White space that all prompts end in.
        prompts: Prompts as the template writes them.
        targets: Their targets.
    """
    joined = encode(
        tokenizer,
        [f"{prompt}{target}" for prompt, target in zip(prompts, targets, strict=True)],
        add_special_tokens=False,
    )["input_ids"]
    best, most = "", -1
    for start in range(len(widest), -1, -1):
        space = widest[start:]
        left = [prompt.removesuffix(space) for prompt in prompts]
        ids = encode(tokenizer, left, add_special_tokens=False)["input_ids"]
        kept = sum(all_ids[: len(own)] == own for own, all_ids in zip(ids, joined, strict=True))
        if kept > most:
            best, most = space, kept
    return best


def target_sides(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    prompt_ids: Sequence[list[int]],
    space: str,
    targets: Sequence[str],
) -> list[Side]:
    """Return the targets' tokens after their prompts.

    Where the joined text has other tokens for the prompt, or the target would read otherwise when
    it is decoded alone (WordPiece's `##` inside a word), the target is tokenised alone.

    Args:
        tokenizer: The tokenizer of both sides.
        prompts: Prompts without `space`.
        prompt_ids: Their tokens, without special ones.
        space: White space between prompt and target.
        targets: What follows.
    """
    spaced = [f"{space}{target}" for target in targets]
    alone = encode(tokenizer, spaced, add_special_tokens=False)
    together = encode(
        tokenizer,
        [f"{prompt}{target}" for prompt, target in zip(prompts, spaced, strict=True)],
        add_special_tokens=False,
    )
    found = []
    for number, target in enumerate(targets):
        ids, start = alone["input_ids"][number], 0
        offsets, before = alone["offset_mapping"][number], len(space)
        own, joined = prompt_ids[number], together["input_ids"][number]
        is_joined = joined[: len(own)] == own
        if is_joined and joined[len(own) :] != ids:
            inside = joined[len(own) :]
            is_joined = _reads(tokenizer, inside) == _reads(tokenizer, ids)
        if is_joined:
            ids, start = joined, len(own)
            offsets, before = together["offset_mapping"][number], len(prompts[number]) + len(space)
        ends = ends_of(np.array(offsets, np.int64).reshape(-1, 2), before + len(target))
        # White space of the template is no text of the target.
        ends = np.clip(ends[start:] - before, 0, len(target))
        found.append(Side(ids[start:], ends, is_joined))
    return found


def _reads(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids)).strip()
