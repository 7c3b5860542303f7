"""The paths of files and directories in a store."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.store.signals import dotted

FORMAT = 1
"""Version of the layout and conventions; it enters every store's fingerprint."""
BLOCKS = "blocks"
"""Name of the asset with the teacher's blocks that students start from; no signal needs it."""


@dataclass(frozen=True)
class Layout:
    """Paths of one store, `data/stores/<fingerprint>`."""

    root: Path

    @property
    def features(self) -> Path:
        """The Zarr v3 root group, which any Zarr reader opens."""
        return self.root / "features.zarr"

    @property
    def tokens(self) -> Path:
        """The directory of the shards of token ids, one file a segment."""
        return self.features / "tokens" / "input_ids" / "c"

    @property
    def assets(self) -> Path:
        """Tokenizer, teacher configuration, channel statistics, head and blocks."""
        return self.root / "assets"

    @property
    def index(self) -> Path:
        """The index: the list of complete signals, replaced atomically."""
        return self.root / "manifest.json"

    @property
    def plan(self) -> Path:
        """The plan's record, written after all planned files and listing their checksums."""
        return self.manifests / "plan.json"

    @property
    def manifests(self) -> Path:
        """The directory of the plan's record and of one manifest per complete signal."""
        return self.root / "manifests"

    @property
    def asset_records(self) -> Path:
        """The directory of the index entries of assets, from which a lost index is rebuilt."""
        return self.root / "receipts" / "assets"

    @property
    def staging(self) -> Path:
        """The directory of unpublished shards; safe to delete when no capture runs."""
        return self.root / "staging"

    def attempt(self, name: str) -> Path:
        """The directory where the workers of an attempt stage shards; removed after the attempt."""
        return self.staging / name

    def staged(self, attempt: str, name: str, checksum: int) -> Path:
        """The path of a staged shard, made of its name in the store and its content's checksum.

        Two workers that compute the same segment never write to each other's file.
        """
        return self.attempt(attempt) / f"{dotted(name)}.{checksum:016x}"

    @property
    def lock(self) -> Path:
        """The lock file, locked by the writing process."""
        return self.root / "lock"

    def manifest(self, signal: str) -> Path:
        """The manifest of a signal, written when all its receipts exist."""
        return self.manifests / f"{dotted(signal)}.json"

    def declaration(self, signal: str) -> Path:
        """The declaration of a signal, written before its shards."""
        return self.root / "receipts" / dotted(signal) / "declaration.json"

    def receipt(self, signal: str, segment: int) -> Path:
        """The receipt of a segment, written after its shards are durable."""
        return self.root / "receipts" / dotted(signal) / f"{segment:06d}.json"

    def channels(self, kind: str, layer: int | None) -> Path:
        """The channel statistics of a hidden layer or of the head's input."""
        name = kind if layer is None else f"{kind}.{layer}"
        return self.assets / "channels" / f"{name}.safetensors"
