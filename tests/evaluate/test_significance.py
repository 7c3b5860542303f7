"""Paired tests: equal models do not differ, better ones do, and rows join by identity."""

import random

import numpy as np
import pytest

from pipeline.errors import ConfigError, IncompatibleError, IntegrityError
from pipeline.evaluate.significance import compare_predictions, compare_scores

WORDS = ["red", "green", "blue", "small", "large", "house", "tree", "river", "stone", "bird"]


def classified(share, *, rows=120, seed=0):
    draw = np.random.default_rng(seed)
    labels = np.random.default_rng(99).integers(2, size=rows)
    right = draw.random(rows) < share
    return [
        {
            "row": row,
            "source_row": 7 * row,
            "label": int(labels[row]),
            "predicted": int(labels[row] if right[row] else 1 - labels[row]),
            "probability": 0.8,
        }
        for row in range(rows)
    ]


def written(errors, *, rows=20, generated=20, seed=0):
    draw, truth = random.Random(seed), random.Random(99)
    found = []
    for row in range(rows):
        words = truth.choices(WORDS, k=8)
        text = [draw.choice(WORDS) if draw.random() < errors else word for word in words]
        one = {"row": row, "source_row": row, "nats": 9.0 + errors, "targets": 8, "words": 8}
        one["bytes"] = len(" ".join(words))
        if row < generated:
            one |= {"prompt": "p", "references": [" ".join(words)], "text": " ".join(text)}
        found.append(one)
    return found


def test_a_model_does_not_differ_from_itself():
    rows = classified(0.8)
    found = compare_predictions(rows, rows, "classification", "accuracy", 200)
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert found.rows == 120


def test_a_clearly_better_model_is_found():
    found = compare_predictions(
        classified(0.95), classified(0.6, seed=1), "classification", "accuracy"
    )
    assert found.difference == pytest.approx(found.a - found.b)
    assert 0 < found.low < found.difference < found.high
    assert found.p_value < 0.01


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "ece"])
def test_which_model_comes_first_changes_the_sign_alone(metric):
    a, b = classified(0.8), classified(0.75, seed=1)
    one = compare_predictions(a, b, "classification", metric, 300)
    other = compare_predictions(b, a, "classification", metric, 300)
    assert other.difference == pytest.approx(-one.difference)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low))
    assert other.p_value == one.p_value


def test_equal_models_are_called_different_as_rarely_as_p_says():
    small = [
        compare_predictions(
            classified(0.7, rows=60, seed=2 * seed),
            classified(0.7, rows=60, seed=2 * seed + 1),
            "classification",
            "accuracy",
            100,
            seed,
        ).p_value
        <= 0.1
        for seed in range(100)
    ]
    assert sum(small) <= 18


def test_rows_join_by_identity_and_not_by_order():
    a, b = classified(0.9), classified(0.7, seed=1)
    shuffled = random.Random(0).sample(b, len(b))
    want = compare_predictions(a, b, "classification", "f1", 100)
    assert compare_predictions(a, shuffled, "classification", "f1", 100) == want


def test_other_rows_are_refused():
    a = classified(0.9)
    moved = [{**row, "source_row": row["source_row"] + 1} for row in a]
    for other in (a[:-1], moved, []):
        with pytest.raises(IncompatibleError, match=r"found 120 rows and .* the same rows of one"):
            compare_predictions(a, other, "classification", "accuracy", 10)


def pieces(counts, nats):
    """Texts of 120 bytes in so many pieces each, as a tokenizer of its own cuts them."""
    found = []
    for text, count in enumerate(counts):
        for _ in range(count):
            one = {"row": len(found), "source_row": text, "nats": nats * (text + 1) / count}
            found.append(
                one | {"targets": 12 // count, "words": 24 // count, "bytes": 120 // count}
            )
    return found


def test_texts_that_tokenizers_part_differently_compare_as_wholes():
    first, second = pieces([1, 2, 3, 1], 50.0), pieces([2, 1, 1, 4], 60.0)
    found = compare_predictions(first, second, "causal-lm", "bits_per_byte", 50)
    assert found.rows == 4
    assert found.a == pytest.approx(50 * 10 / (4 * 120) / np.log(2))
    assert found.b == pytest.approx(60 * 10 / (4 * 120) / np.log(2))
    with pytest.raises(IncompatibleError, match="expected the same rows of one test split"):
        compare_predictions(first, second[:2], "causal-lm", "bits_per_byte", 50)


def test_a_row_that_stands_twice_is_refused():
    a = classified(0.9)
    with pytest.raises(IntegrityError, match="found 121 lines for 120 rows, expected one a row"):
        compare_predictions(a, [*a, a[0]], "classification", "accuracy", 10)


def test_another_question_to_a_row_is_refused():
    a = classified(0.9)
    b = [{**row, "label": 1 - row["label"]} for row in a]
    with pytest.raises(IncompatibleError, match="label of row 0 differs, expected the same"):
        compare_predictions(a, b, "classification", "accuracy", 10)


def test_text_is_compared_where_both_wrote_some():
    found = compare_predictions(
        written(0.1, generated=15), written(0.7, generated=15), "prompt-target", "bleu", 200
    )
    assert found.rows == 15
    assert found.difference > 10
    assert found.p_value < 0.05
    assert (
        compare_predictions(written(0.1), written(0.7), "prompt-target", "perplexity", 50).rows
        == 20
    )


def test_text_of_other_rows_is_refused():
    with pytest.raises(IncompatibleError, match="found 20 generated rows and 10, expected the"):
        compare_predictions(written(0.1), written(0.2, generated=10), "prompt-target", "chrf", 10)


def test_all_scores_are_those_that_both_have():
    def names(a, b):
        return {found.metric for found in compare_scores(a, b, "prompt-target", None, 10)}

    likelihood = {
        "perplexity",
        "nats_per_token",
        "perplexity_per_word",
        "perplexity_per_byte",
        "bits_per_byte",
    }
    without_text = written(0.2, generated=0)
    assert names(written(0.1), without_text) == likelihood
    assert names(written(0.1), written(0.2)) > likelihood | {"bleu", "cer"}
    other_tokens = [{**row, "targets": 5} for row in without_text]
    assert names(without_text, other_tokens) == likelihood - {"perplexity", "nats_per_token"}


def test_a_score_a_token_is_refused_where_tokens_differ():
    a = written(0.1)
    b = [{**row, "targets": 5} for row in a]
    with pytest.raises(IncompatibleError, match="compare perplexity_per_byte"):
        compare_predictions(a, b, "prompt-target", "perplexity", 10)
    assert compare_predictions(a, b, "prompt-target", "bits_per_byte", 10).p_value == 1


def test_a_score_that_the_rows_have_not_is_refused_with_those_they_have():
    rows = classified(0.9)
    with pytest.raises(ConfigError, match="found 'bleu', both models have accuracy, f1"):
        compare_predictions(rows, rows, "classification", "bleu", 10)
