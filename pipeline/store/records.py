"""The JSON records of a signal: declaration, receipt and manifest.

A *declaration* describes a signal before any of it is written, a *receipt* states that one segment
is durable, a *manifest* that all are. The *index* lists the manifests that count. Everything except
`software` enters a digest.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.provenance import fingerprint
from pipeline.registry import Origin
from pipeline.store.forms.form import ArrayType, Geometry, options
from pipeline.store.forms.registry import origin_of, stored_form
from pipeline.store.schema import check_declaration, check_manifest, check_receipt
from pipeline.store.signals import Signal


@dataclass(frozen=True)
class Declaration(Signal):
    """A signal with its sizes and everything else that a reader needs to decode and use it.

    Attributes:
        geometry: The sizes of its values.
        splits: The splits whose segments have the signal.
        info: Mask rule and scaling of an attention layer, or scale and softcap of a head; and the
            index entry of each asset that decoding needs, by the asset's name.
        channels: Size and checksum of the file of channel statistics; None if there is none.
    """

    geometry: Geometry
    splits: tuple[str, ...]
    info: dict[str, Any] = field(default_factory=dict)
    channels: dict[str, int] | None = None

    @classmethod
    def of(
        cls,
        signal: Signal,
        geometry: Geometry,
        splits: tuple[str, ...],
        info: dict[str, Any],
        channels: dict[str, int] | None,
    ) -> "Declaration":
        """Declare `signal`."""
        return cls(signal.form, signal.layer, geometry, splits, info, channels)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Declaration":
        """Read what `to_json` wrote.

        Raises:
            IntegrityError: If keys, types, names or sizes are not those of a declaration.
            IncompatibleError: If this software does not have the form that wrote the signal.
        """
        check_declaration(value, Path("declaration of a signal"))
        return cls.of_checked(value)

    @classmethod
    def of_checked(cls, value: dict[str, Any]) -> "Declaration":
        """Read what was checked as part of a manifest.

        Raises:
            IncompatibleError: If this software does not have the form that wrote the signal.
        """
        origin = value.get("origin")
        try:
            form = stored_form(
                value["kind"],
                value["form"],
                value["form_version"],
                value["options"],
                None if origin is None else Origin(**origin),
            )
        except IncompatibleError as error:
            raise IncompatibleError(f"{value['signal']}: {error}") from error
        return cls(
            form,
            value["layer"],
            Geometry(**value["geometry"]),
            tuple(value["splits"]),
            value["info"],
            value["channels"],
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        origin = origin_of(self.form)
        return {
            "signal": self.name,
            "kind": self.kind,
            "layer": self.layer,
            "form": self.form.name,
            "form_version": self.form.version,
            "options": options(self.form),
            "geometry": asdict(self.geometry),
            "splits": list(self.splits),
            "info": self.info,
            "channels": self.channels,
            **({} if origin is None else {"origin": origin.model_dump()}),
        }

    @property
    def rule(self) -> str | None:
        """Which keys a query sees, `causal` or `full`; None if the signal is not attention."""
        return self.info.get("rule")

    @property
    def asset_entries(self) -> dict[str, dict[str, Any]]:
        """The index entry of each asset that decoding needs, by the asset's name."""
        return {name: entry for name, entry in self.info.items() if isinstance(entry, dict)}

    def digest(self) -> str:
        """Return the fingerprint that ties receipts to this declaration."""
        return fingerprint(self.to_json())

    def arrays(self) -> dict[str, ArrayType]:
        """Return the stored arrays by name."""
        return self.form.arrays(self.geometry)


@dataclass(frozen=True)
class Receipt:
    """States that one segment of one signal is durable.

    Attributes:
        segment: The segment's number.
        declaration: Digest of the declaration under which the segment was written.
        tokens: Tokens of the segment.
        examples: Examples of the segment.
        rows: Digest of the identities of the segment's examples, which joins features and tokens.
        content: Digest of the stored values in token order; the manifest's digest is made of it.
        skipped: Slots of examples whose features were not finite.
        files: Size and checksum of each shard, by its path in the store.
    """

    segment: int
    declaration: str
    tokens: int
    examples: int
    rows: str
    content: str
    skipped: tuple[int, ...]
    files: dict[str, dict[str, int]]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Receipt":
        """Read what `asdict` wrote.

        Raises:
            IntegrityError: If keys, types, names or sizes are not those of a receipt.
        """
        check_receipt(value, Path("receipt"))
        return cls.of_checked(value)

    @classmethod
    def of_checked(cls, value: dict[str, Any]) -> "Receipt":
        """Read what was checked as part of a manifest."""
        try:
            return cls(**{**value, "skipped": tuple(value["skipped"])})
        except TypeError as error:
            raise IntegrityError(f"receipt: {error}; capture the segment again") from error


@dataclass(frozen=True)
class StoredSignal:
    """A complete signal.

    Attributes:
        declaration: Its declaration.
        digest: Digest of its values.
        receipts: The receipt of each segment, by its number.
        software: Versions of the software that computed it.
    """

    declaration: Declaration
    digest: str
    receipts: dict[int, Receipt]
    software: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Compressed bytes on disk."""
        return sum(f["bytes"] for receipt in self.receipts.values() for f in receipt.files.values())

    @property
    def tokens(self) -> int:
        """Tokens that have the signal."""
        return sum(receipt.tokens for receipt in self.receipts.values())


def signal_digest(declaration: Declaration, receipts: list[Receipt]) -> str:
    """Return the digest of a signal's values, independent of host, time and compression."""
    return fingerprint(
        {
            "declaration": declaration.to_json(),
            "segments": [[r.segment, r.rows, r.content, list(r.skipped)] for r in receipts],
        }
    )


def of_manifest(manifest: dict[str, Any], path: Path) -> tuple[Declaration, list[Receipt]]:
    """Return the declaration and the receipts of a manifest, after checking them.

    Raises:
        IntegrityError: If keys, types, names or sizes are not those of a manifest.
    """
    check_manifest(manifest, path)
    declaration = Declaration.of_checked(manifest["declaration"])
    return declaration, [Receipt.of_checked(value) for value in manifest["receipts"]]


def manifest_json(
    declaration: Declaration, receipts: list[Receipt], software: dict[str, str]
) -> dict[str, Any]:
    """Return the manifest of a complete signal."""
    return {
        "declaration": declaration.to_json(),
        "digest": signal_digest(declaration, receipts),
        "receipts": [asdict(receipt) for receipt in receipts],
        "software": software,
    }
