"""Writes `tests/golden/store_v1` and what it decodes to. Run once for a format, never again.

    python -m tests.golden.write_store tests/golden/store_v1

The expected values are those that the software decoded on the day the store was written.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

from pipeline.store.reader import StoreReader
from tests.store.synthetic import Synthetic


def decoded(store: Path) -> dict[str, np.ndarray]:
    """Every signal of every segment, decoded, with the rows and tokens they belong to."""
    reader = StoreReader(store)
    found: dict[str, np.ndarray] = {}
    for number in range(len(reader.plan["segments"])):
        segment = reader.read_segment(number, reader.signals)
        found |= {f"{column}:{number}": values for column, values in segment.tokens.items()}
        for name in reader.signals:
            declared = reader.signal(name).declaration
            values = declared.build_form().decode(segment.features[name], reader.channels(name))
            found |= {f"{name}:{key}:{number}": value for key, value in values.items()}
    return found | {f"examples:{key}": column for key, column in reader.examples.items()}


def main(path: Path) -> None:
    """Write the store and, beside it, its values."""
    if path.exists():
        raise SystemExit(f"{path}: is there; a golden store is written once")
    Synthetic(path).run()
    # What readers do not need.
    shutil.rmtree(path / "receipts")
    (path / "lock").unlink()
    shutil.rmtree(path / "staging", ignore_errors=True)
    np.savez_compressed(path.with_name(f"{path.name}.npz"), **decoded(path))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
