"""prepare: raw sources become text examples with splits, the same for every teacher."""

from pathlib import Path

import click

from pipeline.corpus.text.parameters import CorpusParams
from pipeline.corpus.text.prepare import prepare_corpus
from stages.command import params_option, stage
from stages.parameters import section
from stages.project import DATA


@click.command()
@params_option
@stage
def prepare(params: Path) -> None:
    """Read the corpus and write its splits.

    They go to data/corpus/text.

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
        added=options.added,
    )


if __name__ == "__main__":
    prepare()
