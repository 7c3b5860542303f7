"""Section `corpus`: what prepare reads."""

from typing import Annotated

from pydantic import Field

from pipeline.corpus.sources.registry import CorpusSource
from pipeline.section import Section
from pipeline.tasks import Task

Share = Annotated[float, Field(gt=0, lt=0.5)]


class CorpusParams(Section):
    """Section `corpus`: where text comes from, what task it is for, and how splits are dealt."""

    source: CorpusSource
    added: tuple[CorpusSource, ...] = ()
    task: Task
    classes: list[str] | None = None
    validation_share: Share = 0.05
    test_share: Share = 0.05
    seed: int = 0
