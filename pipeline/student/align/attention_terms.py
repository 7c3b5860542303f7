"""The attention term: compares attention maps of two layers, or relations of their vectors."""

from collections.abc import Collection, Mapping
from functools import reduce
from math import gcd
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import IncompatibleError
from pipeline.store.forms.form import Content
from pipeline.store.forms.registry import names_of
from pipeline.store.records import Declaration
from pipeline.student.align.chunked import chunked_map_loss
from pipeline.student.align.objective import AttentionTerm
from pipeline.student.align.transport import Compare
from pipeline.student.data.features import TeacherFeatures
from pipeline.student.losses.attention import Vectors, relation_vectors
from pipeline.student.losses.counting import Count
from pipeline.student.losses.registry import AttentionLoss, find_loss
from pipeline.taps.anatomy import Anatomy
from pipeline.taps.scores import MapRows, rows_of_vectors
from pipeline.taps.tap import Record

VECTORS = {"qq": "query", "kk": "key", "vv": "value"}
"""The vectors of each relation, as the tap's record names them."""


class AttentionMatch:
    """Compares attention of student and teacher layers.

    Args:
        options: The attention term.
        pairs: Pairs of a student and a teacher layer that may be compared.
        features: The decoder of the teacher's signals.
        anatomy: The student's anatomy.

    Raises:
        IncompatibleError: If heads or widths do not fit the loss, a layer lacks the vectors that
            relations need, or one side sees keys that the other does not.
    """

    def __init__(
        self,
        options: AttentionTerm,
        pairs: Collection[tuple[int, int]],
        features: TeacherFeatures,
        anatomy: Anatomy,
    ) -> None:
        self._loss = find_loss(AttentionLoss, options.loss)
        self._relations = options.compared_relations
        self._features = features
        students = sorted({student for student, _ in pairs})
        self.needs_maps = set(self._relations) != {"vv"}
        self.tapped = tuple(students) if self.needs_maps else ()
        self.tapped_values = tuple(students) if "vv" in self._relations else ()
        for student, teacher in pairs:
            declared = self._declaration(teacher)
            rule = declared.info["rule"]
            if (rule == "causal") != anatomy.is_causal:
                raise IncompatibleError(
                    f"loss.attention: teacher layer {teacher} is {rule}, the student is not; "
                    "choose a student of the teacher's kind"
                )
            if self._loss.equal_heads and declared.geometry.heads != anatomy.heads:
                raise IncompatibleError(
                    f"loss.attention: teacher layer {teacher} has {declared.geometry.heads} "
                    f"attention heads, student layer {student} has {anatomy.heads}; use "
                    "loss.attention.loss relations or head_mean, give the student "
                    f"{declared.geometry.heads} heads, or set the term's weight to 0"
                )
            if self._relations and declared.form.content is Content.ATTENTION_MAP:
                raise IncompatibleError(
                    f"loss.attention: {declared.name} holds no query and key, which relations are "
                    f"made of; capture the layer in form {names_of(Content.QUERY_KEY)}, or use "
                    "loss head_mean"
                )
        self.relation_heads = self._relation_heads(options, pairs, anatomy)

    def _declaration(self, teacher: int) -> Declaration:
        return self._features.declaration("attention" if self.needs_maps else "value", teacher)

    def _relation_heads(
        self, options: AttentionTerm, pairs: Collection[tuple[int, int]], anatomy: Anatomy
    ) -> int:
        """Return `relation_heads`, or the largest number that divides all widths."""
        if not self._relations:
            return 0
        keys = anatomy.kv_heads * anatomy.head_dim
        own = {"qq": anatomy.heads * anatomy.head_dim, "kk": keys, "vv": keys}
        sizes = {f"the student's {VECTORS[r]}": own[r] for r in self._relations}
        most = anatomy.heads
        for teacher in {teacher for _, teacher in pairs}:
            for relation in self._relations:
                kind = "value" if relation == "vv" else "attention"
                geometry = self._features.declaration(kind, teacher).geometry
                heads = geometry.heads if relation == "qq" else geometry.kv_heads
                sizes[f"the teacher's {VECTORS[relation]}"] = heads * geometry.d_head
            geometry = self._declaration(teacher).geometry
            most = geometry.heads or geometry.kv_heads
        wanted = options.relation_heads
        if wanted is None:
            common = reduce(gcd, sizes.values())
            return max(heads for heads in range(1, most + 1) if common % heads == 0)
        for name, size in sizes.items():
            if size % wanted:
                raise IncompatibleError(
                    f"loss.attention.relation_heads: {wanted} does not divide {name} width {size}; "
                    "choose a divisor of all widths, or leave it out"
                )
        return wanted

    def against(
        self,
        teacher: int,
        record: Record,
        batch: Mapping[str, Any],
        count: Count,
    ) -> Compare:
        """Decode one teacher layer and return the loss of student layers against it.

        Only vectors are decoded for all rows; attention maps exist for some rows at a time.

        Args:
            teacher: The teacher layer.
            record: What the tap recorded of the student's forward pass.
            batch: The batch with its stored features.
            count: Query rows to divide by; not None.
        """
        declared = self._declaration(teacher)
        theirs, heads = self._teacher_maps(teacher, batch)
        live = batch["attention_mask"].bool()

        def compare(student: int) -> Tensor:
            losses = [
                chunked_map_loss(
                    self._loss,
                    *ours,
                    rows,
                    live,
                    declared.info["rule"],
                    count=count,
                    teacher_heads=heads,
                )
                for ours, rows in zip(self._student_vectors(student, record), theirs, strict=True)
            ]
            return torch.stack(losses).mean()

        return compare

    def _student_vectors(self, student: int, record: Record) -> list[Vectors]:
        if not self._relations:
            query, key = record.query[student], record.key[student]
            return [Vectors(query, key, record.scaling[student])]
        return [
            relation_vectors(getattr(record, VECTORS[relation])[student], self.relation_heads)
            for relation in self._relations
        ]

    def _teacher_maps(self, teacher: int, batch: Mapping[str, Any]) -> tuple[list[MapRows], int]:
        """Return functions that decode rows of the teacher's maps, and their number of heads."""
        if not self._relations:
            geometry = self._declaration(teacher).geometry
            return [self._features.attention_rows(teacher, batch)], geometry.heads
        decoded: dict[str, Tensor] = {}
        if self.needs_maps:
            decoded |= self._features.attention_vectors(teacher, batch)
        if "vv" in self._relations:
            decoded["value"] = self._features.values(teacher, batch)
        vectors = [
            relation_vectors(decoded[VECTORS[relation]], self.relation_heads)
            for relation in self._relations
        ]
        return [rows_of_vectors(*relation) for relation in vectors], self.relation_heads
