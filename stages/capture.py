"""capture@T: the teacher runs once and its features go to the store."""

from pathlib import Path
from typing import Annotated, Any, Literal

import click
from pydantic import ConfigDict, Field

from pipeline.corpus.tokens import TokenSet
from pipeline.errors import ConfigError
from pipeline.store.forms.registry import build_form
from pipeline.store.layout import Layout
from pipeline.teacher.reference import TeacherReference
from pipeline.teacher.request import LayerRequest, resolve_layers, resolve_signals
from pipeline.teacher.spec import SegmentOptions, store_fingerprint, store_spec
from pipeline.teacher.whole import is_whole, write_manifests
from stages.command import params_option, stage
from stages.project import DATA, Section, prepare_torch, runtime, section, stores

Positive = Annotated[int, Field(ge=1)]


class Every(Section):
    """Every n-th layer, counted back from the last."""

    every: Positive


Layers = Literal["all"] | Every | list[int]


class LayersIn(Section):
    """Layers of one kind in one form; further keys are the form's options."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    layers: Layers
    form: str

    def request(self, kind: Literal["hidden", "attention"]) -> LayerRequest:
        """Return the library's words for it."""
        layers: Any = (
            {"every": self.layers.every} if isinstance(self.layers, Every) else self.layers
        )
        return LayerRequest(kind, layers, build_form(kind, self.form, self.model_extra or {}))


class LogitsIn(Section):
    """The form of the logits; further keys are its options."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    form: str


class CaptureParams(Section):
    """Section `teachers.T.capture`."""

    hidden: LayersIn | tuple[LayersIn, ...] = ()
    attention: LayersIn | tuple[LayersIn, ...] = ()
    logits: LogitsIn | None = None
    blocks: Layers | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    limit: Positive | None = None
    segment_tokens: Positive = 16384
    chunk_tokens: Positive = 256
    batch_tokens: Positive = 8192
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: Annotated[int, Field(ge=0)] = 0
    nonfinite: Literal["stop", "skip"] = "stop"

    def requests(self) -> list[LayerRequest]:
        """Return hidden states, then attention."""
        hidden = self.hidden if isinstance(self.hidden, tuple) else [self.hidden]
        attention = self.attention if isinstance(self.attention, tuple) else [self.attention]
        return [
            *(one.request("hidden") for one in hidden),
            *(one.request("attention") for one in attention),
        ]


@click.command()
@click.argument("teacher")
@click.option("--no-wait", is_flag=True, help="Exit with 5 if another process writes the store.")
@params_option
@stage
def capture(teacher: str, params: Path, no_wait: bool) -> None:
    """Run TEACHER once over the corpus and write its features to data/stores.

    Only what the store lacks is computed; a store that is whole is recognised in a second.

    \b
    Example:
      decant capture main
    """
    key = f"teachers.{teacher}.capture"
    options = section(params, key, CaptureParams)
    if options.segment_tokens % options.chunk_tokens:
        raise ConfigError(
            f"{params}: {key}.segment_tokens: {options.segment_tokens} is no multiple of "
            f"chunk_tokens "
            f"{options.chunk_tokens}; change one of them"
        )
    tokens, directory = DATA / "corpus" / "tokens" / teacher, DATA / "teachers" / teacher
    reference = TeacherReference.load(directory)
    meta = TokenSet.load(tokens).meta
    logits = options.logits
    signals = resolve_signals(
        options.requests(),
        None if logits is None else build_form("logits", logits.form, logits.model_extra or {}),
        depth=reference.layers,
        task=meta.task,
        key=key,
    )
    blocks = _blocks(options.blocks, reference.layers, f"{key}.blocks")
    segments = SegmentOptions(
        fraction=options.fraction,
        limit=options.limit,
        segment_tokens=options.segment_tokens,
        chunk_tokens=options.chunk_tokens,
        batch_tokens=options.batch_tokens,
        dtype=options.dtype,
        seed=options.seed,
    )
    layout = Layout(stores() / store_fingerprint(store_spec(meta, reference, segments)))
    if not is_whole(layout, signals, blocks):
        from pipeline.teacher.capture import Runtime
        from pipeline.teacher.capture import capture as run

        machine = runtime()
        run(
            tokens=tokens,
            teacher=directory,
            stores=stores(),
            signals=signals,
            blocks=blocks,
            options=segments,
            nonfinite=options.nonfinite,
            runtime=Runtime(
                device=prepare_torch(machine),
                scheduler=machine.scheduler,
                workers=machine.workers,
                writers=machine.writers,
                wait=not no_wait,
            ),
        )
    write_manifests(layout, DATA / "manifests" / teacher, reference, signals, blocks)
    click.echo(f"store {layout.root.name} is whole: {len(signals)} signals", err=True)


def _blocks(blocks: Layers | None, depth: int, key: str) -> list[int]:
    if blocks is None:
        return []
    layers: Any = {"every": blocks.every} if isinstance(blocks, Every) else blocks
    return resolve_layers(layers, first=1, depth=depth, key=key)


if __name__ == "__main__":
    capture()
