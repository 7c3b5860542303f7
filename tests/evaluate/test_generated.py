"""Generated text: of the first rows alone, each as if it ran by itself, ended by either end."""

import json
from copy import deepcopy

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.sources.table import TableSource
from pipeline.corpus.text.examples import SPLITS
from pipeline.corpus.text.prepare import prepare_corpus
from pipeline.corpus.tokens.tokenize import tokenize_corpus
from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.errors import IntegrityError
from pipeline.evaluate.generated import answer, chosen_rows, generate_rows
from pipeline.evaluate.options import GenerateOptions
from pipeline.evaluate.predictions import score_rows
from pipeline.scores.metric import values
from tests.tiny import tiny_model
from tests.vocabularies import KINDS, write_tokenizer

CPU = torch.device("cpu")
VOCAB = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{number}": number for number in range(3, 64)}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(path)
    return path


@pytest.fixture
def prepare_pairs(tmp_path):
    """Prepare rows of text and target, the same in every split; returns the corpus."""

    def run(pairs):
        for name in SPLITS:
            lines = [json.dumps({"text": text, "target": target}) for text, target in pairs]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        source = TableSource(files={name: f"{name}.jsonl" for name in SPLITS}, target="target")
        prepare_corpus(
            source=source,
            task="prompt-target",
            classes=None,
            seed=0,
            validation_share=0.1,
            test_share=0.1,
            output=tmp_path / "text",
            root=tmp_path,
        )
        return tmp_path / "text"

    return run


def split(rows):
    return datasets.Dataset.from_dict(
        {
            "input_ids": [[*prompt, *target, 2] for prompt, target in rows],
            "loss_mask": [[False] * len(p) + [True] * (len(t) + 1) for p, t in rows],
            "prompt_tokens": [len(prompt) for prompt, _ in rows],
            "references": [[f"w{one}" for one in target] for _, target in rows],
        }
    )


ROWS = [([1, 5, 9], [7]), ([1, 30], [8, 9]), ([1, 40, 41, 42, 43], [3]), ([1, 6], [60])]


def generate(tokenizer, prompts, **options):
    model = tiny_model("llama")
    found = generate_rows(
        model,
        split(prompts),
        tokenizer=tokenizer,
        pad_id=0,
        options=GenerateOptions(max_new_tokens=5, **options),
        device=CPU,
    )
    return list(found.values())


def test_each_row_is_written_as_if_alone_and_in_its_place(tokenizer):
    found = generate(tokenizer, ROWS, batch_size=3)
    alone = [generate(tokenizer, [row])[0] for row in ROWS]
    assert found == alone
    assert [row["prompt"] for row in found] == ["w5 w9", "w30", "w40 w41 w42 w43", "w6"]
    assert found[1]["references"] == ["w8", "w9"]
    assert len({row["text"] for row in found}) > 1
    assert all(1 <= len(row["text"].split()) <= 5 for row in found)


def test_some_rows_are_written_each_as_among_all(tokenizer):
    some, every = generate(tokenizer, ROWS, rows=2), generate(tokenizer, ROWS)
    assert len(some) == 2
    assert [row for row in every if row in some] == some


@pytest.mark.parametrize(("rows", "wanted"), [(5, 3), (3, 5), (1000, 20), (4, 0)])
def test_the_rows_are_drawn_from_all_and_stand_in_order(rows, wanted):
    places = chosen_rows(rows, wanted)
    assert places == sorted(set(places))
    assert len(places) == min(rows, wanted)
    assert set(places) <= set(range(rows))
    assert places == chosen_rows(rows, wanted)
    if rows == 1000:
        assert max(places) > 500


def test_the_target_is_not_part_of_the_prompt(tokenizer):
    other = [(prompt, [50, 51, 52]) for prompt, _ in ROWS]
    texts = [[row["text"] for row in generate(tokenizer, rows)] for rows in (ROWS, other)]
    assert texts[0] == texts[1]


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(IntegrityError, match="no whole tokenizer"):
        generate(tmp_path, ROWS)


TARGETS = [
    "The people <sep> know it all",
    "their way <sep> is very good",
    "ﬁve Ｗords and 3.5 , more",
]
PERFECT = {"bleu": 100, "chrf": 100, "exact_match": 1, "cer": 0, "wer": 0}


def unlike(kind, path):
    """Tokenizers that lose something of a text, each another thing."""
    words = write_tokenizer(kind.split("+")[0], path, added=("<sep>",))
    words.eos_token = words.eos_token or words.sep_token or words.pad_token
    words.pad_token = words.pad_token or words.eos_token
    normal = words.backend_tokenizer.normalizer
    if kind.endswith("+nfkc"):
        own = [normalizers.NFKC(), *([normal] if normal else [])]
        words.backend_tokenizer.normalizer = normalizers.Sequence(own)
    if kind.endswith("+cleaned"):
        words.clean_up_tokenization_spaces = True
    return words


@pytest.mark.parametrize("template", ["{text}\n{target}", "{text}: {target}"])
@pytest.mark.parametrize("kind", [*KINDS, "bytes+nfkc", "unigram+nfkc", "bytes+cleaned"])
def test_exactly_the_targets_ids_score_perfectly(tmp_path, prepare_pairs, kind, template):
    corpus = prepare_pairs([(f"say {place}", text) for place, text in enumerate(TARGETS)])
    words = unlike(kind, tmp_path / "words")
    tokenize_corpus(
        corpus=corpus,
        tokenizer=deepcopy(words),
        max_length=128,
        overlong=None,
        output=tmp_path / "tokens",
        template=template,
    )
    rows = TokenSet.load(tmp_path / "tokens").split("test")
    given = [
        {"row": place, "source_row": place, "nats": 1.0, "targets": 1}
        | answer(words, row["input_ids"][row["prompt_tokens"] : -1], row["references"])
        for place, row in enumerate(rows)
    ]
    _, scored = score_rows(given, "prompt-target")
    found = values(scored.metrics, len(given))
    assert {name: found[name] for name in PERFECT} == pytest.approx(PERFECT)
    assert [row["references"] for row in given] == [[target] for target in TARGETS]
    assert sum("<sep>" in row["text"] for row in given) == 2


def test_a_target_without_its_special_token_is_wrong(tmp_path):
    words = unlike("bytes", tmp_path / "words")
    without = words("The people know it all", add_special_tokens=False)["input_ids"]
    row = answer(words, without, [TARGETS[0]])
    assert row == {"text": "The people know it all", "references": [TARGETS[0]]}
