import pytest
from transformers import AutoTokenizer

from pipeline.corpus.tokens.tokenizer import (
    END_OF_TEXT,
    PAD,
    load_tokenizer,
    tokenizer_digest,
    train_tokenizer,
)
from pipeline.errors import ConfigError

TEXTS = [f"the cat number {i} sat on the mat and ate the rat" for i in range(50)]


@pytest.fixture
def trained():
    return train_tokenizer(TEXTS, vocab=300)


@pytest.mark.parametrize(
    "text", ["the cat", "", " two  spaces\n\ttab", "Ünïcode 漢字 \U0001f600", "\x00"]
)
def test_every_text_comes_back_between_its_marks(trained, text):
    ids = trained(text)["input_ids"]
    assert ids[0] == ids[-1] == trained.eos_token_id == trained.bos_token_id
    assert trained.decode(ids[1:-1], clean_up_tokenization_spaces=False) == text


def test_the_vocabulary_has_its_size_and_padding_its_own_id(trained):
    assert len(trained) == 300
    assert trained.convert_ids_to_tokens([0, 1]) == [END_OF_TEXT, PAD]
    assert trained.pad_token_id == 1


def test_training_twice_gives_one_digest_and_other_texts_another(trained):
    assert tokenizer_digest(train_tokenizer(iter(TEXTS), vocab=300)) == tokenizer_digest(trained)
    assert tokenizer_digest(train_tokenizer(TEXTS[:1], vocab=300)) != tokenizer_digest(trained)


def test_digest_survives_saving_and_use_but_not_another_special_token(trained, tmp_path):
    before = tokenizer_digest(trained)
    trained(TEXTS, padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(trained) == before
    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_digest(loaded) == before
    assert (
        AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0])["input_ids"]
        == trained(TEXTS[0])["input_ids"]
    )
    loaded.pad_token = END_OF_TEXT
    assert tokenizer_digest(loaded) != before


def test_a_missing_pad_token_becomes_the_end_of_text(trained, tmp_path):
    trained.pad_token = None
    trained.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == END_OF_TEXT


def test_no_room_and_no_tokenizer_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab: found 257, expected at least 258"):
        train_tokenizer(TEXTS, vocab=257)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)


def test_code_of_the_tokenizers_own_is_not_run_unasked(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("folder", "vocab"),
    [("stories260K", 512), ("tokenizer-gpt2", 50257), ("tokenizer-bert-base-uncased", 30522)],
)
def test_published_tokenizers_load_and_pad(real_models, folder, vocab):
    tokenizer = load_tokenizer(real_models / folder)
    assert len(tokenizer) == vocab
    assert tokenizer(["a", "a longer text"], padding=True)["input_ids"]


@pytest.mark.parametrize("revision", [None, "main", "0" * 39])
def test_code_that_no_commit_pins_is_not_even_looked_for(revision):
    with pytest.raises(ConfigError, match=r"somebody/model: revision is .*expected a commit of 40"):
        load_tokenizer("somebody/model", revision=revision, trust_remote_code=True)
