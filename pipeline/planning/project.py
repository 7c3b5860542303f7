"""What an estimate of a capture is made from: the sections, and the tokens of their corpus."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.corpus.text.examples import read_corpus_meta
from pipeline.corpus.text.parameters import CorpusParams
from pipeline.corpus.text.prepare import prepare_corpus
from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.corpus.tokens.transfer import RECORD, transfer_tokens
from pipeline.errors import ConfigError
from pipeline.store.signals import Signal
from pipeline.student.align.needs import depth_of
from pipeline.student.parameters import StudentParams
from pipeline.teacher.capture.request import resolve_layers, resolve_signals
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.parameters.capture import CaptureParams, plain_layers
from pipeline.teacher.parameters.model import TeacherModel
from pipeline.teacher.parameters.tokens import TokenParams
from pipeline.teacher.source.reference import TeacherReference

if TYPE_CHECKING:
    from pipeline.planning.token_count import TokenCount


@dataclass(frozen=True)
class Project:
    """One teacher, its students and its corpus, as their sections of `params.yaml` describe them.

    Attributes:
        name: The teacher's name.
        corpus: Section `corpus`.
        model: Section `teachers.T.model`.
        is_fit: Whether the teacher is trained here.
        tokens: Section `teachers.T.tokens`.
        capture: Section `teachers.T.capture`.
        students: The sections of this teacher's students by their names.
        data: The directory that stages write to.
        stores: The directory of stores.
    """

    name: str
    corpus: CorpusParams
    model: TeacherModel
    is_fit: bool
    tokens: TokenParams
    capture: CaptureParams
    students: Mapping[str, StudentParams]
    data: Path
    stores: Path

    def check_layers(self) -> None:
        """Refuse layers that a teacher from scratch does not have, before any text is read.

        Raises:
            ConfigError: With the layer and the layers that there are.
        """
        depth = depth_of(self.model.scratch or {})
        if depth is not None:
            self.signals(depth, self.corpus.task)

    @property
    def directory(self) -> Path:
        """Where the teach stage writes."""
        return self.data / "teachers" / self.name

    @property
    def key(self) -> str:
        """The section that an estimate is about."""
        return f"teachers.{self.name}.capture"

    @property
    def options(self) -> SegmentOptions:
        """How the corpus is cut."""
        return self.capture.segments()

    @cached_property
    def reference(self) -> TeacherReference | None:
        """The teacher's reference; None before the teach stage has run."""
        is_written = (self.directory / "teacher.json").is_file()
        return TeacherReference.load(self.directory) if is_written else None

    def signals(self, depth: int, task: str) -> list[Signal]:
        """Return the requested signals."""
        return resolve_signals(
            self.capture.requests(), self.capture.logits_form(), depth=depth, task=task,
            key=self.key,
        )  # fmt: skip

    def blocks(self, depth: int) -> list[int]:
        """Return the blocks kept for students to start from."""
        if self.capture.blocks is None:
            return []
        layers = plain_layers(self.capture.blocks)
        return resolve_layers(layers, first=1, depth=depth, key=f"{self.key}.blocks")

    def count(self, scratch: Path) -> "TokenCount":
        """Count the corpus's tokens, or estimate them from a sample before `tokenize` has run."""
        from pipeline.planning.token_count import counted

        corpus = self.data / "corpus"
        tokens, transfer = corpus / "tokens" / self.name, corpus / "transfer" / self.name
        if (tokens / "tokens.json").is_file():
            has_transfer = (transfer / RECORD).is_file()
            count = counted(transfer_tokens(transfer, tokens) if has_transfer else tokens)
        else:
            count = self._sample(corpus / "text", scratch)
        if self.tokens.targets == "teacher" and not (transfer / RECORD).is_file():
            note = " with the corpus's own targets, which the teacher's text will replace"
            count = replace(count, is_exact=False, origin=count.origin + note)
        return count

    def _sample(self, text: Path, scratch: Path) -> "TokenCount":
        from pipeline.corpus.tokens.tokenize import tokenize_corpus, training_texts
        from pipeline.corpus.tokens.tokenizer import load_tokenizer, train_tokenizer
        from pipeline.planning.token_count import sampled, write_sample

        origin = f"texts of {text}"
        if not (text / "corpus.json").is_file():
            text, origin = scratch / "text", "texts read for this"
            fields = {name: getattr(self.corpus, name) for name in CorpusParams.model_fields}
            prepare_corpus(**fields, output=text, root=Path())
        sample = write_sample(text, scratch / "sample")
        options = self.tokens
        form = options.rendering()
        source = options.tokenizer or self.model.path
        if options.vocab is not None:
            tokenizer = train_tokenizer(training_texts(sample, **form), vocab=options.vocab)
            if sample != text:
                origin += ", with a tokenizer trained on the sample"
        elif source is not None:
            is_teachers = options.tokenizer is None
            tokenizer = load_tokenizer(
                source,
                revision=self.model.revision if is_teachers else None,
                trust_remote_code=is_teachers and self.model.trust_remote_code,
            )
        else:
            raise ConfigError(
                f"teachers.{self.name}.tokens: no tokenizer; give vocab to train one, or "
                "tokenizer with a directory or hub id"
            )
        meta = tokenize_corpus(
            corpus=sample,
            tokenizer=tokenizer,
            max_length=options.max_length,
            overlong=options.overlong,
            output=scratch / "tokens",
            **form,
        )
        usual = "split" if meta.task == "causal-lm" else "truncate"
        return sampled(
            TokenSet.load(scratch / "tokens"),
            read_corpus_meta(text),
            read_corpus_meta(sample),
            splits_rows=(options.overlong or usual) == "split",
            origin=origin,
        )
