"""Student and projectors as one module: a stored batch goes in, terms of the loss come out.

Nothing here knows the teacher as a model. Every term is divided by the count it is given, so that
its value is right under gradient accumulation and on several ranks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.student.features import TeacherFeatures
from pipeline.student.losses.chunked import chunked_rows
from pipeline.student.losses.counting import Count
from pipeline.student.losses.labels import label_cross_entropy
from pipeline.student.losses.registry import ATTENTION, FEATURE, OUTPUT, find_loss
from pipeline.student.objective import Objective
from pipeline.student.projectors import Projectors
from pipeline.student.stream import target_positions
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.head import apply_head, read_head_spec
from pipeline.taps.inputs import model_columns, model_inputs, run_base
from pipeline.taps.scores import attention_log_probs, visible_keys
from pipeline.taps.tap import Record, tap
from pipeline.tasks import models_language

CHUNK_LOGITS = 2**24
"""Logits alive at once in the output and label terms: 64 MiB in float32, a side."""
TERMS = ("feature", "attention", "output", "labels")


def active_terms(objective: Objective) -> tuple[str, ...]:
    """Return the terms whose weight is not 0 throughout."""
    return tuple(term for term in TERMS if not getattr(objective, term).weight.is_off)


def term_counts(batch: Mapping[str, Any], objective: Objective, *, task: str) -> dict[str, int]:
    """Return how many units of each active term a batch holds.

    Feature: live tokens (but the first where the option says so). Attention: live query rows.
    Output and labels: target positions of a language model, examples of a classifier.
    """
    live = batch["attention_mask"]
    tokens = int(live.sum())
    first = len(live) if objective.feature.skip_first_token else 0
    outputs = int(target_positions(dict(batch)).sum()) if models_language(task) else len(live)
    counts = {
        "feature": tokens - first,
        "attention": tokens,
        "output": outputs,
        "labels": outputs,
    }
    return {term: counts[term] for term in active_terms(objective)}


class Distiller(nn.Module):
    """A student that learns from stored features.

    Args:
        student: The student, with the head of its task.
        features: The decoder of the teacher's signals.
        objective: The terms.
        maps: For `feature` and `attention`, student layer to teacher layer.
        task: `causal-lm` or `classification`.

    Raises:
        IncompatibleError: If attention is to be matched between unequal head counts, or
            vocabularies or class counts differ.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        features: TeacherFeatures,
        objective: Objective,
        maps: Mapping[str, Mapping[int, int]],
        *,
        task: str,
    ) -> None:
        super().__init__()
        self.student = student
        self.features = features
        self.objective = objective
        self.task = task
        self.terms = active_terms(objective)
        self.feature_map = dict(maps["feature"]) if "feature" in self.terms else {}
        self.attention_map = dict(maps["attention"]) if "attention" in self.terms else {}
        self._anatomy = find_anatomy(student)
        self._is_causal = self._anatomy.is_causal
        self._head = read_head_spec(student) if models_language(task) else None
        self._check_fit()
        widths = {
            features.declaration("hidden", t).geometry.width for t in self.feature_map.values()
        }
        self.projectors = Projectors(
            objective.feature.projector,
            self.feature_map,
            d_student=self._anatomy.width,
            d_teacher=widths.pop() if widths else 0,
        )

    def _check_fit(self) -> None:
        for student_layer, teacher_layer in self.attention_map.items():
            heads = self.features.declaration("attention", teacher_layer).geometry.heads
            if heads != self._anatomy.heads:
                raise IncompatibleError(
                    f"loss.attention: teacher layer {teacher_layer} has {heads} attention "
                    f"heads, student layer "
                    f"{student_layer} has {self._anatomy.heads}; give the student {heads} heads "
                    f"or set the "
                    "term's weight to 0"
                )
            rule = self.features.declaration("attention", teacher_layer).info["rule"]
            if (rule == "causal") != self._is_causal:
                raise IncompatibleError(
                    f"loss.attention: teacher layer {teacher_layer} is {rule}, the student is "
                    f"not; choose a "
                    "student of the teacher's kind"
                )
        if "output" in self.terms:
            vocab = self.features.declaration("logits").geometry.vocab
            head = self.student.get_output_embeddings()
            found = self.student.config.num_labels if head is None else head.weight.shape[0]
            if vocab != found:
                raise IncompatibleError(
                    f"loss.output: the teacher has {vocab} outputs, the student {found}; give "
                    f"the student the "
                    "teacher's vocabulary or classes"
                )

    def forward(self, batch: Mapping[str, Any], counts: Mapping[str, Count]) -> dict[str, Tensor]:
        """Return each active term of a batch, divided by its count.

        Args:
            batch: What `StoreDataset` gives, on the student's device.
            counts: Units of each term over all accumulation steps and ranks, see `term_counts`.
        """
        live = batch["attention_mask"].bool()
        inputs = model_inputs(model_columns(self.student, batch), is_causal=self._is_causal)
        with tap(
            self.student, hidden=self.feature_map.keys(), attention=self.attention_map.keys()
        ) as record:
            output = (
                run_base(self.student, inputs)
                if models_language(self.task)
                else self.student(**inputs).logits
            )
        terms: dict[str, Tensor] = {}
        if "feature" in self.terms:
            terms["feature"] = self._feature(record, batch, live, counts["feature"])
        if "attention" in self.terms:
            terms["attention"] = self._attention(record, batch, live, counts["attention"])
        terms |= self._outputs(output, batch, live, counts)
        return terms

    def _feature(
        self,
        record: Record,
        batch: Mapping[str, Any],
        live: Bool[Tensor, "batch seq"],
        count: Count,
    ) -> Tensor:
        loss = find_loss(FEATURE, self.objective.feature.loss, key="loss.feature.loss")
        kept = torch.ones_like(live)
        kept[:, 0] = not self.objective.feature.skip_first_token
        kept = kept[live]
        total = torch.zeros((), device=live.device)
        for student_layer, teacher_layer in self.feature_map.items():
            teacher = self.features.hidden(teacher_layer, batch["features"])
            projected = self.projectors(
                student_layer, teacher_layer, record.hidden[student_layer][live]
            )
            total = total + loss(projected[kept], teacher[kept], count)
        return total / len(self.feature_map)

    def _attention(
        self,
        record: Record,
        batch: Mapping[str, Any],
        live: Bool[Tensor, "batch seq"],
        count: Count,
    ) -> Tensor:
        loss = find_loss(ATTENTION, self.objective.attention.loss, key="loss.attention.loss")
        total = torch.zeros((), device=live.device)
        for student_layer, teacher_layer in self.attention_map.items():
            teacher = self.features.attention_log_probs(teacher_layer, batch["features"], live)
            rule = self.features.declaration("attention", teacher_layer).info["rule"]
            visible = visible_keys(live.sum(-1), live.shape[1], rule)
            student = attention_log_probs(
                record.query[student_layer],
                record.key[student_layer],
                record.scaling[student_layer],
                visible,
            )
            total = total + loss(student, teacher, live, visible, count)
        return total / len(self.attention_map)

    def _outputs(
        self,
        output: Tensor,
        batch: Mapping[str, Any],
        live: Bool[Tensor, "batch seq"],
        counts: Mapping[str, Count],
    ) -> dict[str, Tensor]:
        wanted = [term for term in ("output", "labels") if term in self.terms]
        if not wanted:
            return {}
        if models_language(self.task):
            positions = target_positions(dict(batch))
            rows = output[positions]
            targets = batch["input_ids"].roll(-1, dims=1)[positions]
            kept = positions[live]
        else:
            rows, targets, kept = output, batch.get("labels"), None
            if targets is None and "labels" in wanted:
                raise IncompatibleError(
                    "loss.labels: the store's examples have no labels; set the term's weight to 0"
                )
        parts = self.features.output_parts(batch["features"], kept) if "output" in wanted else ()
        if targets is None:
            targets = torch.zeros(len(rows), dtype=torch.long, device=rows.device)

        def chunk(rows: Tensor, targets: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
            logits = self._student_logits(rows)
            values = []
            if "output" in wanted:
                values.append(self._output(logits, parts, counts["output"]))
            if "labels" in wanted:
                values.append(label_cross_entropy(logits, targets, counts["labels"]))
            return tuple(values)

        vocab = self.student.config.get_text_config().vocab_size
        chunk_rows = (
            max(1, CHUNK_LOGITS // vocab) if models_language(self.task) else max(1, len(rows))
        )
        values = chunked_rows(chunk, rows, targets, *parts, chunk_rows=chunk_rows)
        return dict(zip(wanted, values, strict=True))

    def _student_logits(self, rows: Tensor) -> Tensor:
        if self._head is None:
            return rows
        head = self.student.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return apply_head(rows, head.weight, head.bias, self._head)

    def _output(self, logits: Tensor, parts: tuple[Tensor, ...], count: Count) -> Tensor:
        options = self.objective.output
        loss = find_loss(OUTPUT, options.loss, key="loss.output.loss")
        teacher = self.features.logits(*parts)
        if teacher.full is not None:
            return loss.full(logits, teacher.full, options.temperature, count)
        if loss.topk is None:
            raise IncompatibleError(
                f"loss.output.loss: {options.loss} needs the whole vocabulary; capture logits "
                f"as head"
            )
        return loss.topk(
            logits,
            teacher.ids,
            teacher.log_probs,
            teacher.log_normalizer,
            options.temperature,
            count,
        )
