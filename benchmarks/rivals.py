"""What one writes by hand to feed a student with features, instead of a store.

All keep float16 of the values that the store decodes to, widened on the device, and give the same
batches. None of them checks what it reads. Where a system has a way of its own to shuffle, it is
left out and the samples lie on disk in the order of training, which is its best case.
"""

import gc
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from pipeline.store.reader import StoreReader
from pipeline.student.data.stream import StoreDataset, positions_of

Arrays = dict[str, NDArray[Any]]
"""By name, values with a row a token; `COLUMNS` are among them, all others are features."""
COLUMNS = {"input_ids": np.int32, "loss_mask": np.bool_}
HAS_LITDATA = importlib.util.find_spec("litdata") is not None


class Plain(ABC):
    """Features as plain arrays: what is written, and how batches are made of it.

    Args:
        dataset: Says which examples there are, and how long.
        pad_id: What stands at padding.
        batches: The examples of each batch.
        workers: Processes that load samples, for systems that have them.
        pin: Whether batches are copied to a GPU.
    """

    def __init__(
        self,
        dataset: StoreDataset,
        pad_id: int,
        batches: Sequence[Sequence[int]],
        *,
        workers: int,
        pin: bool,
    ) -> None:
        self.lengths: NDArray[np.int64] = dataset.length
        self.starts: NDArray[np.int64] = np.cumsum(dataset.length) - dataset.length
        self.pad_id = pad_id
        self.batches = [list(members) for members in batches]
        self.options: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": pin,
            "persistent_workers": workers > 0,
        }
        self._loader: Any = None

    def close(self) -> None:
        """Let go of every file, with the workers that may have them open."""
        self._loader = None
        gc.collect()

    @abstractmethod
    def read(self, directory: Path) -> Iterator[dict[str, Any]]:
        """Yield the batches of an epoch from what `write` has written."""

    @staticmethod
    @abstractmethod
    def write(directory: Path, samples: Sequence[Arrays], batches: Sequence[Sequence[int]]) -> None:
        """Write samples into an empty directory; `batches` is the order of training."""

    def rows(self, members: Sequence[int]) -> NDArray[np.int64]:
        """Return the rows of examples on the flat token axis."""
        return np.concatenate(
            [np.arange(self.starts[i], self.starts[i] + self.lengths[i]) for i in members]
        )

    def padded(self, lengths: Sequence[int], arrays: Arrays) -> dict[str, Any]:
        """Return a batch of flat arrays as a `StoreDataset` gives it."""
        live = np.arange(max(lengths))[None, :] < np.array(lengths)[:, None]
        ids = np.full(live.shape, self.pad_id, dtype=np.int64)
        ids[live] = arrays["input_ids"]
        mask = np.zeros(live.shape, dtype=np.bool_)
        mask[live] = arrays["loss_mask"]
        features: dict[str, dict[str, torch.Tensor]] = {}
        for name, values in arrays.items():
            if name not in COLUMNS:
                signal, part = name.split(":")
                features.setdefault(signal, {})[part] = torch.from_numpy(values)
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(live.astype(np.int64)),
            "loss_mask": torch.from_numpy(mask),
            "positions": {
                name: torch.from_numpy(indices)
                for name, indices in positions_of(live, mask).items()
            },
            "features": features,
        }

    def joined(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch of samples, each a mapping of its arrays."""
        arrays = {
            name: np.concatenate([np.asarray(sample[name]) for sample in samples])
            for name in samples[0]
        }
        return self.padded([len(sample["input_ids"]) for sample in samples], arrays)


class MemoryMap(Plain):
    """`np.memmap`, a file an array, its rows gathered by number."""

    @staticmethod
    def write(directory: Path, samples: Sequence[Arrays], batches: Sequence[Sequence[int]]) -> None:
        """Write one flat file an array, in the order of the examples."""
        for name in samples[0]:
            np.save(directory / f"{_file(name)}.npy", np.concatenate([s[name] for s in samples]))

    def read(self, directory: Path) -> Iterator[dict[str, Any]]:
        """Yield the batches; files are mapped anew for it."""
        maps = {_name(path): np.load(path, mmap_mode="r") for path in directory.iterdir()}
        for members in self.batches:
            rows = self.rows(members)
            arrays = {name: values[rows] for name, values in maps.items()}
            yield self.padded(self.lengths[members].tolist(), arrays)


class Safetensors(Plain):
    """A file a sample, collated by a `DataLoader`."""

    @staticmethod
    def write(directory: Path, samples: Sequence[Arrays], batches: Sequence[Sequence[int]]) -> None:
        """Write one file a sample."""
        for i, sample in enumerate(samples):
            tensors = {name: torch.from_numpy(values) for name, values in sample.items()}
            save_file(tensors, directory / f"{i}.safetensors")

    def read(self, directory: Path) -> Iterator[dict[str, Any]]:
        """Yield the batches."""
        if self._loader is None:
            self._loader = DataLoader(
                _Files(directory, len(self.lengths)),
                batch_sampler=self.batches,
                collate_fn=self.joined,
                **self.options,
            )
        yield from self._loader


class _Files(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, directory: Path, count: int) -> None:
        self._directory, self._count = directory, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return load_file(self._directory / f"{i}.safetensors")


class LitData(Plain):
    """LitData's chunks of samples on a local disk, a chunk a batch."""

    @staticmethod
    def write(directory: Path, samples: Sequence[Arrays], batches: Sequence[Sequence[int]]) -> None:
        """Write the samples in the order of training."""
        from litdata.streaming import Cache

        # A chunk a batch, so that several workers give the batches that one gives.
        cache = Cache(str(directory), chunk_size=len(batches[0]))
        order = [i for members in batches for i in members]
        for place, i in enumerate(order):
            cache[place] = samples[i]
        cache.done()
        cache.merge()

    def read(self, directory: Path) -> Iterator[dict[str, Any]]:
        """Yield the batches, by several workers in their order."""
        if self._loader is None:
            from litdata import StreamingDataLoader, StreamingDataset

            self._loader = StreamingDataLoader(
                StreamingDataset(str(directory), shuffle=False),
                batch_size=len(self.batches[0]),
                shuffle=False,
                collate_fn=self.joined,
                **self.options,
            )
        yield from self._loader


class ZarrDask(Plain):
    """Zarr arrays by `dask.array.to_zarr`, rows by `dask.array.from_zarr(...)[rows]`."""

    @staticmethod
    def write(directory: Path, samples: Sequence[Arrays], batches: Sequence[Sequence[int]]) -> None:
        """Write one array a name; one chunk is what a task of the capture would hand over."""
        for name in samples[0]:
            values = np.concatenate([sample[name] for sample in samples])
            chunked = da.from_array(values, chunks=(CHUNK_ROWS, *values.shape[1:]))
            da.to_zarr(chunked, directory / f"{_file(name)}.zarr")

    def read(self, directory: Path) -> Iterator[dict[str, Any]]:
        """Yield the batches; the arrays of a batch are computed together."""
        arrays = {_name(path): da.from_zarr(path) for path in directory.iterdir()}
        for members in self.batches:
            rows = self.rows(members)
            values = dask.compute(*(array[rows] for array in arrays.values()))
            found = dict(zip(arrays, values, strict=True))
            yield self.padded(self.lengths[members].tolist(), found)


CHUNK_ROWS = 4096
RIVALS: dict[str, type[Plain]] = {
    "memmap": MemoryMap,
    "safetensors": Safetensors,
    "litdata": LitData,
    "zarr_dask": ZarrDask,
}


def plain_samples(reader: StoreReader, dataset: StoreDataset) -> list[Arrays]:
    """Return what the store decodes to, in float16, example by example."""
    found: list[Arrays] = []
    for number in dict.fromkeys(dataset.segment.tolist()):
        segment = reader.read_segment(number, reader.signals)
        arrays: Arrays = {name: segment.tokens[name].astype(t) for name, t in COLUMNS.items()}
        for name in reader.signals:
            form = reader.signal(name).declaration.form
            decoded = form.decode(segment.features[name], reader.channels(name))
            for part, values in decoded.items():
                arrays[f"{name}:{part}"] = values.astype(np.float16)
        for start, length in zip(segment.offset, segment.length, strict=True):
            found.append({name: v[start : start + length] for name, v in arrays.items()})
    return found


def _file(name: str) -> str:
    """Return an array's name as a name of a file."""
    return name.replace("/", "+")


def _name(path: Path) -> str:
    return path.name.rsplit(".", 1)[0].replace("+", "/")
