"""The same damage to the same arrays: what plain Zarr with Dask reads of it, and what ours does.

Run `python -m benchmarks.plain_zarr`: a table for people, and one JSON line last. Each fault ends
in one of three ways: reading raises, wrong values are read and nobody is told, or what is read is
right all the same. Plain is `dask.array.to_zarr` as it comes, and with shards.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import dask
import dask.array as da
import numpy as np
import zarr
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipeline.errors import DecantError
from pipeline.store.reader import StoreReader
from tests.faults.forked import start
from tests.store.synthetic import CHUNK_TOKENS, SEGMENT_TOKENS, Synthetic, name_of

NAMES = (
    name_of("hidden", 1, "float16"),
    name_of("hidden", 2, "int8"),
    name_of("attention", 1, "qk"),
    name_of("attention", 2, "qk"),
)
Arrays = dict[str, NDArray[Any]]
SHARES = (0.0, 0.5, 0.99)


@dataclass
class Count:
    """How often a fault was injected, and how reading ended."""

    injected: int = 0
    raised: int = 0
    wrong: int = 0
    right: int = 0


class Subject(Protocol):
    """A way to write arrays in segments and to read them again."""

    name: str

    def write(self, root: Path, *, other: bool = False) -> None:
        """Write the arrays, or those of another run."""
        ...

    def read(self, root: Path) -> Arrays:
        """Read all that is there."""
        ...

    def files(self, root: Path) -> list[Path]:
        """Return the files that hold values, in order."""
        ...


class Ours:
    """The store of this project."""

    name = "decant"

    def write(self, root: Path, *, other: bool = False) -> None:
        """Write the arrays, or those of another run."""
        Another(root).run(NAMES) if other else Synthetic(root).run(NAMES)

    def read(self, root: Path) -> Arrays:
        """Read the signals that readers see."""
        reader = StoreReader(root)
        found: dict[str, list[NDArray[Any]]] = {}
        for name in sorted(set(reader.signals) & set(NAMES)):
            for number in range(len(reader.plan["segments"])):
                for part, values in reader.read_segment(number, [name]).features[name].items():
                    found.setdefault(f"{name}/{part}", []).append(values)
        return {name: np.concatenate(values) for name, values in found.items()}

    def files(self, root: Path) -> list[Path]:
        """Return the shards."""
        found = (root / "features.zarr" / name for name in NAMES)
        return sorted(p for path in found for p in path.glob("*/c/**/*") if p.is_file())


class Another(Synthetic):
    """A store of other features for the same rows."""

    def buffers(self, writer: Any, segment: int) -> Arrays:
        """Return the features of the next segment in the place of this one's."""
        return super().buffers(writer, (segment + 1) % 4)


@dataclass
class Plain:
    """Zarr as Dask writes it."""

    arrays: Arrays
    shards: bool

    @property
    def name(self) -> str:
        """What the table calls it."""
        return "zarr + dask, shards" if self.shards else "zarr + dask"

    def write(self, root: Path, *, other: bool = False) -> None:
        """Write the arrays, or those of another run."""
        for name, values in self.arrays.items():
            rows = (SEGMENT_TOKENS, *values.shape[1:])
            lazy = da.from_array(values[::-1] if other else values, chunks=rows)
            inner = (CHUNK_TOKENS, *values.shape[1:])
            options: dict[str, Any] = {"shards": rows, "chunks": inner} if self.shards else {}
            with dask.config.set(scheduler="synchronous"):
                da.to_zarr(lazy, str(root), component=name, **options)

    def read(self, root: Path) -> Arrays:
        """Read every array that is there."""
        group = zarr.open_group(root, mode="r")
        found = {}
        for name in self.arrays:
            if name in group:
                array = group[name]
                assert isinstance(array, zarr.Array)
                found[name] = np.asarray(array[...])
        return found

    def files(self, root: Path) -> list[Path]:
        """Return the chunks, or the shards."""
        return sorted(p for p in root.glob("**/c/**/*") if p.is_file())


