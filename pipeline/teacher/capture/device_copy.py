"""Copy encoded rows from the device to this process while the device computes the next batch.

A GPU copies to pinned memory on a separate stream. Tensors on the CPU are not copied.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class Arrivals:
    """Starts asynchronous copies of one thread's batches; each thread needs its own object."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def send(self, tensors: Mapping[str, Tensor]) -> "Arrival":
        """Start to copy; the caller may drop the tensors at once."""
        hosts: dict[str, Tensor] = {}
        used: set[torch.device] = set()
        for name, tensor in tensors.items():
            if tensor.device.type != "cuda":
                hosts[name] = tensor.cpu()
                continue
            hosts[name] = self._copy(tensor, is_ordered=tensor.device in used)
            used.add(tensor.device)
        events = [self._streams[device].record_event() for device in used]
        return Arrival(hosts, events)

    def _copy(self, tensor: Tensor, *, is_ordered: bool) -> Tensor:
        device = tensor.device
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        if not is_ordered:
            # Copies must wait for the encoding kernels; once per batch is enough.
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        # Keep the allocator from reusing its memory before it is copied.
        tensor.record_stream(stream)
        return host


class Arrival:
    """Tensors whose copy has started."""

    def __init__(self, hosts: Mapping[str, Tensor], events: Sequence[torch.Event]) -> None:
        self._hosts = hosts
        self._events = events

    def wait(self) -> dict[str, NDArray[Any]]:
        """Wait for the copies and return them as arrays."""
        for event in self._events:
            event.synchronize()
        return {name: host.numpy() for name, host in self._hosts.items()}
