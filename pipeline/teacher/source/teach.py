"""Prepare a teacher: reference it unchanged, fine-tune it, or train it from scratch.

Training uses `Trainer`. A teacher from scratch lets the complete pipeline run without a download.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils.hub import cached_file

from pipeline.axes import TRAIN
from pipeline.corpus.tokens.tokenizer import check_same_tokenizer
from pipeline.corpus.tokens.tokens import TokenMeta, TokenSet
from pipeline.errors import ConfigError, IncompatibleError, in_short
from pipeline.provenance import fingerprint, needing_room, replace_directory
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.configuration import auto_class, text_part
from pipeline.taps.inputs import model_columns
from pipeline.taps.row_length import require_room
from pipeline.tasks import models_language, outputs_of
from pipeline.teacher.source.load import load_config, load_pretrained
from pipeline.teacher.source.quantization import (
    Quantization,
    check_quantization,
    check_stored_quantization,
)
from pipeline.teacher.source.reference import TeacherReference, weights_sha256
from pipeline.teacher.source.scratch import scratch_config
from pipeline.training.arguments import training_arguments
from pipeline.training.both_versions import write_for_both
from pipeline.training.checkpoints import (
    checkpoint_lock,
    last_complete_checkpoint,
    remove_checkpoints,
)
from pipeline.training.generators import forked_generators
from pipeline.training.options import TrainOptions, check_options
from pipeline.training.own_code import code_sha256, is_elsewhere, own_code
from pipeline.training.watched import WatchedTrainer

logger = logging.getLogger(__name__)
IGNORED = -100
"""Label that the loss ignores."""


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
    quantization: Quantization | None = None,
    before_commit: Callable[[], None] = lambda: None,
) -> TeacherReference:
    """Write a teacher's reference, and its weights if they are trained here.

    Args:
        name: The teacher's name.
        tokens: Directory of the tokenised corpus.
        output: The teacher's directory.
        work: Directory for checkpoints.
        scratch: Hugging Face configuration of a new model, including `model_type`.
        path: Directory or hub id of a pretrained model instead.
        revision: Revision of a hub id.
        trust_remote_code: Run code from the model's repository.
        fit: Training options: required for `scratch`, fine-tuning for `path`; None to use the
            weights unchanged.
        device: A torch device.
        quantization: How later stages quantise the weights of a pretrained model without `fit`.
        before_commit: Called before the teacher is written; if it raises, a previous teacher and
            the checkpoints stay.

    Raises:
        ConfigError: If the model cannot be found, its configuration is invalid, or it cannot be
            quantised, or cannot be trained with these options on this device.
        IncompatibleError: If model and tokenizer do not match, or rows are longer than its context.
    """
    token_set = TokenSet.load(tokens)
    meta = token_set.meta
    if fit is not None:
        token_set.check_tokenizer()
    if path is None and fit is None:
        raise ConfigError(f"teachers.{name}.fit: missing; a teacher from scratch must be trained")
    key, is_trained = f"teachers.{name}", fit is not None
    if fit is not None:
        check_options(fit, device, key=f"{key}.fit")
    check_quantization(quantization, key=key, path=path, is_trained=is_trained)
    if path is not None:
        _check_code(path, revision, name, is_trusted=trust_remote_code)
        config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
        if revision is None and not Path(path).is_dir():
            raise ConfigError(
                f"teachers.{name}.model.revision: missing; {path} is a hub id, whose weights may "
                "change: pin a revision"
            )
        check_stored_quantization(config, quantization, key=key, is_trained=is_trained)
        check_same_tokenizer(
            path,
            revision,
            token_set.tokenizer_path,
            key=f"{key}.model.path",
            remedy=f"run decant tokenize {name} if the model was replaced; to train a model on "
            "another tokenizer's ids, use a copy of it without tokenizer files",
            trust_remote_code=trust_remote_code,
        )
        if not models_language(meta.task) and fit is None:
            _refuse_untrained_head(config, meta, name)
        model = load_pretrained(
            path,
            task=meta.task,
            revision=revision,
            trust_remote_code=trust_remote_code,
            classes=meta.classes,
            new_head=fit is not None,
            seed=0 if fit is None else fit.seed,
            # Sizes and names can be read without loading weights.
            options={"device_map": {"": "meta"}} if fit is None else None,
        )
    else:
        model = _scratch(scratch or {}, meta, name, seed=fit.seed if fit else 0)
    _check_fit(model, meta, name)
    if not models_language(meta.task):
        # A decoder used as classifier needs the padding id of the store's batches.
        model.config.pad_token_id = meta.pad_id
    checkpoints: Path | None = None
    if fit is None:
        before_commit()
        directory = _directory(str(path), revision)
        location = str(directory.resolve()) if Path(str(path)).is_dir() else str(path)
    else:
        identity = fingerprint(
            {
                "scratch": dict(scratch or {}),
                "path": path,
                "revision": revision,
                "weights": weights_sha256(Path(path)) if path and Path(path).is_dir() else None,
                "tokens": meta.digest,
                "fit": fit.model_dump(mode="json"),
            }
        )
        checkpoints = work / "teach" / f"{name}-{identity[:16]}"
        with checkpoint_lock(checkpoints):
            _fit(name, model, token_set, fit, checkpoints, device)
        before_commit()
        directory, location = output / "model", "model"
        _save(model, token_set.tokenizer_path, directory)
    if fit is not None:
        revision = None
    elif trust_remote_code and Path(str(path)).is_dir():
        revision = code_sha256(directory)
    reference = TeacherReference(
        location,
        revision,
        trust_remote_code,
        weights_sha256(directory),
        find_anatomy(model).depth,
        _plain_config(model),
        trained=fit is not None,
        made_of=None
        if fit is None
        else {"tokenizer": meta.tokenizer_digest, "tokens": meta.digest},
        quantization=None if quantization is None else asdict(quantization),
    )
    reference.save(output)
    if checkpoints is not None:
        remove_checkpoints(checkpoints)
    return reference


def _check_code(path: str, revision: str | None, name: str, *, is_trusted: bool) -> None:
    """Refuse code that is not trusted or not pinned by a revision, before any of it can run."""
    sources = own_code(path, revision)
    if sources and not is_trusted:
        raise ConfigError(
            f"teachers.{name}.model.trust_remote_code: false, and teacher {path}: brings code of "
            f"its own ({sources[0]}); set model.trust_remote_code: true and pin model.revision (a "
            "directory needs none) if you trust it, or remove auto_map from a copy of its "
            "config.json to run transformers' own model"
        )
    for source in sources:
        if is_elsewhere(source):
            raise ConfigError(
                f"teachers.{name}.model.path: code of {path} is in another repository ({source}), "
                "which model.revision does not pin; copy it into a directory of your own with "
                "the weights"
            )


def _plain_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return the configuration as JSON values, without its path and transformers version."""
    # Of a multimodal model only the text part: the corpus is text, and students are built from it.
    config = json.loads(text_part(model.config).to_json_string(use_diff=False))
    return {key: config[key] for key in config.keys() - {"_name_or_path", "transformers_version"}}


