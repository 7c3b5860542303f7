"""prepare: raw sources become text examples with splits, the same for every teacher."""

from pathlib import Path
from typing import Annotated, Literal

import click
from pydantic import Field

from pipeline.corpus.prepare import CorpusSource, prepare_corpus
from stages.command import params_option, stage
from stages.project import DATA, Section, section

Share = Annotated[float, Field(gt=0, lt=0.5)]


class CorpusParams(Section):
    """Section `corpus`."""

    source: CorpusSource
    task: Literal["causal-lm", "classification"]
    classes: list[str] | None = None
    validation_share: Share = 0.05
    test_share: Share = 0.05
    seed: int = 0


@click.command()
@params_option
@stage
def prepare(params: Path) -> None:
    """Read the corpus and write its splits to data/corpus/text.

    \b
    Example:
      decant prepare
    """
    options = section(params, "corpus", CorpusParams)
    prepare_corpus(
        source=options.source,
        task=options.task,
        classes=options.classes,
        seed=options.seed,
        validation_share=options.validation_share,
        test_share=options.test_share,
        output=DATA / "corpus" / "text",
        root=Path(),
    )


if __name__ == "__main__":
    prepare()
