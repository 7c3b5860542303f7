"""Encoded rows on their way from the device to this process, while the device goes on.

A GPU copies into pinned memory on a stream of its own, behind which the next batch is already
running. What is in this process's memory already is taken as it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class Arrivals:
    """Sends tensors of one thread's batches; one a thread, for streams are in order."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def send(self, tensors: Mapping[str, Tensor]) -> "Arrival":
        """Begin to copy; the tensors may be given up at once."""
        hosts: dict[str, Tensor] = {}
        used: set[torch.device] = set()
        for name, tensor in tensors.items():
            if tensor.device.type != "cuda":
                hosts[name] = tensor.cpu()
                continue
            hosts[name] = self._copy(tensor, begun=tensor.device in used)
            used.add(tensor.device)
        events = [self._streams[device].record_event() for device in used]
        return Arrival(hosts, events)

    def _copy(self, tensor: Tensor, *, begun: bool) -> Tensor:
        device = tensor.device
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        if not begun:
            # What is encoded must be there first; the copies of one batch wait for it once.
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        # Its memory is not given to a later batch before it was read.
        tensor.record_stream(stream)
        return host


class Arrival:
    """Tensors that were sent."""

    def __init__(self, hosts: Mapping[str, Tensor], events: Sequence[torch.Event]) -> None:
        self._hosts = hosts
        self._events = events

    def wait(self) -> dict[str, NDArray[Any]]:
        """Return them as arrays once they are there."""
        for event in self._events:
            event.synchronize()
        return {name: host.numpy() for name, host in self._hosts.items()}
