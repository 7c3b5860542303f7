"""Generated text: of the first rows alone, each as if it ran by itself, ended by either end."""

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.errors import IntegrityError
from pipeline.evaluate.generated import chosen_rows, generate_rows
from pipeline.evaluate.options import GenerateOptions
from tests.tiny import tiny_model

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
