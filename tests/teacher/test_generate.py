"""The teacher's own text becomes a token set: the same after a kill, and fit to be captured on."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.corpus.text.examples import SPLITS
from pipeline.corpus.tokens.tokens import TokenMeta, TokenSet, token_digest, write_tokens
from pipeline.corpus.tokens.transfer import keep_corpus, read_columns, transfer_tokens
from pipeline.errors import ConfigError, IntegrityError
from pipeline.generation.generate import generate_ids
from pipeline.generation.options import GenerationOptions
from pipeline.provenance import read_json, write_json
from pipeline.teacher.source import generate as module
from pipeline.teacher.source.generate import generate
from tests.captured import LENGTHS, Captured, signal, write_rows, write_teacher
from tests.tiny import PAD_ID, tiny_model

OPTIONS = GenerationOptions(max_new_tokens=6, batch_size=4)
LENGTHS_OF_PROMPTS = {split: [max(1, n // 2) for n in LENGTHS[split]] for split in SPLITS}


def prompted(root):
    """A token set of prompts and targets, and a teacher of it."""
    plain = write_rows(root / "plain")
    splits = {}
    for split in SPLITS:
        rows = read_columns(plain.split(split))
        prompts = np.array(LENGTHS_OF_PROMPTS[split], np.int32)
        places = np.concatenate([np.arange(length) for length in np.diff(rows.offsets)])
        count = len(prompts)
        splits[split] = replace(
            rows,
            loss_mask=places >= np.repeat(prompts, np.diff(rows.offsets)),
            target_bytes=np.full(count, 7, np.int32),
            target_words=np.full(count, 2, np.int32),
            prompt_tokens=prompts,
            references=[[f"w{row}", "w9"] for row in range(count)],
        )
    counts = {split: len(splits[split].piece) for split in SPLITS}
    values = plain.meta.model_dump() | {
        "task": "prompt-target",
        "targets": {split: columns.count_targets() for split, columns in splits.items()},
        "target_bytes": {split: 7 * count for split, count in counts.items()},
        "target_words": {split: 2 * count for split, count in counts.items()},
        "text_bytes": dict.fromkeys(SPLITS, 1000),
        "digest": token_digest(splits),
    }
    write_tokens(root / "tokens", splits, TokenMeta(**values))
    tokenizer = AutoTokenizer.from_pretrained(plain.tokenizer_path)
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(root / "tokens" / "tokenizer")
    model = tiny_model("llama", layers=2)
    model.generation_config.eos_token_id = [2, 5]
    write_teacher(root / "teacher", model)
    return Captured(root, "prompt-target")


def plain_teacher(source):
    return AutoModelForCausalLM.from_pretrained(source.teacher / "model").eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return prompted(tmp_path_factory.mktemp("prompted"))


def run(source, output, work, **changes):
    values = {
        "name": "t",
        "tokens": source.tokens,
        "teacher": source.teacher,
        "output": output,
        "work": work,
        "options": OPTIONS,
        "device": "cpu",
    }
    generate(**values | changes)
    return TokenSet.load(output)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    return run(source, root / "transfer", root / "work")


def rows_of(columns):
    stretches = zip(columns.offsets[:-1], columns.offsets[1:], strict=True)
    return [columns.input_ids[start:end].tolist() for start, end in stretches]


def test_training_rows_are_prompts_and_what_the_teacher_writes_one_by_one(source, written):
    model = plain_teacher(source)
    before = read_columns(TokenSet.load(source.tokens).split("train"))
    after = read_columns(written.split("train"))
    assert after.source_row.tolist() == before.source_row.tolist()
    assert after.references == before.references
    for row, ids in enumerate(rows_of(after)):
        count = LENGTHS_OF_PROMPTS["train"][row]
        prompt = rows_of(before)[row][:count]
        (text,) = generate_ids(
            model, [prompt], options=OPTIONS, pad_id=PAD_ID, eos_ids=[2],
            device=torch.device("cpu"), description="test",
        )  # fmt: skip
        assert ids[:count] == prompt
        assert ids[count:] == text + ([2] if len(text) < 6 else [])
        mask = after.loss_mask[after.offsets[row] : after.offsets[row + 1]]
        assert mask.tolist() == [place >= count for place in range(len(ids))]


def test_the_token_set_says_what_it_holds(source, written):
    meta, before = written.meta, TokenSet.load(source.tokens).meta
    train = read_columns(written.split("train"))
    assert meta.digest == token_digest(
        {split: read_columns(written.split(split)) for split in SPLITS}
    )
    assert meta.digest != before.digest
    assert meta.rows == before.rows
    assert meta.tokens["train"] == len(train.input_ids)
    assert meta.targets["train"] == train.count_targets()
    tokenizer = AutoTokenizer.from_pretrained(written.tokenizer_path)
    for row, ids in enumerate(rows_of(train)):
        new = ids[LENGTHS_OF_PROMPTS["train"][row] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        assert train.target_bytes[row] == len(text.encode())
        assert train.target_words[row] == len(text.split())
    assert meta.target_bytes["train"] == train.target_bytes.sum()
    assert meta.text_bytes["train"] == 1000 - 7 * len(train.piece) + train.target_bytes.sum()
    for split in ("validation", "test"):
        for key in ("tokens", "targets", "target_bytes", "target_words", "text_bytes"):
            assert getattr(meta, key)[split] == getattr(before, key)[split]
        assert rows_of(read_columns(written.split(split))) == rows_of(
            read_columns(TokenSet.load(source.tokens).split(split))
        )
    record = read_json(written.path / "transfer.json")
    assert record["targets"] == "teacher"
    assert record["rows"] == len(train.piece)
    assert record["new_tokens"] == meta.targets["train"]
    assert transfer_tokens(written.path, source.tokens) == written.path


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_run_that_was_cut_off_goes_on_to_the_same_text(
    source, tmp_path, monkeypatch, temperature
):
    options = OPTIONS.model_copy(update={"temperature": temperature})
    whole = run(source, tmp_path / "whole", tmp_path / "w1", options=options)
    made = []

    def stopping(*arguments, **options):
        for batch, found in real(*arguments, **options):
            if len(made) == stop_after:
                raise KeyboardInterrupt
            made.append(batch.number)
            yield batch, found

    real, stop_after = module.generate_batches, 2
    monkeypatch.setattr(module, "generate_batches", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "again", tmp_path / "w2", options=options)
    assert not (tmp_path / "again").exists()
    (directory,) = [path for path in (tmp_path / "w2" / "generate").iterdir() if path.is_dir()]
    assert len(list(directory.iterdir())) == 2
    # A file that is half there, as no atomic write leaves it, is no finished batch.
    (directory / "000001.json").write_text('{"rows": [')
    stop_after = None
    resumed = run(source, tmp_path / "again", tmp_path / "w2", options=options)
    assert made == [0, 1, 1, 2, 3]
    assert resumed.meta == whole.meta
    assert not directory.exists()


def test_all_batches_finished_needs_no_teacher(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", tmp_path / "work")
    monkeypatch.undo()
    monkeypatch.setattr(module, "load_teacher", lambda *_, **__: pytest.fail("teacher loaded"))
    run(source, tmp_path / "out", tmp_path / "work")


def test_a_teacher_that_ends_at_once_leaves_its_end_as_the_target(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "end_ids", lambda *_: list(range(64)))
    written = run(source, tmp_path / "out", tmp_path / "work")
    train = read_columns(written.split("train"))
    assert train.loss_mask.sum() == len(train.piece)
    record = read_json(written.path / "transfer.json")
    assert (record["empty"], record["unfinished"]) == (len(train.piece), 0)


def test_texts_that_were_stopped_are_counted_and_have_no_end(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "end_ids", lambda *_: [])
    written = run(source, tmp_path / "out", tmp_path / "work")
    record = read_json(written.path / "transfer.json")
    assert (record["empty"], record["unfinished"]) == (0, record["rows"])
    assert written.meta.cut_targets["train"] == record["rows"]
    assert record["new_tokens"] == 6 * record["rows"]


def test_a_task_without_prompts_is_refused(source, tmp_path):
    with pytest.raises(ConfigError, match=r"teachers\.t\.tokens\.targets: teacher does not fit"):
        run(source, tmp_path / "out", tmp_path / "work", tokens=source.root / "plain")


def test_the_corpuss_own_targets_are_a_word_and_nothing_else(source, tmp_path):
    keep_corpus(tmp_path / "transfer")
    assert [path.name for path in (tmp_path / "transfer").iterdir()] == ["transfer.json"]
    assert json.loads((tmp_path / "transfer" / "transfer.json").read_text()) == {
        "targets": "corpus"
    }
    assert transfer_tokens(tmp_path / "transfer", source.tokens) == source.tokens


def test_text_of_other_tokens_is_refused(source, written, tmp_path):
    with pytest.raises(IntegrityError, match=r"transfer\.json: missing"):
        transfer_tokens(tmp_path, source.tokens)
    with pytest.raises(IntegrityError, match=r"made of tokens .*run the stage that writes it"):
        transfer_tokens(written.path, source.root / "plain")
    write_json(tmp_path / "transfer.json", {"targets": "both"})
    with pytest.raises(IntegrityError, match="found no targets, expected corpus or teacher"):
        transfer_tokens(tmp_path, source.tokens)


def test_a_student_can_be_captured_for_on_the_teachers_text(source, written, tmp_path):
    shutil.copytree(written.path, tmp_path / "tokens")
    shutil.copytree(source.teacher, tmp_path / "teacher")
    captured = Captured(tmp_path, "prompt-target")
    signals = [signal("hidden", 1, "bfloat16"), signal("logits", None, "topk", k=8)]
    captured.capture(signals)
    train = [
        (int(start), int(length))
        for number in captured.reader.signal(signals[0].name).receipts
        for start, length in _rows(captured, number, signals[0].name)
    ]
    assert len(train) == written.meta.rows["train"]
    assert sum(length for _, length in train) == written.meta.tokens["train"]


def _rows(captured, number, name):
    segment = captured.reader.read_segment(number, [name])
    return zip(segment.offset, segment.length, strict=True)
