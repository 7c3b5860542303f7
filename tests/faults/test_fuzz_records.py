"""Records of any content, sealed or not: an error of ours or the truth, never anything else."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DecantError
from pipeline.store.index import ensure_index
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.sealed import SEAL, record_bytes
from pipeline.store.shards import bytes_digest
from pipeline.teacher.capture.complete import is_complete
from pipeline.teacher.capture.declare import load_declaration
from tests.store.fixtures import without_sync
from tests.store.synthetic import SIGNALS, Synthetic, name_of, plan

pytestmark = pytest.mark.usefixtures("unsynced")
NAMES = (name_of("hidden", 2, "int8"), name_of("attention", 3, "below"))
MAX_SECONDS = 5.0
"""Of CPU, for all that is done with one store of forty small files."""

NUMBERS = st.sampled_from([0, 1, -1, 2**31, 2**40, 2**63, 2**70, 10**400]) | st.integers()
TEXTS = st.sampled_from(
    ["", "..", "../../canary", "/etc/passwd", "a/../b", "\0", "causal", "train", *NAMES]
) | st.text(max_size=8)
LEAVES = (
    st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.just("bytes"), inner, max_size=3)
    ),
    max_leaves=6,
)


class Records:
    """The records of a whole store, to be altered and put back."""

    def __init__(self, store: Path) -> None:
        self.layout = Layout(store)
        layout = self.layout
        self.paths = [
            layout.index,
            layout.plan,
            *(path(name) for name in NAMES for path in (layout.manifest, layout.declaration)),
            layout.receipt(NAMES[0], 0),
            layout.receipt(NAMES[1], 2),
            layout.asset_records / "lm_head.json",
        ]
        self._whole = {path: path.read_bytes() for path in self._all()}

    def _all(self) -> list[Path]:
        below = [*self.layout.manifests.rglob("*"), *(self.layout.root / "receipts").rglob("*")]
        return [self.layout.index, *(path for path in below if path.is_file())]

    def content(self, path: Path) -> bytes:
        return self._whole[path]

    def restore(self) -> None:
        for path, data in self._whole.items():
            path.write_bytes(data)
        for path in set(self._all()) - self._whole.keys():
            path.unlink()

    def forge(self, path: Path, value: dict[str, Any]) -> None:
        """Write a record that nothing but its content gives away: sealed, and pinned anew."""
        path.write_bytes(record_bytes(value))
        index = json.loads(self.content(self.layout.index))
        del index[SEAL]
        digest = bytes_digest(path.read_bytes())
        if path == self.layout.plan:
            index["plan"] = digest
        for name in NAMES:
            if path == self.layout.manifest(name):
                found = value.get("digest")
                index["signals"][name] = {"digest": found, "manifest": digest}
        if path != self.layout.index:
            self.layout.index.write_bytes(record_bytes(index))


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Records:
    with without_sync():
        store = Synthetic(tmp_path_factory.mktemp("fuzzed") / "s").run(NAMES)
    return Records(store)


def values(store: Path) -> dict[str, bytes]:
    """All that a reader sees, as bytes."""
    reader = StoreReader(store)
    found = {"config": repr(reader.teacher_config()).encode()}
    found["tokenizer"] = (reader.tokenizer() / "tokenizer.json").read_bytes()
    for name in reader.index["assets"]:
        found[f"asset {name}"] = reader.asset(name).read_bytes()
    for number in range(plan().segments):
        segment = reader.read_segment(number, reader.signals)
        for name, parts in segment.features.items():
            found |= {f"{name}/{part}/{number}": a.tobytes() for part, a in parts.items()}
        found |= {f"{column}/{number}": a.tobytes() for column, a in segment.tokens.items()}
    return found


def steps(store: Path) -> list[Callable[[], object]]:
    """Reading, asking whether there is anything to do, and what a capture does with records."""
    layout, signals = Layout(store), [SIGNALS[name] for name in NAMES]
    synthetic = Synthetic(store)
    return [
        lambda: values(store),
        lambda: is_complete(layout, signals, []),
        lambda: [load_declaration(layout, signal) for signal in signals],
        lambda: [synthetic.writer(name).missing() for name in NAMES],
        lambda: [synthetic.writer(name).commit() for name in NAMES],
        lambda: values(store),
        lambda: ensure_index(layout),
        synthetic.plan,
        lambda: values(store),
        lambda: [synthetic.writer(name).declare() for name in NAMES],
        lambda: [synthetic.writer(name).missing() for name in NAMES],
        lambda: values(store),
    ]


def survives(store: Path, truth: dict[str, bytes]) -> tuple[bool, bool]:
    """Read and write; return whether it took its time and no more, and whether a value was wrong.

    Any exception but ours goes through.
    """
    begun, wrong = time.process_time(), False
    for step in steps(store):
        try:
            found = step()
        except DecantError as error:
            wrong |= "\n" in str(error)
        else:
            if isinstance(found, dict):
                wrong |= any(truth.get(key, value) != value for key, value in found.items())
    return time.process_time() - begun < MAX_SECONDS, wrong


def check(
    records: Records, truth: dict[str, bytes], ledger: Any, fault: str, alter: Callable[[], None]
) -> None:
    records.restore()
    alter()
    try:
        in_time, wrong = survives(records.layout.root, truth)
    except BaseException:
        ledger.record(fault, detected=False)
        raise
    ledger.record(fault, detected=in_time, wrong=wrong)
    assert in_time
    assert not wrong


@pytest.fixture(scope="module")
def truth(records) -> dict[str, bytes]:
    return values(records.layout.root)


def test_any_bytes(records, truth, ledger, times):
    text = VALUES.map(lambda value: json.dumps(value).encode())
    nested = st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b"NaN"])

    @settings(max_examples=times(5, 100))
    @given(st.sampled_from(records.paths), st.binary(max_size=300) | text | nested)
    def run(path: Path, data: bytes) -> None:
        check(
            records, truth, ledger, "fuzzed record: bytes", lambda: path.write_bytes(data) and None
        )

    run()


def test_altered_bytes(records, truth, ledger, times):
    """Bits flipped, pieces cut out, doubled or put in: none is taken for what was written."""

    @settings(max_examples=times(8, 200))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(records.paths))
        whole = records.content(path)
        at = data.draw(st.integers(0, len(whole) - 1))
        end = data.draw(st.integers(at + 1, min(len(whole), at + 40)))
        flipped = bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))])
        altered = data.draw(
            st.sampled_from(
                [
                    whole[:at] + flipped + whole[at + 1 :],
                    whole[:at] + whole[end:],
                    whole[:end] + whole[at:],
                    whole[:at] + b" " + whole[at:],
                    whole[:at],
                ]
            )
        )
        check(
            records,
            truth,
            ledger,
            "fuzzed record: altered",
            lambda: path.write_bytes(altered) and None,
        )

    run()


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to everything in a JSON value."""
    found = [above] if above else []
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*above, key))
    return found


def test_forged_records(records, truth, ledger, times):
    """Other values under a good seal: a seal says that bytes are whole, not who wrote them."""

    @settings(max_examples=times(12, 600))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(records.paths))
        value = json.loads(records.content(path))
        del value[SEAL]
        forged = copy.deepcopy(value)
        place = data.draw(st.sampled_from(places(value)))
        inside = forged
        for key in place[:-1]:
            inside = inside[key]
        match data.draw(st.sampled_from(["replace", "delete", "add"])):
            case "delete":
                del inside[place[-1]]
            case "add" if isinstance(inside, dict):
                inside[data.draw(TEXTS)] = data.draw(VALUES)
            case _:
                inside[place[-1]] = data.draw(VALUES)
        check(records, truth, ledger, "fuzzed record: forged", lambda: records.forge(path, forged))

    run()
