"""Measures one model: its quality on the splits and its cost.

No teacher is loaded; only the text that it generated is compared. Agreement with a teacher's
logits needs the store and is measured in `agreement`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.corpus.text.examples import Split
from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.errors import ConfigError, IncompatibleError
from pipeline.evaluate.answers import predict_rows
from pipeline.evaluate.chance import score_at_chance
from pipeline.evaluate.cost import SECONDS, cost_metrics, measure_speed
from pipeline.evaluate.generated import generate_rows, tokenizer_for
from pipeline.evaluate.options import GenerateOptions, IntervalOptions
from pipeline.evaluate.predictions import Identity, Row, identity, score_rows
from pipeline.evaluate.significance import bootstrap_intervals
from pipeline.scores.metric import values
from pipeline.scores.registry import headline, metrics_of, reported, scores_of
from pipeline.scores.text import GeneratedText
from pipeline.scores.tokenization import AUTO
from pipeline.tasks import generates, models_language

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The measurements of one model.

    Attributes:
        metrics: The content of the model's metrics file.
        predictions: Its prediction for each row of the test split.
    """

    metrics: dict[str, Any]
    predictions: list[Row]


def evaluate_model(
    model: PreTrainedModel,
    tokens: TokenSet,
    *,
    batch_tokens: int,
    splits: Sequence[Split] = ("validation", "test"),
    device: torch.device,
    directory: Path | None = None,
    score: str | None = None,
    generate: GenerateOptions | None = None,
    teacher_texts: Mapping[Identity, str] | None = None,
    intervals: IntervalOptions | None = None,
    tokenizer: str = AUTO,
    is_timed: bool = True,
    timing_batch: int = 8,
    timing_length: int = 128,
    timing_repeats: int = 5,
) -> Evaluation:
    """Measure a model's quality and cost.

    The model is moved to `device` and left in evaluation mode.

    Args:
        model: A causal language model or a sequence model, as the tokens' task says.
        tokens: The tokenized corpus.
        batch_tokens: Largest rows times longest row of a batch.
        splits: Splits to score, by name.
        device: Where to run.
        directory: The model's Hugging Face directory, for its bytes on disk.
        score: The score or GLUE task to judge by; None for the task's default.
        generate: How to generate text, for tasks with references; None to generate none.
        teacher_texts: Texts that the teacher generated, by `row` and `source_row`; None to skip the
            comparison.
        intervals: How to compute confidence intervals of the test scores; None for none.
        tokenizer: How BLEU splits text into words, in sacrebleu's names.
        is_timed: Whether forward passes are timed.
        timing_batch: Sequences in the batch that is timed.
        timing_length: Tokens of a timed sequence, cut to the corpus's longest.
        timing_repeats: Timed passes; the median counts.

    Returns:
        As metrics `task`, `classes` where there are any, `vocab` of a language model, `score`,
        `lower_is_better` and `test_score`; `test_chance`, what the best constant answer scores;
        `<split>_<metric>` for each that `scores.reported` names and the rows allow,
        those of generated text for test only, with `generated_rows`, `signatures` and
        `against_teacher`; `test_intervals`; `is_constant` if every test row gets the same answer;
        and what `cost_metrics` returns.

    Raises:
        ConfigError: If a split has nothing to score, or the task has no such score.
        IncompatibleError: If the model's vocabulary is smaller than the tokens'.
        IntegrityError: If the model's output is not finite.
    """
    meta = tokens.meta
    judged_by = headline(meta.task, score)
    judge = scores_of(meta.task)[judged_by]
    vocab = model.config.get_text_config().vocab_size
    if vocab < meta.vocab:
        raise IncompatibleError(
            f"model: found a vocabulary of {vocab}, expected at least the tokens' {meta.vocab}; "
            "evaluate the model on tokens of its own tokenizer"
        )
    if not hasattr(model, "hf_device_map"):  # a model spread over devices stays there
        model.to(device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    model.eval()
    metrics: dict[str, Any] = {
        "task": meta.task,
        "score": judged_by,
        "lower_is_better": judge.lower_is_better,
    }
    if models_language(meta.task):
        metrics["vocab"] = meta.vocab
    if meta.classes:
        metrics["classes"] = len(meta.classes)
    # Check everything that is read later before anything runs.
    for split in splits:
        if not len(tokens.split(split)):
            raise ConfigError(
                f"{split}: found 0 rows, expected at least 1; name more text for it in "
                "corpus.source, or raise its share"
            )
    is_generating = generate is not None and generate.rows > 0 and generates(meta.task)
    if is_generating:
        tokenizer_for(tokens.split("test"), tokens.tokenizer_path)
    elif judge.answers is GeneratedText:
        raise ConfigError(
            f"evaluate.score: found {judged_by}, of text that is generated for no row; let "
            "evaluate.generate.rows be more than 0, or choose a score of likelihood"
        )
    predictions: list[Row] = []
    for split in splits:
        rows = predict_rows(model, tokens, split, batch_tokens=batch_tokens, device=device)
        if split == "test":
            predictions = rows
            if generate is not None and is_generating:
                written = generate_rows(
                    model,
                    tokens.split(split),
                    tokenizer=tokens.tokenizer_path,
                    pad_id=meta.pad_id,
                    options=generate,
                    device=device,
                )
                for place, text in written.items():
                    rows[place].update(text)
                metrics["generated_rows"] = len(written)
        classes = len(meta.classes) or None
        metrics |= _scores(rows, split, meta.task, judged_by, classes, intervals, tokenizer)
        logger.info("%s: %s", split, _shown(metrics, split))
    if predictions:
        at_chance = score_at_chance(
            predictions, meta.task, judged_by, classes=len(meta.classes) or None, vocab=meta.vocab
        )
        if at_chance is not None:
            metrics["test_chance"] = at_chance
    if is_constant(predictions):
        metrics["is_constant"] = True
        logger.warning("the same answer to every test row: it has learnt nothing, or not enough")
    if teacher_texts is not None:
        metrics |= _against(predictions, teacher_texts, tokenizer)
    timing = None
    if is_timed:
        logger.info("timing forward passes, for up to %d s", 2 * SECONDS)
        timing = measure_speed(
            model,
            device=device,
            batch=timing_batch,
            length=min(timing_length, meta.max_length),
            repeats=timing_repeats,
        )
    metrics |= cost_metrics(model, directory=directory, timing=timing)
    return Evaluation(metrics, predictions)


def _scores(
    rows: list[Row],
    split: Split,
    task: str,
    judged_by: str,
    classes: int | None,
    intervals: IntervalOptions | None,
    tokenizer: str,
) -> dict[str, Any]:
    """Return the reported scores of a split; for the test split also headline and intervals."""
    found: dict[str, float] = {}
    spread: dict[str, list[float]] = {}
    signatures: dict[str, str] = {}
    names = reported(task, judged_by)
    for scored in score_rows(rows, task, classes=classes, tokenizer=tokenizer):
        kept = {name: metric for name, metric in scored.metrics.items() if name in names}
        found |= values(kept, len(scored.rows))
        signatures |= scored.signatures
        if split == "test" and intervals is not None:
            ends = bootstrap_intervals(kept, len(scored.rows), intervals)
            spread |= {name: list(both) for name, both in ends.items()}
    metrics: dict[str, Any] = {f"{split}_{name}": value for name, value in found.items()}
    if split != "test":
        return metrics
    if judged_by not in found:
        raise ConfigError(
            f"evaluate.score: found {judged_by}, the test rows have {', '.join(found)}; choose one "
            "of them"
        )
    metrics["test_score"] = found[judged_by]
    if signatures:
        metrics["signatures"] = signatures
    if intervals is not None:
        metrics["test_intervals"] = spread
    return metrics


def _against(
    predictions: Sequence[Row], teacher_texts: Mapping[Identity, str], tokenizer: str
) -> dict[str, Any]:
    """Return scores of the generated text with the teacher's text as the only reference."""
    both = [row for row in predictions if "text" in row and identity(row) in teacher_texts]
    if not both:
        return {}
    answers = GeneratedText(
        [row["text"] for row in both],
        [[teacher_texts[identity(row)]] for row in both],
        tokenizer,
        [row["references"] for row in both],
    )
    return {"against_teacher": values(metrics_of(answers), len(both))}


def is_constant(rows: Sequence[Row]) -> bool:
    """Tell whether several rows all got the same answer; likelihoods are not answers."""
    answers = [
        row.get("text", row.get("predicted", [p > 0.5 for p in row.get("probabilities", ())]))
        for row in rows
        if row.keys() & {"text", "predicted", "probabilities"}
    ]
    return len(answers) > 1 and all(answer == answers[0] for answer in answers)


def _shown(metrics: Mapping[str, Any], split: Split) -> str:
    """Return a split's scores as one log line."""
    prefix = f"{split}_"
    return ", ".join(
        f"{name.removeprefix(prefix)} {value:.4g}"
        for name, value in metrics.items()
        if name.startswith(prefix) and isinstance(value, float)
    )
