"""tokenize@T: text becomes ids with teacher T's tokenizer, or with one trained on the corpus."""

from pathlib import Path
from typing import Any

import click

from pipeline.errors import ConfigError
from pipeline.teacher.parameters.tokens import TokenParams
from stages.command import params_option, stage
from stages.parameters import section
from stages.project import DATA


@click.command("tokenize")
@click.argument("teacher")
@params_option
@stage
def tokenize(teacher: str, params: Path) -> None:
    """Tokenise the corpus for TEACHER.

    The token rows go to data/corpus/tokens/TEACHER.

    \b
    Example:
      decant tokenize main
    """
    options = section(params, f"teachers.{teacher}.tokens", TokenParams)
    model = section(params, f"teachers.{teacher}.model", dict[str, Any])
    from pipeline.corpus.tokens.tokenize import tokenize_corpus, training_texts
    from pipeline.corpus.tokens.tokenizer import load_tokenizer, train_tokenizer

    corpus = DATA / "corpus" / "text"
    form = options.rendering()
    if options.vocab is not None:
        tokenizer = train_tokenizer(training_texts(corpus, **form), vocab=options.vocab)
    else:
        source = options.tokenizer or model.get("path")
        if source is None:
            raise ConfigError(
                f"{params}: teachers.{teacher}.tokens: no tokenizer; give vocab to train one, or "
                "tokenizer with a directory or hub id"
            )
        # Revision and trust apply to the teacher's repository only.
        is_teachers = options.tokenizer is None
        tokenizer = load_tokenizer(
            source,
            revision=model.get("revision") if is_teachers else None,
            trust_remote_code=is_teachers and model.get("trust_remote_code") is True,
        )
    tokenize_corpus(
        corpus=corpus,
        tokenizer=tokenizer,
        max_length=options.max_length,
        overlong=options.overlong,
        output=DATA / "corpus" / "tokens" / teacher,
        **form,
    )


if __name__ == "__main__":
    tokenize()
