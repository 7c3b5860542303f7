"""Token rows of a prompt and its target; only the target and its end token are predicted.

Generation starts from exactly the prompt ids of training; no token spans the border.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import Formatter

import datasets
import numpy as np
from jaxtyping import Int
from numpy import ndarray
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.tokens.row_builder import (
    BATCH_TEXTS,
    Counts,
    Overlong,
    RowBuilder,
    batches,
    encode,
    opening_ids,
    too_long,
)
from pipeline.corpus.tokens.spans import ends_of, sizes_of
from pipeline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Side:
    """The target of a row, in tokens.

    Attributes:
        ids: Its tokens.
        ends: The position in the target, in characters, where each token's text ends.
        is_joined: Whether the tokens of prompt and target are those of the joined text.
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
    """Return the white space at the end of the prompts that is tokenised with the target.

    It is the shortest with which most prompts keep their tokens when the target follows: for most
    tokenizers none after a line end, for GPT-2's the space after `Answer: `.

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
        # White space of the template is not part of the target's text.
        ends = np.clip(ends[start:] - before, 0, len(target))
        found.append(Side(ids[start:], ends, is_joined))
    return found


def _reads(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids)).strip()


DEFAULT_TEMPLATE = "{text}\n{target}"
FIELDS = ("text", "pair", "target")


@dataclass(frozen=True, slots=True)
class Template:
    """The template around text and target.

    Attributes:
        before: Text before `{text}`; `{pair}` is filled in later, as in `after`.
        after: Text between `{text}` and `{target}`.
        source: The template's text.
        space: White space between `after` and the target that is tokenised with the target.
    """

    before: str
    after: str
    source: str
    space: str = ""

    @classmethod
    def parse(cls, source: str, *, has_pairs: bool) -> "Template":
        """Read `{text}`, `{target}` and, for pairs, `{pair}`; doubled braces are braces.

        Raises:
            ConfigError: If a field is missing, repeated or unknown, or the target is not the end.
        """
        try:
            parts = list(Formatter().parse(source))
        except ValueError as error:
            raise ConfigError(
                f"tokens.template: {source!r} is no template ({error}); expected {{text}} and "
                "{target}, and doubled braces for braces"
            ) from error
        fields = [name for _, name, _, _ in parts if name is not None]
        plain = not any(form or conversion for _, _, form, conversion in parts)
        wanted = ["text", "target", *(["pair"] if has_pairs else [])]
        if sorted(fields) != sorted(wanted) or not plain:
            what = " and ".join(f"{{{name}}}" for name in wanted)
            raise ConfigError(
                f"tokens.template: found {source!r}, expected {what}, each once; correct it "
                "(other braces are written doubled)"
            )
        if parts[-1][1] != "target":
            raise ConfigError(
                f"tokens.template: found {source!r}, expected {{target}} at its end, where the "
                "end-of-sequence mark follows; correct it"
            )
        sides = ["", ""]
        side = 0
        for literal, name, _, _ in parts:
            sides[side] += literal.replace("{", "{{").replace("}", "}}")
            if name == "text":
                side = 1
            elif name == "pair":
                sides[side] += "{pair}"
        return cls(sides[0], sides[1], source)

    def around(self, pair: str | None) -> tuple[str, str]:
        """Return the text before `{text}` and between `{text}` and `{target}`."""
        return self.before.format(pair=pair or ""), self.after.format(pair=pair or "")

    def filled(self, text: str, pair: str | None, target: str) -> str:
        """Return the complete text, for training a tokenizer."""
        before, after = self.around(pair)
        return f"{before}{text}{after}{self.space}{target}"

    def fitted(self, tokenizer: PreTrainedTokenizerFast, texts: datasets.Dataset) -> "Template":
        """Return the template with the white space before the target on the tokenizer's side.

        Args:
            tokenizer: The tokenizer of the rows.
            texts: Training rows, of which the first decide.
        """
        if self.after == self.after.rstrip():
            return self
        rows = texts.with_format(None)[:BATCH_TEXTS]
        prompts = []
        for text, pair in zip(rows["text"], rows["pair"], strict=True):
            before, after = self.around(pair)
            prompts.append(f"{before}{text}{after}")
        space = space_of_target(
            tokenizer, self.after[len(self.after.rstrip()) :], prompts, rows["target"]
        )
        return replace(self, after=self.after.removesuffix(space), space=space)


def add_prompt_rows(
    rows: RowBuilder,
    counts: Counts,
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    overlong: Overlong,
    template: Template,
) -> None:
    """Add the rows of one split.

    The text of a long row is truncated at its end, the template never. If the target still does not
    fit, it is truncated without an end-of-sequence token. Rows without any prompt or target are
    dropped.

    Raises:
        ConfigError: If the tokenizer has no end-of-sequence mark, or a row is too long under
            `error`.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ConfigError(
            "tokenizer: found no eos token, expected one for task prompt-target: without it no "
            "model learns to stop; add it to its tokenizer_config.json"
        )
    opening = opening_ids(tokenizer)
    for batch in batches(texts):
        around = [template.around(pair) for pair in batch["pair"]]
        prompts = [
            f"{before}{text}{after}"
            for text, (before, after) in zip(batch["text"], around, strict=True)
        ]
        encoded = encode(tokenizer, prompts, add_special_tokens=False)
        sides = target_sides(
            tokenizer, prompts, encoded["input_ids"], template.space, batch["target"]
        )
        for number, target in enumerate(batch["target"]):
            prompt = [*opening, *encoded["input_ids"][number]]
            answer = sides[number].ids
            counts.checked += 1
            counts.borders += not sides[number].is_joined
            sizes = sizes_of(target, sides[number].ends)
            end = [eos]
            length = len(prompt) + len(answer) + 1
            if length > max_length:
                counts.overlong += 1
                if overlong == "error":
                    raise too_long(batch["source"][number], length, max_length)
                room = max_length - len(opening) - len(answer) - 1
                cut = _shortened(tokenizer, batch["text"][number], *around[number], room)
                prompt = [*opening, *cut]
                left = max_length - len(prompt)
                if left < len(answer) + 1:
                    counts.cut_targets += 1
                    answer, end = answer[: max(0, left)], []
            if not prompt or not answer:
                counts.dropped += 1
                continue
            ids = np.array([*prompt, *answer, *end], np.int32)
            mask = np.arange(len(ids)) >= len(prompt)
            rows.add(ids, mask, source_row=batch["source_row"][number])
            rows.add_target_sizes(
                mask, (_laid(sizes[0], ids, prompt), _laid(sizes[1], ids, prompt))
            )
            rows.prompt_tokens.append(len(prompt))
            rows.references.append(batch["references"][number] or [target])


