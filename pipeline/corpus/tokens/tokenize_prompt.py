"""Rows of a prompt and its target: only the target, and the mark that ends it, is learnt.

Generation starts from exactly the ids that training continued; a token never spans the border.
"""

from dataclasses import dataclass, replace
from string import Formatter

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.tokens.boundary import space_of_target, target_sides
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

DEFAULT_TEMPLATE = "{text}\n{target}"
FIELDS = ("text", "pair", "target")


@dataclass(frozen=True, slots=True)
class Template:
    """What stands around text and target.

    Attributes:
        before: What stands before the text; a pair is filled in later, as in `after`.
        after: What stands between text and target.
        source: The template as it was given.
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
        """Return what stands before the text and between text and target."""
        return self.before.format(pair=pair or ""), self.after.format(pair=pair or "")

    def filled(self, text: str, pair: str | None, target: str) -> str:
        """Return the whole as one text, as a tokenizer is trained on it."""
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

    Of a long row the end of the text is left out, never a word of the template. Where the target
    does not fit even so, its end is cut, without an end-of-sequence mark: nothing ended there.
    Rows in which nothing is left of prompt or target are dropped.

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
    """Lay the target's sizes over the row: nothing for the prompt and for the ending mark."""
    found = np.zeros(len(ids), np.int64)
    count = min(len(sizes), len(ids) - len(prompt))
    found[len(prompt) : len(prompt) + count] = sizes[:count]
    return found


def _shortened(
    tokenizer: PreTrainedTokenizerFast, text: str, before: str, after: str, room: int
) -> list[int]:
    """Return the ids of a prompt whose text lost its end, so that at most `room` are left.

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
