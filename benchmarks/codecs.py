"""One shard, by our codec and by Zarr's two pipelines: the same chunks, the same compressor."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from benchmarks.synthetic import stopwatch
from pipeline.store.codec import LEVEL, encode_shard

PIPELINES = {
    "zarr's Python pipeline": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "zarrs": "zarrs.ZarrsCodecPipeline",
}
CHUNK_ROWS = 256
LAPS = 7


def levels(rows: int, width: int) -> NDArray[np.int8]:
    """Return int8 levels spread as those of standardised hidden states are."""
    values = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    return np.round(values * (127 / np.abs(values).max(1, keepdims=True))).astype(np.int8)


def by_zarr(values: NDArray[np.int8], directory: Path) -> int:
    """Write the shard as an array of its own; return the bytes of its file."""
    store = LocalStore(directory)
    array = zarr.create_array(
        store,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(CHUNK_ROWS, values.shape[1]),
        shards=values.shape,
        filters=None,
        compressors=[
            BloscCodec(cname="zstd", clevel=LEVEL, shuffle="bitshuffle", typesize=1),
            Crc32cCodec(),
        ],
        overwrite=True,
    )
    array[:] = values
    return sum(path.stat().st_size for path in (directory / "c").rglob("*") if path.is_file())


def by_us(values: NDArray[np.int8], directory: Path) -> int:
    """Encode the shard and write it, unsynced as Zarr leaves it."""
    return (directory / "shard").write_bytes(encode_shard(values, CHUNK_ROWS))


def timed(
    write: Callable[[NDArray[np.int8], Path], int], rows: int, width: int
) -> dict[str, float]:
    """Return milliseconds and bytes a value of writing one shard."""
    values, laps, size = levels(rows, width), [], 0
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(LAPS + 1):
            with stopwatch() as watch:
                size = write(values, Path(directory))
            laps.append((watch.seconds, watch.cpu_seconds))
    wall, cpu = (1e3 * statistics.median(column) for column in zip(*laps[1:], strict=True))
    return {"ms": wall, "cpu_ms": cpu, "bytes": size / values.size}


def codec_rows(*, quick: bool) -> list[dict[str, Any]]:
    """Measure each pipeline in a process of its own, for it is a setting of the whole process."""
    found = []
    for name in ("ours", *PIPELINES):
        if name == "zarrs" and find_spec("zarrs") is None:
            continue
        command = [sys.executable, "-m", "benchmarks.codecs", name, "4096" if quick else "16384"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append({"name": name, **json.loads(done.stdout)})
    return found


if __name__ == "__main__":
    chosen, shard_rows = sys.argv[1], int(sys.argv[2])
    if chosen != "ours":
        zarr.config.set({"codec_pipeline.path": PIPELINES[chosen]})
    print(json.dumps(timed(by_us if chosen == "ours" else by_zarr, shard_rows, 384)))