class Harness:
    """Injects faults into copies of what one subject wrote, the same for equal seeds."""

    def __init__(self, subject: Subject, root: Path, *, seed: int) -> None:
        self.subject = subject
        self.root = root
        self.random = np.random.default_rng(seed)
        self.counts: dict[str, Count] = {}
        for name, other in (("whole", False), ("foreign", True)):
            subject.write(root / name, other=other)
        self.truth = subject.read(root / "whole")

    def run(self, times: int) -> dict[str, Count]:
        """Inject every fault: flips and kills `times` times, the others once for each place."""
        self._each("flipped byte", self._flips(times))
        self._each("cut to 0, 50, 99%", self._cuts())
        self._each("missing file", (lambda files, n=n: files[n].unlink() for n in range(4)))
        self._each(
            "two files swapped", (lambda files, n=n: _swap(*files[n : n + 2]) for n in (0, 1))
        )
        self._each("segment of another run", (self._foreign(number) for number in range(3)))
        self._kills(max(3, times // 8))
        return self.counts

    def _each(self, fault: str, damages: Iterator[Callable[[list[Path]], object]]) -> None:
        for damage in damages:
            copy = shutil.copytree(self.root / "whole", self.root / "copy")
            damage(self.subject.files(copy))
            self._look(fault, copy)
            shutil.rmtree(copy)

    def _look(self, fault: str, root: Path) -> None:
        count = self.counts.setdefault(fault, Count())
        count.injected += 1
        try:
            found = self.subject.read(root)
        except (DecantError, OSError, ValueError, RuntimeError, KeyError, TypeError):
            count.raised += 1
            return
        same = all(np.array_equal(values, self.truth[name]) for name, values in found.items())
        count.right += same
        count.wrong += not same

    def _flips(self, times: int) -> Iterator[Callable[[list[Path]], object]]:
        for _ in range(times):
            which, where, bit = self.random.random(), self.random.random(), self.random.integers(8)

            def flip(
                files: list[Path], which: float = which, where: float = where, bit: int = int(bit)
            ) -> None:
                path = files[int(which * len(files))]
                data = bytearray(path.read_bytes())
                data[int(where * len(data))] ^= 1 << bit
                path.write_bytes(data)

            yield flip

    def _cuts(self) -> Iterator[Callable[[list[Path]], object]]:
        for share in SHARES:
            for number in (0, 5):
                yield lambda files, n=number, share=share: os.truncate(
                    files[n], int(files[n].stat().st_size * share)
                )

    def _foreign(self, number: int) -> Callable[[list[Path]], object]:
        source = self.subject.files(self.root / "foreign")[number]
        return lambda files: shutil.copyfile(source, files[number])

    def _kills(self, times: int) -> None:
        """Kill a process that writes, at moments spread over the time it takes."""
        begun = time.monotonic()
        child = start(self.subject.write, self.root / "timed", stderr=self.root / "stderr")
        assert child.wait() == 0, child.errors()
        seconds = time.monotonic() - begun
        for number in range(times):
            path = self.root / f"killed-{number}"
            child = start(self.subject.write, path, stderr=self.root / "stderr")
            time.sleep(seconds * (number + 1) / (times + 1))
            if child.kill() != 0:
                self._look("writer killed", path)


def _swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def score(times: int, *, seed: int = 0) -> dict[str, dict[str, Count]]:
    """Return the counts of every subject by fault."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        ours = Harness(Ours(), root / "ours", seed=seed)
        found = {Ours.name: ours.run(times)}
        for shards in (False, True):
            plain = Plain(ours.truth, shards)
            found[plain.name] = Harness(plain, root / plain.name, seed=seed).run(times)
    return found


@click.command()
@click.option("--times", default=61, show_default=True, help="How many bytes are flipped.")
def main(times: int) -> None:
    """Print the score of each, and one JSON line."""
    found = score(times)
    table = Table("fault", *(f"{name}: raised / wrong / right" for name in found))
    for fault in next(iter(found.values())):
        cells = (counts[fault] for counts in found.values() if fault in counts)
        table.add_row(fault, *(f"{c.raised} / {c.wrong} / {c.right}" for c in cells))
    Console().print(table)
    plain = {name: {k: asdict(c) for k, c in counts.items()} for name, counts in found.items()}
    click.echo(json.dumps({"benchmark": "plain_zarr", "times": times, **plain}))


if __name__ == "__main__":
    main()