def _laid(sizes: NDArray[np.int64], ids: NDArray[np.int32], prompt: list[int]) -> NDArray[np.int64]:
    """Return the target's sizes for the row: 0 for the prompt and the end token."""
    found = np.zeros(len(ids), np.int64)
    count = min(len(sizes), len(ids) - len(prompt))
    found[len(prompt) : len(prompt) + count] = sizes[:count]
    return found


def _shortened(
    tokenizer: PreTrainedTokenizerFast, text: str, before: str, after: str, room: int
) -> list[int]:
    """Return the ids of a prompt whose text is truncated so that at most `room` ids are left.

    Ids at the cut may merge anew, so what is left is tokenised again until it fits. Without any
    text left it may still be longer.
    """
    kept = len(text)
    while True:
        encoded = encode(tokenizer, [f"{before}{text[:kept]}{after}"], add_special_tokens=False)
        ids = encoded["input_ids"][0]
        if len(ids) <= room or kept == 0:
            return ids
        offsets = np.array(encoded["offset_mapping"][0], np.int64).reshape(-1, 2)
        ends = ends_of(offsets, len(before) + kept + len(after)) - len(before)
        # Where the last token ends that may stay, if the ids around the text stay as they are.
        inner = ends[(ends > 0) & (ends <= kept)]
        stays = len(inner) - (len(ids) - room) - 1
        kept = min(kept - 1, int(inner[stays]) if stays >= 0 else 0)