def _save(model: PreTrainedModel, tokenizer: Path, target: Path) -> None:
    """Atomically replace directory `target` by the model and its tokenizer."""
    staging = target.with_name(".model.writing")
    shutil.rmtree(staging, ignore_errors=True)
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    with needing_room(staging, needed):
        model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(staging)
    write_for_both(staging)
    replace_directory(target, staging)


def _scratch(
    scratch: Mapping[str, Any], meta: TokenMeta, name: str, *, seed: int
) -> PreTrainedModel:
    config = scratch_config(
        scratch,
        task=meta.task,
        classes=meta.classes,
        vocab=meta.vocab,
        pad_id=meta.pad_id,
        key=f"teachers.{name}",
    )
    try:
        with forked_generators():
            torch.manual_seed(seed)
            return auto_class(meta.task).from_config(config)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"teachers.{name}.model.scratch: no {meta.task} model can be built from it "
            f"({in_short(error)}); change the key it names"
        ) from error


def _directory(path: str, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    config = cached_file(path, "config.json", revision=revision)
    assert config is not None
    return Path(config).parent


def _refuse_untrained_head(config: Mapping[str, Any], meta: TokenMeta, name: str) -> None:
    architectures = config.get("architectures") or [""]
    if not architectures[0].endswith("ForSequenceClassification"):
        raise IncompatibleError(
            f"teachers.{name}: {architectures[0] or 'the model'} has no trained {meta.task} "
            "head; add a fit section to fine-tune it on the task"
        )
    labels, outputs = len(config.get("id2label") or {}), outputs_of(meta.task, meta.classes)
    if labels != outputs:
        expected = ", ".join(meta.classes) or "a number"
        raise IncompatibleError(
            f"teachers.{name}: the model has {labels} classes, the corpus {outputs} "
            f"({expected}); choose a teacher of this task or add a fit section"
        )
    if meta.classes:
        _refuse_other_order(config, meta, name)


def _refuse_other_order(config: Mapping[str, Any], meta: TokenMeta, name: str) -> None:
    """Refuse a model whose class names are the corpus's in another order of ids."""
    labels = {int(number): str(label) for number, label in (config.get("id2label") or {}).items()}
    names = [labels[number] for number in sorted(labels)]
    theirs, ours = ([name.casefold() for name in some] for some in (names, meta.classes))
    if sorted(theirs) == sorted(ours) and theirs != ours:
        spelling = {name.casefold(): name for name in meta.classes}
        raise IncompatibleError(
            f"teachers.{name}: the model's classes are {', '.join(names)}, the corpus's "
            f"{', '.join(meta.classes)}, expected the same order; set corpus.classes to "
            f"[{', '.join(spelling[name] for name in theirs)}]"
        )


def _check_fit(model: PreTrainedModel, meta: TokenMeta, name: str) -> None:
    embeddings = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportIndexIssue]
    if embeddings < meta.vocab:
        raise IncompatibleError(
            f"teachers.{name}: the model has {embeddings} embeddings, the tokenizer {meta.vocab} "
            "ids; use the tokenizer the model was trained with"
        )
    require_room(model, meta.max_length, f"teachers.{name}")


