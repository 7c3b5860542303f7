"""Student and projectors as one module: takes a stored batch, returns the terms of the loss.

The teacher is not loaded. Every term is divided by the count that the caller gives, so that its
value is right under gradient accumulation and on several ranks.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.student.align.attention_terms import AttentionMatch
from pipeline.student.align.balance import Balance
from pipeline.student.align.chunked import chunked_feature_loss
from pipeline.student.align.layer_maps import LayerMap, layer_pairs
from pipeline.student.align.objective import TERMS, Objective, active_terms, check_task
from pipeline.student.align.output_terms import OutputTerms
from pipeline.student.align.projectors import PROJECTORS
from pipeline.student.align.transport import Compare, mapped_loss
from pipeline.student.data.features import TeacherFeatures
from pipeline.student.losses.counting import Count
from pipeline.student.losses.registry import FeatureLoss, find_loss
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.inputs import model_columns, model_inputs, run_base
from pipeline.taps.tap import Record, tap
from pipeline.tasks import models_language


class Losses(NamedTuple):
    """The loss of a batch, with its graph, and its terms."""

    total: Tensor
    terms: dict[str, Tensor]


def term_counts(
    batch: Mapping[str, Any],
    objective: Objective,
    *,
    task: str,
    terms: Collection[str] | None = None,
) -> dict[str, int]:
    """Return the units that a batch has of each active term, or of those in `terms`.

    Feature: live tokens (without the first if the option says so). Attention: live query rows.
    Output and labels: target positions of a language model, examples of a classifier.
    """
    positions = batch["positions"]
    feature = "later" if objective.feature.skip_first_token else "live"
    outputs = positions["targets"] if models_language(task) else batch["attention_mask"]
    units = map(len, (positions[feature], positions["live"], outputs, outputs))
    counts: dict[str, int] = dict(zip(TERMS, units, strict=True))
    wanted = active_terms(objective)
    return {term: counts[term] for term in wanted if terms is None or term in terms}


class Projectors(nn.Module):
    """The projectors of one student, a separate one for each pair of layers.

    A student layer that a transport plan pairs anew in every batch has one for all its teachers.
    Projectors are trained with the student and are in its checkpoints, never in its export.
    """

    def __init__(self, kind: str, pairs: LayerMap, *, d_student: int, d_teacher: int) -> None:
        """Build one projector a pair, in the order of student layers.

        Args:
            kind: A name in `PROJECTORS`.
            pairs: Student layer → teacher layer, or all that share the layer's one projector.
            d_student: Width of the student's states.
            d_teacher: Width of the teacher's states.

        Raises:
            ConfigError: If there is no projector of that name.
        """
        super().__init__()
        build = PROJECTORS[kind].build
        self._keys = {
            student: f"{student}->{teacher if isinstance(teacher, int) else 'any'}"
            for student, teacher in sorted(pairs.items(), key=lambda pair: pair[0])
        }
        self.by_pair = nn.ModuleDict(
            {key: build(d_student, d_teacher) for key in self._keys.values()}
        )

    def of(self, student_layer: int) -> nn.Module:
        """Return the projector of a student layer."""
        return self.by_pair[self._keys[student_layer]]


class Distiller(nn.Module):
    """A student that learns from stored features.

    Args:
        student: The student, with the head of its task.
        features: The decoder of the teacher's signals.
        objective: The terms.
        maps: The layer maps of `feature` and `attention`.
        task: One of `pipeline.tasks`.

    Raises:
        ConfigError: If the output loss does not fit the task.
        IncompatibleError: If attention of student and teacher does not fit the loss, or the
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
        self._attention_match = (
            AttentionMatch(
                objective.attention, layer_pairs(self.attention_map), features, self._anatomy
            )
            if "attention" in self.terms
            else None
        )
        self._outputs = OutputTerms(student, features, objective, task)
        if "output" in self.terms:
            self._outputs.check(student)
        widths = {
            features.declaration("hidden", teacher).geometry.width
            for _, teacher in layer_pairs(self.feature_map)
        }
        self.projectors = Projectors(
            objective.feature.projector,
            self.feature_map,
            d_student=self._anatomy.width,
            d_teacher=widths.pop() if widths else 0,
        )
        self.balance = Balance(self.terms) if objective.balance == "gradient_norm" else None

    def forward(
        self,
        batch: Mapping[str, Any],
        counts: Mapping[str, Count],
        factors: Mapping[str, float | Tensor] | None = None,
        *,
        apart: bool = False,
    ) -> Losses:
        """Return a batch's terms that have a count, each divided by it, and their weighted sum.

        Args:
            batch: A batch of `StoreDataset`, on the student's device.
            counts: Units of each term over all accumulation steps and ranks, see `term_counts`. An
                active term without one is not computed.
            factors: The factor of each term in the sum; None: 1.
            apart: Give each term a graph of its own. Otherwise only the sum is sure to have one.
        """
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
            terms["feature"] = self._feature(record, batch, counts["feature"])
        if match is not None:
            terms["attention"] = mapped_loss(
                self.attention_map,
                lambda teacher: match.against(teacher, record, batch, counts["attention"]),
            )
        factors = dict.fromkeys(counts, 1.0) if factors is None else factors
        weighted = [factors[term] * value for term, value in terms.items()]
        for total, values in self._outputs.of(
            self.student, output, batch, counts, factors, apart=apart
        ):
            weighted.append(total)
            terms |= values
        return Losses(torch.stack(weighted).sum(), terms)

    def _feature(self, record: Record, batch: Mapping[str, Any], count: Count) -> Tensor:
        loss, positions = find_loss(FeatureLoss, self.objective.feature.loss), batch["positions"]
        kept, tokens = positions["live"], None
        if self.objective.feature.skip_first_token:
            kept, tokens = positions["later"], positions["later_tokens"]

        def against(teacher_layer: int) -> Compare:
            def teacher(rows: slice) -> Tensor:
                return self.features.hidden(
                    teacher_layer, batch, rows if tokens is None else tokens[rows]
                )

            def compare(student_layer: int) -> Tensor:
                return chunked_feature_loss(
                    loss,
                    record.hidden[student_layer].flatten(0, 1).index_select(0, kept),
                    self.projectors.of(student_layer),
                    teacher,
                    d_teacher=self.features.declaration("hidden", teacher_layer).geometry.width,
                    count=count,
                )

            return compare

        return mapped_loss(self.feature_map, against)
