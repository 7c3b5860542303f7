"""capture@T: the teacher runs once and its features are written to the store."""

from pathlib import Path

import click

from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.corpus.tokens.transfer import transfer_tokens
from pipeline.report.words import counted, data
from pipeline.store.layout import Layout
from pipeline.store.upkeep.occupancy import bytes_by_part
from pipeline.teacher.capture.complete import is_complete, write_manifests
from pipeline.teacher.capture.request import resolve_layers, resolve_signals
from pipeline.teacher.capture.spec import store_fingerprint, store_spec
from pipeline.teacher.parameters.capture import CaptureParams, plain_layers
from pipeline.teacher.source.reference import TeacherReference
from stages.command import params_option, resumable
from stages.parameters import section
from stages.project import DATA, prepare_torch, runtime, stores


@click.command()
@click.argument("teacher")
@click.option("--no-wait", is_flag=True, help="Exit with 5 if another process writes the store.")
@click.option("--verify", is_flag=True, help="Read every file and rebuild damaged ones.")
@params_option
@resumable("keeps every finished segment")
def capture(teacher: str, params: Path, no_wait: bool, verify: bool) -> None:
    """Run TEACHER once and write its features to a store.

    The store is a directory of data/stores. Only what it lacks is computed; a complete store is
    recognised in a second, by the sizes of its files.

    \b
    Example:
      decant capture main
    """
    key = f"teachers.{teacher}.capture"
    options = section(params, key, CaptureParams)
    corpus, directory = DATA / "corpus", DATA / "teachers" / teacher
    tokens = transfer_tokens(corpus / "transfer" / teacher, corpus / "tokens" / teacher)
    reference = TeacherReference.load(directory)
    meta = TokenSet.load(tokens).meta
    signals = resolve_signals(
        options.requests(),
        options.logits_form(),
        depth=reference.layers,
        task=meta.task,
        key=key,
    )
    blocks = (
        []
        if options.blocks is None
        else resolve_layers(
            plain_layers(options.blocks), first=1, depth=reference.layers, key=f"{key}.blocks"
        )
    )
    segments = options.segments()
    layout = Layout(stores() / store_fingerprint(store_spec(meta, reference, segments)))
    if verify or not is_complete(layout, signals, blocks):
        from pipeline.teacher.capture.capture import capture as run

        machine = runtime()
        prepare_torch(machine)
        run(
            tokens=tokens,
            teacher=directory,
            stores=stores(),
            signals=signals,
            blocks=blocks,
            options=segments,
            nonfinite=options.nonfinite,
            runtime=machine,
            wait=not no_wait,
        )
    write_manifests(layout, DATA / "manifests" / teacher, reference, signals, blocks)
    sizes = bytes_by_part(layout.root)
    parts = ", ".join(f"{name} {data(size)}" for name, size in sizes.items())
    click.echo(
        f"store {layout.root.name} is complete: {counted(len(signals), 'signal')}, "
        f"{data(sum(sizes.values()))} ({parts})",
        err=True,
    )


if __name__ == "__main__":
    capture()
