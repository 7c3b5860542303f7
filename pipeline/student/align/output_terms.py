"""Output losses: against the teacher's outputs and against the true labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.student.align.chunked import BlockLoss, chunked_head_loss
from pipeline.student.align.objective import Objective
from pipeline.student.align.output_checks import check_output_loss
from pipeline.student.data.features import TeacherFeatures, TeacherLogits
from pipeline.student.losses.counting import Count
from pipeline.student.losses.label import label_loss
from pipeline.student.losses.registry import OutputLoss, find_loss
from pipeline.taps.head import finish_logits, linear_head, read_head_spec
from pipeline.tasks import models_language

TERMS = ("output", "labels")


@dataclass(frozen=True)
class _Rows:
    """The rows of a batch that count; `targets` is None where the store has no labels."""

    student: Float[Tensor, "rows d"]
    targets: Tensor | None
    parts: tuple[Tensor, ...]


class OutputTerms:
    """The terms `output` and `labels`.

    A language model's logits are computed in chunks, see `chunked_head_loss`. A classifier's, which
    are few, are plain tensors.

    Args:
        student: The student, with the head of its task.
        features: The decoder of the teacher's signals.
        objective: The terms.
        task: One of `pipeline.tasks`.
    """

    def __init__(
        self, student: PreTrainedModel, features: TeacherFeatures, objective: Objective, task: str
    ) -> None:
        self._features = features
        self._term = objective.output
        self._options = objective.output.loss_options()
        self._task = task
        self._head = read_head_spec(student) if models_language(task) else None
        self._loss = find_loss(OutputLoss, objective.output.loss)
        self._label_loss = label_loss(task)

    def check(self, student: PreTrainedModel) -> None:
        """Refuse a student or loss that does not fit the stored outputs.

        Raises:
            ConfigError: If the loss needs an option it does not have.
            IncompatibleError: If the numbers of outputs differ, or the loss does not fit the form.
        """
        declared = self._features.declaration("logits")
        vocab = self._features.outputs
        head = student.get_output_embeddings()
        outputs = student.config.num_labels if head is None else head.weight.shape[0]
        if vocab != outputs:
            raise IncompatibleError(
                f"loss.output: the teacher has {vocab} outputs, the student {outputs}; give "
                "the student the teacher's vocabulary or classes"
            )
        check_output_loss(declared, self._term)

    def of(
        self,
        student: PreTrainedModel,
        output: Tensor,
        batch: Mapping[str, Any],
        counts: Mapping[str, Count],
        factors: Mapping[str, float | Tensor],
        *,
        apart: bool,
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Return weighted sums, with a graph, each with its terms.

        A language model's gradients are computed with the values, so the weights must be known.
        Either all terms are in one sum, from the same logits and without graphs of their own, or
        each is a sum of its own.

        Args:
            student: The student.
            output: A language model's input of the head, else logits.
            batch: The batch with its stored features.
            counts: The count that each term is divided by; a term without one is left out.
            factors: The factor of each term in the sum.
            apart: Give each term a graph of its own.

        Raises:
            IncompatibleError: If the label term is on and the store has no labels.
        """
        wanted = [term for term in TERMS if term in counts]
        if not wanted:
            return []
        rows = self._rows(output, batch, wanted)
        if self._head is None:
            values = self._losses(rows, wanted, counts)(slice(None))(rows.student, slice(None))
            weighted = [factors[term] * value for term, value in zip(wanted, values, strict=True)]
            return [(torch.stack(weighted).sum(), dict(zip(wanted, values, strict=True)))]
        head, sums = linear_head(student), []
        for group in [[term] for term in wanted] if apart else [wanted]:
            total, values = chunked_head_loss(
                self._losses(rows, group, counts),
                rows.student,
                head.weight,
                head.bias,
                factors=[1.0 if len(group) == 1 else factors[term] for term in group],
                count=counts[group[0]],
            )
            if len(group) == 1:
                sums.append((factors[group[0]] * total, {group[0]: total}))
            else:
                sums.append((total, dict(zip(group, values, strict=True))))
        return sums

    def _rows(self, output: Tensor, batch: Mapping[str, Any], wanted: Sequence[str]) -> _Rows:
        if models_language(self._task):
            positions = batch["positions"]["targets"]
            rows = output.flatten(0, 1).index_select(0, positions)
            # A position that is the last of its row has no target.
            targets = batch["input_ids"].flatten().index_select(0, positions + 1)
        else:
            rows, targets = output, batch.get("labels")
            if targets is None and "labels" in wanted:
                raise IncompatibleError(
                    "loss.labels: the store's examples have no labels; set the term's weight to 0"
                )
        parts = self._features.output_parts(batch) if "output" in wanted else ()
        return _Rows(rows, targets, parts)

    def _losses(
        self, rows: _Rows, wanted: Sequence[str], counts: Mapping[str, Count]
    ) -> Callable[[slice], BlockLoss]:
        """Return a function that begins a chunk of rows with the teacher's logits of its blocks."""

        def begin(chunk: slice) -> BlockLoss:
            teacher = None
            if "output" in wanted:
                teacher = self._features.logits(*(part[chunk] for part in rows.parts))
            targets = None if rows.targets is None else rows.targets[chunk]

            def losses(logits: Tensor, block: slice) -> tuple[Tensor, ...]:
                if self._head is not None:
                    logits = finish_logits(logits, self._head)
                values = []
                if teacher is not None:
                    values.append(self._output(logits, teacher.rows(block), counts["output"]))
                if "labels" in wanted:
                    assert targets is not None  # _rows
                    values.append(self._label_loss(logits, targets[block], counts["labels"]))
                return tuple(values)

            return losses

        return begin

    def _output(self, logits: Tensor, teacher: TeacherLogits, count: Count) -> Tensor:
        loss, temperature, options = self._loss, self._term.temperature, self._options
        if teacher.full is not None:
            return loss.full(logits, teacher.full, temperature, count, **options)
        if teacher.samples is not None:
            assert loss.sampled is not None  # check
            return loss.sampled(logits, teacher.samples, temperature, count, **options)
        assert loss.topk is not None  # check
        return loss.topk(
            logits,
            teacher.ids,
            teacher.log_probs,
            teacher.log_normalizer,
            temperature,
            count,
            **options,
        )