class PaddedRows:
    """Collates token rows for ordinary training: right-padded, with labels where the loss mask is.

    A sequence task has one label per row, or targets. `tokens` counts all tokens collated so far.
    """

    def __init__(self, meta: TokenMeta, model: PreTrainedModel) -> None:
        self._meta = meta
        self._model = model
        self.tokens = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the padded batch."""
        longest = max(len(row["input_ids"]) for row in rows)
        self.tokens += sum(len(row["input_ids"]) for row in rows)
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
        elif not models_language(self._meta.task):
            labels = np.asarray([row["targets"] for row in rows], dtype=np.float32)
        tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
        return model_columns(self._model, tensors) | {"labels": torch.from_numpy(labels)}


def _fit(
    name: str,
    model: PreTrainedModel,
    token_set: TokenSet,
    fit: TrainOptions,
    directory: Path,
    device: str,
) -> None:
    rows = token_set.split(TRAIN).with_format(None)
    collator = PaddedRows(token_set.meta, model)
    trainer = WatchedTrainer(
        description=f"teach {name}",
        tokens=lambda: collator.tokens,
        model=model,
        args=training_arguments(fit, directory, device),
        # Only the first part: added text must not change the teacher and its features.
        train_dataset=rows.select(range(token_set.meta.first_rows)),
        data_collator=collator,
    )
    resumed = last_complete_checkpoint(directory)
    if resumed is not None:
        logger.info("%s: resuming from %s", name, resumed)
    trainer.train_from(None if resumed is None else Path(resumed))
