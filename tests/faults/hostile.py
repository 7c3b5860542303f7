"""What hostile stores are made of, for the tests of records and files and for those of bombs."""

import os
import socket
from pathlib import Path
from typing import Any

from pipeline.store.shards import bytes_digest
from tests.faults.damage import HIDDEN, Damage, named

MARKER = b"a secret that lies outside"
MANIFEST = f"manifests/{HIDDEN.replace('/', '.')}.json"
CHANNELS = "assets/channels/hidden.2.safetensors"
SHARD = f"features.zarr/{HIDDEN}/values/c/0/0"
MOST_MEMORY = 64 * 2**20
HUGE = 2**40
SECRET = {"file": "../../secret", **bytes_digest(MARKER)}


def canary(store: Path) -> Path:
    """What lies beside the store and must not be looked at."""
    path = store.parent / "secret"
    path.write_bytes(MARKER)
    return path


def declared(**changes: Any) -> Any:
    return lambda manifest: manifest["declaration"].update(changes)


def special(relative: str, kind: str) -> Damage:
    @named(f"{kind}: {relative}")
    def put(store: Path) -> None:
        path = store / relative
        path.unlink()
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "directory":
                path.mkdir()
            case "device":
                path.symlink_to("/dev/zero")
            case "socket":
                with socket.socket(socket.AF_UNIX) as server:
                    here = Path.cwd()
                    os.chdir(path.parent)  # a socket's path has 108 bytes at the most
                    server.bind(path.name)
                    os.chdir(here)
            case "sparse":
                path.touch()
                os.truncate(path, HUGE)
            case "json":
                with path.open("wb") as file:
                    file.write(b'{"a": ' + b"[" * 100_000)
                    file.truncate(100 * 2**20)

    return put


FILES = (
    SHARD,
    f"features.zarr/{HIDDEN}/values/zarr.json",
    "features.zarr/tokens/input_ids/c/0",
    "manifest.json",
    "manifests/plan.json",
    MANIFEST,
    "assets/teacher/config.json",
    "assets/tokenizer/tokenizer.json",
    CHANNELS,
    "assets/lm_head.safetensors",
)
