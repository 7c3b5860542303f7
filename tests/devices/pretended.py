"""Tensors that say `cuda` to every line of Python and hold their values on the CPU.

No CUDA build is needed. An operation that mixes devices raises, as does one that CUDA has no kernel
for; one that makes the CPU wait for the GPU is counted by the line that asked for it.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
}
"""Operations whose result or its size the CPU must know before it can go on."""
UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}
"""CUDA indexes none of these: `"index_cuda" not implemented for 'UInt16'`."""
COMPILED = ("pretended.py", "eval_frame.py", "_compile.py", "_stats.py")
LIBRARY = "/pipeline/"

waited: Counter[str] = Counter()
"""How often each line of the library made the CPU wait."""


def _frames() -> Iterator[Any]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _count_wait(operation: str) -> None:
    for frame in _frames():
        file = frame.f_code.co_filename
        if LIBRARY in file:
            waited[f"{operation} {file.rpartition(LIBRARY)[2]}:{frame.f_lineno}"] += 1
            return
    waited[operation] += 1


def _is_backward() -> bool:
    """Tell whether autograd's engine calls, whose own zeros are on the CPU here."""
    inner = (frame for frame in _frames() if not frame.f_code.co_filename.endswith(COMPILED))
    return next(inner).f_code.co_name == "_engine_run_backward"


class PretendedTensor(Tensor):
    """A tensor that says `cuda:0`; for autograd it is one of the CPU."""

    inner: Tensor
    device = property(lambda self: CUDA)  # pyright: ignore[reportAssignmentType]
    is_cuda = property(lambda self: True)  # pyright: ignore[reportAssignmentType]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "PretendedTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a cuda tensor to numpy")

    __array__ = numpy

    def cpu(self) -> Tensor:
        _count_wait("cpu()")
        return self.inner.detach()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()]
        like = [value for value in args if isinstance(value, Tensor)]
        given += [tensor.device for tensor in like] + [tensor.dtype for tensor in like]
        devices = [torch.device(g) for g in given if isinstance(g, (str, torch.device))]
        dtype = next((g for g in given if isinstance(g, torch.dtype)), self.dtype)
        if devices and devices[0].type == "cpu":
            return self.cpu().to(dtype)
        return self if dtype == self.dtype else self.type(dtype)

    def __repr__(self, **_: Any) -> str:
        return f"PretendedTensor({self.inner})"


def on_gpu(value: Any) -> Any:
    """Return a tensor, or all tensors of a batch or module, on the pretended GPU."""
    if not isinstance(value, nn.Module):
        return tree_map(
            lambda leaf: PretendedTensor(leaf) if isinstance(leaf, Tensor) else leaf, value
        )
    moved: dict[int, Tensor] = {}
    for module in value.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None or isinstance(old, PretendedTensor):
                    continue
                if id(old) not in moved:
                    new = PretendedTensor(old.detach().clone())
                    is_parameter = isinstance(old, nn.Parameter)
                    moved[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                table[name] = moved[id(old)]
    return value


def _set_data(parameter: nn.Parameter, value: Tensor) -> None:
    """`parameter.data = value` of a value on the GPU: from now on the parameter is there."""
    if isinstance(value, PretendedTensor) and not isinstance(parameter, PretendedTensor):
        new = nn.Parameter(PretendedTensor(value.inner), parameter.requires_grad)
        torch.utils.swap_tensors(parameter, new)
    else:
        Tensor.data.__set__(parameter, value)  # pyright: ignore[reportAttributeAccessIssue]


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
    device = kwargs.get("device")
    if not ours and (device is None or torch.device(device).type != "cuda"):
        return func(*args, **kwargs)
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )
    if is_composite and func not in WAITING:
        with Machine():
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
    _check(func, args, kwargs, tensors)
    plain = {key: "cpu" if key == "device" else value for key, value in kwargs.items()}
    inner_args, inner_kwargs = tree_map(
        lambda leaf: leaf.inner if isinstance(leaf, PretendedTensor) else leaf, (args, plain)
    )
    out = func(*inner_args, **inner_kwargs)
    arguments = func._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    if written:
        position = written[0]
        return args[position] if position < len(args) else kwargs[arguments[position].name]
    if func in (aten._local_scalar_dense.default, aten.equal.default):
        return out
    is_view = any(value.alias_info for value in func._schema.returns)
    is_inference = torch.is_inference_mode_enabled() and not (
        is_view and ours and not ours[0].is_inference()
    )
    with torch.inference_mode(is_inference):
        return tree_map(
            lambda leaf: (
                PretendedTensor(leaf)
                if isinstance(leaf, Tensor) and not isinstance(leaf, PretendedTensor)
                else leaf
            ),
            out,
        )


def _check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    """Refuse what CUDA refuses, and count what waits."""
    is_mixed = any(not isinstance(t, PretendedTensor) and t.ndim for t in tensors)
    if func in (aten._to_copy.default, aten.copy_.default):
        if is_mixed and not kwargs.get("non_blocking"):
            _count_wait("copy")
    elif is_mixed and func not in INDEXING and not _is_backward():
        shapes = [tuple(t.shape) for t in tensors if not isinstance(t, PretendedTensor)]
        raise RuntimeError(f"{func}: tensors {shapes} on cpu together with some on cuda")
    if func in INDEXING:
        if tensors[0].dtype in UNSIGNED:
            raise NotImplementedError(f"{func} not implemented on cuda for {tensors[0].dtype}")
        indices = [index for index in tree_leaves(args[1]) if index is not None]
        if any(not isinstance(i, PretendedTensor) or i.dtype == torch.bool for i in indices):
            _count_wait("mask")
    elif func in WAITING or (
        func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
    ):
        _count_wait(str(func))


class Machine(TorchDispatchMode):
    """A machine with the pretended GPU: what is made on `cuda` is made there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class PretendedEvent(torch.Event):
    """An event that has happened."""

    def __new__(cls) -> "PretendedEvent":
        return super().__new__(cls, device="cpu")

    def synchronize(self) -> None:
        pass


class PretendedStream:
    """A stream on which everything has happened when it is asked for."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    def wait_event(self, *_: Any) -> None:
        pass

    def record_event(self) -> PretendedEvent:
        return PretendedEvent()


def _move(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    devices = [torch.device(a) for a in args if isinstance(a, (str, torch.device))]
    if devices and devices[0].type == "cuda":
        return on_gpu(module)
    return TO(module, *args, **kwargs)


def _unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
    return EMPTY(*args, **kwargs)


TO, EMPTY = nn.Module.to, torch.empty


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Run a block on a machine with a pretended GPU; count its waits from 0."""
    data = property(
        Tensor.data.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        _set_data,
    )
    stream = PretendedStream()
    with ExitStack() as patches:
        for owner, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "Stream", PretendedStream),
            (torch.cuda, "current_stream", lambda _=None: stream),
            (torch.cuda, "stream", lambda _: nullcontext()),
            (torch.cuda, "empty_cache", lambda: None),
            (torch.cuda, "get_rng_state", lambda *_: EMPTY(0)),
            (torch.cuda, "set_rng_state", lambda *_: None),
            (torch, "empty", _unpinned),
            (Tensor, "pin_memory", lambda tensor: tensor),
            (PretendedTensor, "record_stream", lambda *_: None),
            (nn.Parameter, "data", data),
            (nn.Module, "to", _move),
        ):
            patches.enter_context(mock.patch.object(owner, name, value, create=True))
        torch._C._set_only_lift_cpu_tensors(True)
        patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        waited.clear()
        with Machine():
            yield
