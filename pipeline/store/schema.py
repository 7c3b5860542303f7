"""Schemas of a store's records, checked when a record is read: a store may come from anywhere.

A seal proves that a record was not altered, not who wrote it. So keys, types, sizes and names are
checked once, and later code may multiply sizes and join paths without checks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
    with_config,
)

# Pydantic's own requirement, and what it asks for below Python 3.12.
from typing_extensions import TypedDict

from pipeline.errors import IntegrityError
from pipeline.registry import Origin
from pipeline.tasks import Task

MAX_COUNT = 2**40
"""The largest count of rows, tokens or bytes: beyond any store, and far from an int64 overflow."""
MAX_SHOWN = 80
MAX_NAME_BYTES = 255
"""The longest name of a file or directory in any file system."""
SIGNAL = r"^((hidden|attention|value)/[0-9]{1,6}|logits)/[a-z0-9_]{1,40}-[0-9a-f]{8}$"

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Size = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Small = Annotated[int, Field(ge=0, lt=2**31)]
Split = Literal["train", "validation", "test"]


def _plain_path(name: str) -> str:
    """Refuse paths that are not in the one plain form of a path below a directory."""
    # Without pathlib: a large store has a million paths.
    parts = name.split("/")
    is_plain = name.isprintable() and {"", ".", ".."}.isdisjoint(parts)
    is_long = len(name.encode()) > MAX_NAME_BYTES
    if not is_plain or (is_long and any(len(part.encode()) > MAX_NAME_BYTES for part in parts)):
        raise ValueError("expected a plain path inside the store")
    return name


PlainPath = Annotated[str, AfterValidator(_plain_path), Field(max_length=1000)]
SignalName = Annotated[str, Field(pattern=SIGNAL)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    """An object in a record. Later versions may add keys."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


@with_config(ConfigDict(extra="forbid", strict=True))
class _File(TypedDict):
    # A dictionary, like a receipt: a large store has a million of them.
    bytes: Size
    xxh3: Annotated[int, Field(ge=0, lt=2**64)]


class _Signal(_Record):
    digest: Digest
    manifest: _File


@with_config(ConfigDict(extra="allow", strict=True))
class _Asset(_File):
    file: PlainPath


_ASSET = TypeAdapter(_Asset)


class _Geometry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    width: Small = 0
    heads: Small = 0
    kv_heads: Small = 0
    d_head: Small = 0
    vocab: Small = 0


class _Declaration(_Record):
    signal: SignalName
    kind: Literal["hidden", "attention", "value", "logits"]
    layer: Annotated[int, Field(ge=0)] | None
    form: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")]
    form_version: int
    options: dict[str, Any]
    geometry: _Geometry
    splits: Annotated[list[Split], Field(min_length=1)]
    info: dict[str, Any]
    channels: _File | None
    origin: Origin | None = None

    @model_validator(mode="after")
    def _is_named_after_what_it_is(self) -> "_Declaration":
        place = self.kind if self.layer is None else f"{self.kind}/{self.layer}"
        if not self.signal.startswith(f"{place}/{self.form}-"):
            raise ValueError(f"expected a signal {place} in form {self.form}")
        for name, entry in self.info.items():
            if isinstance(entry, dict):
                _ASSET.validate_python(entry)
            elif name == "rule" and entry not in ("causal", "full"):
                raise ValueError("expected the rule causal or full")
        return self


@with_config(ConfigDict(extra="allow", strict=True))
class _Receipt(TypedDict):
    segment: Size
    declaration: Digest
    tokens: Size
    examples: Size
    rows: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    content: Digest
    skipped: list[Size]
    files: dict[PlainPath, _File]


class _Manifest(_Record):
    declaration: _Declaration
    digest: Digest
    receipts: list[_Receipt]
    software: dict[str, str] = {}


class _Index(_Record):
    plan: _File
    signals: dict[SignalName, _Signal]
    assets: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")], _Asset]


class _Cut(_Record):
    """How segments were cut and computed, as far as commands show it."""

    fraction: float = 1
    limit: int | None = None
    dtype: str = ""
    batch_tokens: int | Literal["auto"] = 0


@with_config(ConfigDict(extra="forbid", strict=True))
class _Packing(TypedDict):
    method: Annotated[str, Field(max_length=40)]
    bits: Annotated[int, Field(ge=1, le=16)]


class _Teacher(_Record):
    weights_sha256: str = ""
    config: str = ""
    revision: str | None = None
    quantization: _Packing | None = None


class _Spec(_Record):
    segments: _Cut = _Cut()
    teacher: _Teacher = _Teacher()
    tokens: str = ""
    tokenizer: str = ""
    parts: list[Size] = []


class _Plan(_Record):
    spec: _Spec
    task: Task
    classes: list[str]
    vocab: Count
    pad_id: Size
    max_length: Count
    chunk_tokens: Count
    segment_tokens: Count
    examples_per_segment: Count
    examples: Count
    outputs: Size = 0
    columns: list[Literal["input_ids", "loss_mask", "token_type_ids"]]
    segments: Annotated[list[Split], Field(min_length=1)]
    parts: list[Size] = []
    batch_tokens: Count | None = None
    files: dict[PlainPath, _File]

    @model_validator(mode="after")
    def _fits(self) -> "_Plan":
        if self.segment_tokens % self.chunk_tokens:
            raise ValueError("segment_tokens: expected a multiple of chunk_tokens")
        if "input_ids" not in self.columns or len(set(self.columns)) < len(self.columns):
            raise ValueError("columns: expected input_ids, and each column once")
        if self.spec.segments.batch_tokens == "auto" and self.batch_tokens is None:
            raise ValueError("batch_tokens: expected the number that auto came to")
        if self.parts and sum(self.parts) != self.segments.count("train"):
            raise ValueError("parts: expected the segments of train in all")
        return self


_INDEX, _PLAN, _MANIFEST = TypeAdapter(_Index), TypeAdapter(_Plan), TypeAdapter(_Manifest)
_DECLARATION, _RECEIPT = TypeAdapter(_Declaration), TypeAdapter(_Receipt)


def check_index(index: dict[str, Any], path: Path) -> None:
    """Refuse an index with wrong keys, types or names.

    Raises:
        IntegrityError: Naming file and key.
    """
    _check(_INDEX.validate_python, index, path)


def check_plan(plan: dict[str, Any], path: Path) -> None:
    """Refuse a plan with wrong keys, types, names or sizes.

    Raises:
        IntegrityError: Naming file and key.
    """
    _check(_PLAN.validate_python, plan, path)


def check_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Refuse a manifest with wrong keys, types, names or sizes.

    Raises:
        IntegrityError: Naming file and key.
    """
    _check(_MANIFEST.validate_python, manifest, path)


def check_declaration(declaration: dict[str, Any], path: Path) -> None:
    """Refuse a declaration with wrong keys, types, names or sizes.

    Raises:
        IntegrityError: Naming file and key.
    """
    _check(_DECLARATION.validate_python, declaration, path)


def check_receipt(receipt: dict[str, Any], path: Path) -> None:
    """Refuse a receipt with wrong keys, types, names or sizes.

    Raises:
        IntegrityError: Naming file and key.
    """
    _check(_RECEIPT.validate_python, receipt, path)


def _check(validate: Callable[[Any], object], value: dict[str, Any], path: Path) -> None:
    try:
        validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(step) for step in first["loc"] if step != "[key]")[:MAX_SHOWN]
        raise IntegrityError(
            f"{path}: {key!r}: {first['msg']}; the record is no capture's: delete the store's "
            "directory and capture again"
        ) from error
