"""Writes a store of the forms that no golden store has yet, and what it decodes to.

    python -m tests.golden.write_store tests/golden/store_v1

The expected values are those that the software decoded on the day the store was written, so each is
written once and never again.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

from pipeline.store.reader import StoreReader
from tests.store.synthetic import SIGNALS, Synthetic


def decoded(store: Path) -> dict[str, np.ndarray]:
    """Every signal of every segment, decoded, with the rows and tokens they belong to."""
    reader = StoreReader(store)
    found: dict[str, np.ndarray] = {}
    for number in range(len(reader.plan["segments"])):
        segment = reader.read_segment(number, reader.signals)
        found |= {f"{column}:{number}": values for column, values in segment.tokens.items()}
        for name in reader.signals:
            declared = reader.signal(name).declaration
            values = declared.form.decode(segment.features[name], reader.channels(name))
            found |= {f"{name}:{key}:{number}": value for key, value in values.items()}
    return found | {f"examples:{key}": column for key, column in reader.examples.items()}


def forms(store: Path) -> set[tuple[str, str, int]]:
    """Kind, name and version of every form in a store."""
    reader = StoreReader(store)
    declared = [reader.signal(name).declaration for name in reader.signals]
    return {(one.kind, one.form.name, one.form.version) for one in declared}


def main(path: Path) -> None:
    """Write the store and, beside it, its values."""
    if path.exists():
        raise SystemExit(f"{path}: is there; a golden store is written once")
    kept = {form for other in path.parent.glob("store_v*/") for form in forms(other)}
    new = tuple(
        name for name, s in SIGNALS.items() if (s.kind, s.form.name, s.form.version) not in kept
    )
    Synthetic(path).run(new)
    # What readers do not need.
    shutil.rmtree(path / "receipts")
    (path / "lock").unlink()
    shutil.rmtree(path / "staging", ignore_errors=True)
    np.savez_compressed(path.with_name(f"{path.name}.npz"), **decoded(path))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
