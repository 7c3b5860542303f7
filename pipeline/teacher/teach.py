"""A teacher: referenced as it is, fine-tuned on the corpus, or built from scratch on it.

A teacher built here exists so that the whole pipeline runs without a download; its training is
plain `Trainer`.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    set_seed,
)
from transformers.utils.hub import cached_file

from pipeline.axes import TRAIN
from pipeline.corpus.tokens import TokenMeta, TokenSet
from pipeline.errors import ConfigError, IncompatibleError
from pipeline.provenance import fingerprint
from pipeline.taps.anatomy import find_anatomy
from pipeline.teacher.load import load_config, load_pretrained
from pipeline.teacher.reference import TeacherReference
from pipeline.teacher.weights import weights_sha256
from pipeline.training.checkpoints import CompletionMarker, Progress, last_complete_checkpoint
from pipeline.training.options import TrainOptions, training_arguments

logger = logging.getLogger(__name__)
IGNORED = -100


def teach(
    *,
    name: str,
    tokens: Path,
    output: Path,
    work: Path,
    scratch: Mapping[str, Any] | None,
    path: str | None,
    revision: str | None,
    trust_remote_code: bool,
    fit: TrainOptions | None,
    device: str,
) -> TeacherReference:
    """Write a teacher's reference, and its weights only if they were trained here.

    Args:
        name: The teacher's name.
        tokens: Directory of the tokenised corpus.
        output: The teacher's directory.
        work: Directory for checkpoints.
        scratch: Hugging Face configuration of a new model, `model_type` among its keys.
        path: Directory or hub id of a pretrained one instead.
        revision: Revision of a hub id.
        trust_remote_code: Run code from the model's repository.
        fit: How to train; needed for `scratch`, fine-tuning for `path`, None to leave weights
            alone.
        device: A torch device.

    Raises:
        ConfigError: If the model cannot be found or the configuration is not one.
        IncompatibleError: If model and tokenizer do not fit, or the rows are longer than its
            context.
    """
    token_set = TokenSet.load(tokens)
    meta = token_set.meta
    if path is not None and fit is None:
        config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
        model = load_pretrained(
            path,
            task=meta.task,
            revision=revision,
            trust_remote_code=trust_remote_code,
            classes=meta.classes,
        )
        _check_fit(model, meta, name)
        if meta.task == "classification":
            _refuse_untrained_head(config, meta, name)
        directory = _directory(path, revision)
        location = str(directory.resolve()) if Path(path).is_dir() else path
        reference = TeacherReference(
            location,
            revision,
            trust_remote_code,
            weights_sha256(directory),
            find_anatomy(model).depth,
            model.config.to_dict(),
            trained=False,
        )
        reference.save(output)
        return reference
    if fit is None:
        raise ConfigError(f"teachers.{name}.fit: missing; a teacher from scratch must be trained")
    with torch.random.fork_rng():
        set_seed(fit.seed)
        model = (
            _scratch(scratch, meta, name)
            if scratch is not None
            else load_pretrained(
                str(path),
                task=meta.task,
                revision=revision,
                trust_remote_code=trust_remote_code,
                classes=meta.classes,
            )
        )
    _check_fit(model, meta, name)
    identity = fingerprint(
        {
            "scratch": dict(scratch or {}),
            "path": path,
            "revision": revision,
            "tokens": meta.digest,
            "fit": fit.model_dump(mode="json"),
        }
    )
    _fit(name, model, token_set, fit, work / "teach" / f"{name}-{identity[:16]}", device)
    staging = output / ".model.writing"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(tokens / "tokenizer").save_pretrained(staging)
    shutil.rmtree(output / "model", ignore_errors=True)
    staging.rename(output / "model")
    reference = TeacherReference(
        "model",
        None,
        trust_remote_code,
        weights_sha256(output / "model"),
        find_anatomy(model).depth,
        model.config.to_dict(),
        trained=True,
    )
    reference.save(output)
    shutil.rmtree(work / "teach" / f"{name}-{identity[:16]}", ignore_errors=True)
    return reference


def _scratch(scratch: Mapping[str, Any], meta: TokenMeta, name: str) -> PreTrainedModel:
    tokenizer_ids = {"pad_token_id": meta.pad_id}
    known = {key: value for key, value in scratch.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(
            scratch["model_type"],
            vocab_size=meta.vocab,
            **{"bos_token_id": None, "eos_token_id": None, **tokenizer_ids, **known},
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"teachers.{name}.model.scratch: no configuration ({str(error).splitlines()[0]}); "
            f"expected "
            "model_type and its Hugging Face keys"
        ) from error
    plain = type(config)().to_dict()
    for key in known:
        if key not in plain and key not in config.attribute_map:
            raise ConfigError(
                f"teachers.{name}.model.scratch.{key}: {type(config).__name__} has no such key; "
                f"remove it"
            )
    if meta.task == "classification":
        config.num_labels = len(meta.classes)
        config.id2label = dict(enumerate(meta.classes))
        config.label2id = {label: i for i, label in enumerate(meta.classes)}
        return AutoModelForSequenceClassification.from_config(config)
    return AutoModelForCausalLM.from_config(config)


def _directory(path: str, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    found = cached_file(path, "config.json", revision=revision)
    assert found is not None
    return Path(found).parent


def _refuse_untrained_head(config: Mapping[str, Any], meta: TokenMeta, name: str) -> None:
    architectures = config.get("architectures") or [""]
    if not architectures[0].endswith("ForSequenceClassification"):
        raise IncompatibleError(
            f"teachers.{name}: {architectures[0] or 'the model'} has no trained classification "
            f"head; add a "
            "fit section to fine-tune it on the task"
        )
    labels = len(config.get("id2label") or {})
    if labels != len(meta.classes):
        raise IncompatibleError(
            f"teachers.{name}: the model has {labels} classes, the corpus {len(meta.classes)} "
            f"({', '.join(meta.classes)}); choose a teacher of this task or add a fit section"
        )


def _check_fit(model: PreTrainedModel, meta: TokenMeta, name: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportIndexIssue]
    if rows < meta.vocab:
        raise IncompatibleError(
            f"teachers.{name}: the model has {rows} embeddings, the tokenizer {meta.vocab} ids; "
            f"use the "
            "tokenizer the model was trained with"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < meta.max_length:
        raise IncompatibleError(
            f"teachers.{name}: the model has a context of {positions} tokens, "
            f"corpus.tokens.max_length is "
            f"{meta.max_length}; lower max_length"
        )


class PaddedRows:
    """Collates token rows for plain training: right-padded, labels where the loss mask is."""

    def __init__(self, meta: TokenMeta) -> None:
        self._meta = meta

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the padded batch."""
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
        batch = {
            "input_ids": np.full(shape, self._meta.pad_id, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            **{column: np.zeros(shape, dtype=np.int64) for column in self._meta.columns},
        }
        labels = np.full(shape, IGNORED, dtype=np.int64)
        for i, row in enumerate(rows):
            ids = np.asarray(row["input_ids"])
            batch["input_ids"][i, : len(ids)] = ids
            batch["attention_mask"][i, : len(ids)] = 1
            for column in self._meta.columns:
                batch[column][i, : len(ids)] = row[column]
            labels[i, : len(ids)] = np.where(row["loss_mask"], ids, IGNORED)
        if self._meta.task == "classification":
            labels = np.asarray([row["label"] for row in rows], dtype=np.int64)
        else:
            batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return {key: torch.from_numpy(value) for key, value in {**batch, "labels": labels}.items()}


def _fit(
    name: str,
    model: PreTrainedModel,
    token_set: TokenSet,
    fit: TrainOptions,
    directory: Path,
    device: str,
) -> None:
    trainer = Trainer(
        model=model,
        args=training_arguments(fit, directory, device),
        train_dataset=token_set.split(TRAIN).with_format(None),
        data_collator=PaddedRows(token_set.meta),
        callbacks=[CompletionMarker(), Progress(f"teach {name}")],
    )
    trainer.remove_callback(PrinterCallback)
    resumed = last_complete_checkpoint(directory)
    if resumed is not None:
        logger.info("%s: going on from %s", name, resumed)
    trainer.train(resume_from_checkpoint=resumed)
