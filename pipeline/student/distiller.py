"""Student and projectors as one module: a stored batch goes in, terms of the loss come out.

Nothing here knows the teacher as a model. Every term is divided by the count it is given, so that
its value is right under gradient accumulation and on several ranks.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.student.attention import AttentionMatch
from pipeline.student.balance import Balance
from pipeline.student.features import TeacherFeatures
from pipeline.student.losses.chunked import chunked_rows
from pipeline.student.losses.counting import Count
from pipeline.student.losses.registry import FEATURE, OUTPUT, find_loss, label_loss
from pipeline.student.objective import TERMS, Objective, active_terms, check_task
from pipeline.student.outputs import check_output_loss
from pipeline.student.projectors import Projectors
from pipeline.student.stream import target_positions
from pipeline.student.transport import Compare, mapped_loss
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.head import apply_head, read_head_spec
from pipeline.taps.inputs import model_columns, model_inputs, run_base
from pipeline.taps.tap import Record, tap
from pipeline.tasks import models_language

CHUNK_LOGITS = 2**24
"""Logits alive at once in the output and label terms: 64 MiB in float32, a side."""
LayerMap = Mapping[int, int | Sequence[int]]


class Losses(NamedTuple):
    """The loss of a batch, with its graph, and each term it is made of."""

    total: Tensor
    terms: dict[str, Tensor]


def term_counts(
    batch: Mapping[str, Any],
    objective: Objective,
    *,
    task: str,
    terms: Collection[str] | None = None,
) -> dict[str, int]:
    """Return how many units of each active term, or of those of `terms`, a batch holds.

    Feature: live tokens (but the first where the option says so). Attention: live query rows.
    Output and labels: target positions of a language model, examples of a classifier.
    """
    live = batch["attention_mask"]
    tokens = int(live.sum())
    first = len(live) if objective.feature.skip_first_token else 0
    outputs = int(target_positions(dict(batch)).sum()) if models_language(task) else len(live)
    units = (tokens - first, tokens, outputs, outputs)
    counts: dict[str, int] = dict(zip(TERMS, units, strict=True))
    wanted = active_terms(objective)
    return {term: counts[term] for term in wanted if terms is None or term in terms}


class Distiller(nn.Module):
    """A student that learns from stored features.

    Args:
        student: The student, with the head of its task.
        features: The decoder of the teacher's signals.
        objective: The terms.
        maps: For `feature` and `attention`, student layer to teacher layer, or to a list of them
            that a transport plan chooses between.
        task: One of `pipeline.tasks`.

    Raises:
        ConfigError: If the output loss does not fit the task.
        IncompatibleError: If attention of the two does not fit the loss, or vocabularies or
            numbers of outputs differ.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        features: TeacherFeatures,
        objective: Objective,
        maps: Mapping[str, LayerMap],
        *,
        task: str,
    ) -> None:
        super().__init__()
        self.student = student
        self.features = features
        self.objective = objective
        self.task = task
        self.terms = active_terms(objective)
        check_task(objective, task)
        self.feature_map = dict(maps["feature"]) if "feature" in self.terms else {}
        self.attention_map = dict(maps["attention"]) if "attention" in self.terms else {}
        self._anatomy = find_anatomy(student)
        self._is_causal = self._anatomy.is_causal
        self._head = read_head_spec(student) if models_language(task) else None
        self._attention_match = (
            AttentionMatch(
                objective.attention, pairs_of(self.attention_map), features, self._anatomy
            )
            if "attention" in self.terms
            else None
        )
        self._output_loss = find_loss(OUTPUT, objective.output.loss, key="loss.output.loss")
        if "output" in self.terms:
            self._check_outputs()
        widths = {
            features.declaration("hidden", teacher).geometry.width
            for _, teacher in pairs_of(self.feature_map)
        }
        self.projectors = Projectors(
            objective.feature.projector,
            self.feature_map,
            d_student=self._anatomy.width,
            d_teacher=widths.pop() if widths else 0,
        )
        self.balance = Balance(self.terms) if objective.balance == "gradient_norm" else None

    def _check_outputs(self) -> None:
        declared = self.features.declaration("logits")
        # A student that keeps part of the vocabulary has the head cut to it.
        whole = self.features.head is None
        vocab = declared.geometry.vocab if whole else len(self.features.head_weight)
        head = self.student.get_output_embeddings()
        found = self.student.config.num_labels if head is None else head.weight.shape[0]
        if vocab != found:
            raise IncompatibleError(
                f"loss.output: the teacher has {vocab} outputs, the student {found}; give "
                "the student the teacher's vocabulary or classes"
            )
        check_output_loss(declared, self.objective.output)

    def forward(
        self,
        batch: Mapping[str, Any],
        counts: Mapping[str, Count],
        factors: Mapping[str, float | Tensor] | None = None,
        *,
        apart: bool = False,
    ) -> Losses:
        """Return each term of a batch that has a count, divided by it, and their sum.

        Args:
            batch: What `StoreDataset` gives, on the student's device.
            counts: Units of each term over all accumulation steps and ranks, see `term_counts`. An
                active term without one is not computed.
            factors: What each term is multiplied by in the sum; None: 1.
            apart: Give each term a graph of its own. Without it only the sum is sure to have one.
        """
        live = batch["attention_mask"].bool()
        inputs = model_inputs(model_columns(self.student, batch), is_causal=self._is_causal)
        match = self._attention_match if "attention" in counts else None
        with tap(
            self.student,
            hidden=self.feature_map.keys() if "feature" in counts else (),
            attention=match.tapped if match else (),
            values=match.tapped_values if match else (),
        ) as record:
            output = (
                run_base(self.student, inputs)
                if models_language(self.task)
                else self.student(**inputs).logits
            )
        terms: dict[str, Tensor] = {}
        if "feature" in counts:
            terms["feature"] = self._feature(record, batch, live, counts["feature"])
        if match is not None:
            terms["attention"] = mapped_loss(
                self.attention_map,
                lambda teacher: match.against(teacher, record, batch, live, counts["attention"]),
            )
        terms |= self._outputs(output, batch, live, counts)
        weighted = [value if factors is None else factors[t] * value for t, value in terms.items()]
        return Losses(torch.stack(weighted).sum(), terms)

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

        def against(teacher_layer: int) -> Compare:
            teacher = self.features.hidden(teacher_layer, batch["features"])

            def compare(student_layer: int) -> Tensor:
                projected = self.projectors(student_layer, record.hidden[student_layer][live])
                return loss(projected[kept], teacher[kept], count)

            return compare

        return mapped_loss(self.feature_map, against)

    def _outputs(
        self,
        output: Tensor,
        batch: Mapping[str, Any],
        live: Bool[Tensor, "batch seq"],
        counts: Mapping[str, Count],
    ) -> dict[str, Tensor]:
        wanted = [term for term in ("output", "labels") if term in counts]
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

        labels = label_loss(self.task)

        def chunk(rows: Tensor, targets: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
            logits = self._student_logits(rows)
            values = []
            if "output" in wanted:
                values.append(self._output(logits, parts, counts["output"]))
            if "labels" in wanted:
                values.append(labels(logits, targets, counts["labels"]))
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
        options, loss = self.objective.output, self._output_loss
        teacher = self.features.logits(*parts)
        more = {"skew": options.skew} if loss.skews else {}
        if teacher.full is not None:
            return loss.full(logits, teacher.full, options.temperature, count, **more)
        if teacher.samples is not None:
            assert loss.sampled is not None  # _check_outputs
            return loss.sampled(logits, teacher.samples, options.temperature, count)
        assert loss.topk is not None  # _check_outputs
        return loss.topk(
            logits,
            teacher.ids,
            teacher.log_probs,
            teacher.log_normalizer,
            options.temperature,
            count,
            **more,
        )


def pairs_of(layers: LayerMap) -> list[tuple[int, int]]:
    """Return every pair of student and teacher layer that a map lets meet."""
    return [
        (student, teacher)
        for student, found in layers.items()
        for teacher in ([found] if isinstance(found, int) else found)
    ]
