"""Where things lie inside a store directory."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.store.signals import dotted

FORMAT = 1
"""Version of the layout and conventions; part of every store's fingerprint."""


@dataclass(frozen=True)
class Layout:
    """Paths of one store, `data/stores/<fingerprint>`."""

    root: Path

    @property
    def features(self) -> Path:
        """The Zarr v3 group that any reader opens."""
        return self.root / "features.zarr"

    @property
    def tokens(self) -> Path:
        """The shards of the ids, one file a segment."""
        return self.features / "tokens" / "input_ids" / "c"

    @property
    def assets(self) -> Path:
        """Tokenizer, teacher configuration, channel statistics, head and blocks."""
        return self.root / "assets"

    @property
    def index(self) -> Path:
        """The list of whole signals, replaced atomically."""
        return self.root / "manifest.json"

    @property
    def plan(self) -> Path:
        """What the planner wrote and its digests; written after all of it."""
        return self.manifests / "plan.json"

    @property
    def manifests(self) -> Path:
        """The plan's record and one manifest a whole signal."""
        return self.root / "manifests"

    @property
    def asset_records(self) -> Path:
        """What the index says of each asset, should it be lost."""
        return self.root / "receipts" / "assets"

    @property
    def staging(self) -> Path:
        """Shards on their way; safe to delete when no capture runs."""
        return self.root / "staging"

    def attempt(self, name: str) -> Path:
        """Where the workers of one attempt stage shards; gone when the attempt is over."""
        return self.staging / name

    def staged(self, attempt: str, name: str, checksum: int) -> Path:
        """A shard before it is in place, by its name in the store and its content's checksum.

        Two workers that computed one segment twice never write into each other's file.
        """
        return self.attempt(attempt) / f"{dotted(name)}.{checksum:016x}"

    @property
    def lock(self) -> Path:
        """Held, by kernel lock, by the one process that writes."""
        return self.root / "lock"

    def manifest(self, signal: str) -> Path:
        """Written when all receipts of the signal are there."""
        return self.manifests / f"{dotted(signal)}.json"

    def declaration(self, signal: str) -> Path:
        """Written before any of the signal's shards."""
        return self.root / "receipts" / dotted(signal) / "declaration.json"

    def receipt(self, signal: str, segment: int) -> Path:
        """Written after the shards of one segment are durable."""
        return self.root / "receipts" / dotted(signal) / f"{segment:06d}.json"

    def channels(self, kind: str, layer: int | None) -> Path:
        """Channel statistics of a hidden layer or of the head's input."""
        name = kind if layer is None else f"{kind}.{layer}"
        return self.assets / "channels" / f"{name}.safetensors"
