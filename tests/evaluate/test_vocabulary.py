"""Held-out rows in a student's ids: the same text, the same targets, in the pieces that it has."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.corpus.text.examples import SPLITS, Split
from pipeline.corpus.tokens.tokens import (
    TokenColumns,
    TokenMeta,
    TokenSet,
    token_digest,
    write_tokens,
)
from pipeline.errors import IntegrityError
from pipeline.evaluate.answers import predict_rows
from pipeline.evaluate.vocabulary import student_token_set
from pipeline.student.vocabulary.smaller_tokenizer import cut_tokenizer
from pipeline.tasks import models_language
from tests.vocabularies import TEXTS, write_tokenizer

KINDS = ("bytes", "fallback", "wordpiece", "unigram")
PARTS: dict[Split, list[str]] = {
    "train": TEXTS[:6],
    "validation": [*TEXTS[:3], "their quiz, or nothing"],
    "test": [*TEXTS[40:60], "the other state  12", "who will?"],
}


def write_set(path: Path, kind: str, *, task: str) -> tuple[TokenSet, Path]:
    """A token set, and a student with a tokenizer cut down to its training rows."""
    write_tokenizer(kind, path / "tokens" / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(path / "tokens" / "tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    splits = {split: columns(tokenizer, PARTS[split], task) for split in SPLITS}
    meta = TokenMeta(
        task=task,
        classes=() if models_language(task) else ("no", "yes"),
        vocab=len(tokenizer),
        max_length=64,
        pad_id=tokenizer.pad_token_id,
        columns=("token_type_ids",) if kind == "wordpiece" else (),
        rows={split: len(PARTS[split]) for split in SPLITS},
        tokens={split: len(c.input_ids) for split, c in splits.items()},
        targets={split: c.count_targets() for split, c in splits.items()},
        target_bytes=sums(splits, "target_bytes"),
        target_words=sums(splits, "target_words"),
        text_bytes=dict.fromkeys(SPLITS, 1),
        overlong=dict.fromkeys(SPLITS, 0),
        dropped=dict.fromkeys(SPLITS, 0),
        digest=token_digest(splits),
        tokenizer_digest="tiny",
        corpus_digest="tiny",
    )
    write_tokens(path / "tokens", splits, meta)
    student = path / "student"
    student.mkdir()
    cut = cut_tokenizer(path / "tokens" / "tokenizer", set(splits["train"].input_ids.tolist()))
    cut.save(student)
    return TokenSet.load(path / "tokens"), student


def sums(splits: dict[Split, TokenColumns], name: str) -> dict[Split, int]:
    return {
        s: int(getattr(c, name).sum()) for s, c in splits.items() if getattr(c, name) is not None
    }


def columns(tokenizer, texts: list[str], task: str) -> TokenColumns:
    """Rows as tokenize makes them; a prompt is the first word and a half of the text."""
    rows, masks, types, prompts = [], [], [], []
    for text in texts:
        prompt = text[: text.index(" ") + 3] if task == "prompt-target" else ""
        if prompt:
            first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            rest = tokenizer(text[len(prompt) :])["input_ids"]
            ids, mask = first + rest, [False] * len(first) + [True] * len(rest)
            prompts.append(len(first))
        else:
            found = tokenizer(text, return_special_tokens_mask=True)
            ids, mask = found["input_ids"], [not flag for flag in found["special_tokens_mask"]]
        rows.append(np.array(ids, np.int32))
        masks.append(np.array(mask, bool))
        types.append(np.arange(len(ids)) > len(ids) // 2)
    language = models_language(task)
    return TokenColumns(
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        input_ids=np.concatenate(rows),
        loss_mask=np.concatenate(masks),
        source_row=np.arange(len(rows)),
        piece=np.zeros(len(rows), np.int32),
        token_type_ids=np.concatenate(types).astype(np.int8) if task == "classification" else None,
        label=None if language else np.arange(len(rows)) % 2,
        target_bytes=np.array([len(t.encode()) for t in texts], np.int32) if language else None,
        target_words=np.array([len(t.split()) for t in texts], np.int32) if language else None,
        prompt_tokens=np.array(prompts, np.int32) if prompts else None,
        references=[[text] for text in texts] if prompts else None,
    )


def decoded(tokens: TokenSet, ids: list[int]) -> str:
    tokenizer = AutoTokenizer.from_pretrained(tokens.tokenizer_path)
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_student_with_the_teachers_tokenizer_gets_the_same_object(tmp_path):
    tokens, _ = write_set(tmp_path, "bytes", task="causal-lm")
    shutil.copytree(tokens.tokenizer_path, tmp_path / "same")
    assert student_token_set(tokens, tmp_path / "same", None) is tokens
    with pytest.raises(IntegrityError, match=r"none/tokenizer\.json: not readable"):
        student_token_set(tokens, tmp_path / "none", None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["causal-lm", "prompt-target", "classification"])
def test_rows_are_the_same_text_in_the_students_pieces(kind, task, tmp_path):
    tokens, student = write_set(tmp_path, kind, task=task)
    ours = student_token_set(tokens, student, 64)
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert ours.meta.vocab == len(tokenizer) < tokens.meta.vocab
    assert ours.tokenizer_path == student
    longer = 0
    for split in SPLITS:
        old, new = tokens.split(split), ours.split(split)
        assert len(old) == len(new) == ours.meta.rows[split]
        assert new.column_names == old.column_names
        for before, after in zip(old, new, strict=True):
            ids, mask = np.array(after["input_ids"]), np.array(after["loss_mask"])
            assert len(ids) == len(mask)
            assert ids.max() < len(tokenizer)
            longer += len(ids) > len(before["input_ids"])
            assert decoded(ours, ids) == decoded(tokens, before["input_ids"])
            counted = np.array(before["input_ids"])[np.array(before["loss_mask"])]
            assert decoded(ours, ids[mask]) == decoded(tokens, counted)
            for name in set(old.column_names) & {"target_bytes", "target_words", "label"}:
                assert after[name] == before[name]
            if task == "prompt-target":
                prompt = before["input_ids"][: before["prompt_tokens"]]
                found = ids[: after["prompt_tokens"]]
                assert decoded(ours, found) == decoded(tokens, prompt)
                assert not mask[: after["prompt_tokens"]].any()
                assert mask[after["prompt_tokens"] :].all()
                assert after["references"] == before["references"]
        assert ours.meta.tokens[split] == sum(len(row) for row in new["input_ids"])
    assert longer
    assert ours.meta.tokens["train"] == tokens.meta.tokens["train"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_written_anew_is_what_the_students_tokenizer_writes(kind, tmp_path):
    tokens, student = write_set(tmp_path, kind, task="causal-lm")
    tokenizer = AutoTokenizer.from_pretrained(student)
    rows = student_token_set(tokens, student, 64).split("test")["input_ids"]
    for ids, text in zip(rows, PARTS["test"], strict=True):
        assert list(ids) == tokenizer(text)["input_ids"], text


def test_a_row_that_outgrows_the_student_loses_its_end_and_the_bytes_of_it(tmp_path):
    tokens, student = write_set(tmp_path, "bytes", task="causal-lm")
    ours = student_token_set(tokens, student, 12)
    tokenizer = AutoTokenizer.from_pretrained(student)
    shorter = 0
    for row, text in zip(ours.split("test"), PARTS["test"], strict=True):
        whole = tokenizer(text)["input_ids"]
        assert list(row["input_ids"]) == whole[:12]
        kept = tokenizer.decode(whole[:12], skip_special_tokens=True)
        assert row["target_bytes"] == len(kept.encode())
        shorter += len(whole) > 12
    assert shorter
    assert ours.cut_rows["test"] == shorter  # pyright: ignore[reportAttributeAccessIssue]
    assert ours.meta.target_bytes["test"] < tokens.meta.target_bytes["test"]
    assert ours.meta.max_length == 12
    # With room for more, rows may be as long as the teacher's, whatever these rows happen to be.
    roomy = student_token_set(tokens, student, 64)
    assert roomy.meta.max_length == tokens.meta.max_length == 64


def test_a_prompt_that_outgrows_the_student_gives_way_to_its_target(tmp_path):
    tokens, student = write_set(tmp_path, "bytes", task="prompt-target")
    long = {split: rows_of(tokens, split, target=3) for split in SPLITS}
    meta = tokens.meta.model_copy(update={"digest": token_digest(long)})
    shutil.rmtree(tokens.path / "test")
    write_tokens(tokens.path, long, meta)
    ours = student_token_set(TokenSet.load(tokens.path), student, 9).split("test")
    whole = student_token_set(TokenSet.load(tokens.path), student, 64).split("test")
    shorter = 0
    for row, full in zip(ours, whole, strict=True):
        ids, prompt = row["input_ids"], row["prompt_tokens"]
        assert 0 < prompt < len(ids) <= 9
        target = full["input_ids"][full["prompt_tokens"] :]
        # Both ends of a prompt stay, where a template's words are.
        assert ids[0] == full["input_ids"][0]
        assert ids[prompt - 1] == full["input_ids"][full["prompt_tokens"] - 1]
        assert ids[prompt:] == target[: 9 - prompt]
        if len(ids) - prompt == len(target):
            assert row["target_bytes"] == full["target_bytes"]
        shorter += full["prompt_tokens"] >= 9
    assert shorter


def test_what_a_student_only_knows_as_unknown_is_charged_as_one_of_all_it_lacks(tmp_path, caplog):
    """A model to which every id is as likely then spends on a text what it says of all texts."""
    caplog.set_level("INFO")
    tokens, student = write_set(tmp_path, "words", task="causal-lm")
    ours = student_token_set(tokens, student, 64)
    tokenizer = AutoTokenizer.from_pretrained(student)
    theirs = AutoTokenizer.from_pretrained(tokens.tokenizer_path).unk_token_id
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    torch.nn.init.zeros_(model.lm_head.weight)
    found = predict_rows(model, ours, "test", batch_tokens=64, device=torch.device("cpu"))
    charged = 0
    for row, old, new in zip(found, tokens.split("test"), ours.split("test"), strict=True):
        pairs = zip(old["input_ids"][1:], new["input_ids"][1:], strict=True)
        unknown = sum(b == tokenizer.unk_token_id and a != theirs for a, b in pairs)
        lacks = tokens.meta.vocab - len(tokenizer)
        expected = row["targets"] * math.log(len(tokenizer)) + unknown * math.log(lacks)
        assert row["nats"] == pytest.approx(expected)
        charged += unknown
    assert charged
    assert f"test: {charged} tokens are unknown to the student" in caplog.text
    # Rows of the training split have no other pieces than those that were kept.
    assert "unknown_nats" not in ours.split("train").column_names
    assert "train: " not in caplog.text


def rows_of(tokens: TokenSet, split: Split, *, target: int) -> TokenColumns:
    """The rows of a split with all but their last ids as the prompt."""
    plain = tokens.split(split)
    lengths = [len(ids) for ids in plain["input_ids"]]
    prompts = np.array([max(1, length - target) for length in lengths], np.int32)
    masks = [np.arange(n) >= p for n, p in zip(lengths, prompts, strict=True)]
    return TokenColumns(
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        input_ids=np.concatenate(plain["input_ids"]).astype(np.int32),
        loss_mask=np.concatenate(masks),
        source_row=np.arange(len(lengths)),
        piece=np.zeros(len(lengths), np.int32),
        target_bytes=np.full(len(lengths), 60, np.int32),
        target_words=np.full(len(lengths), 20, np.int32),
        prompt_tokens=prompts,
        references=[["any"] for _ in lengths],
    )


def test_a_classifiers_cut_row_keeps_its_closing_mark(tmp_path):
    tokens, student = write_set(tmp_path, "wordpiece", task="classification")
    ours = student_token_set(tokens, student, 8)
    tokenizer = AutoTokenizer.from_pretrained(student)
    for row in ours.split("test"):
        assert len(row["input_ids"]) <= 8
        assert row["input_ids"][-1] == tokenizer.sep_token_id
        assert not row["loss_mask"][-1]
