"""A simulated GPU: tensors on the device `sim`, whose data lie in the host's memory.

What a GPU would not forgive, it does not either: a host tensor that meets its own is an error, its
memory is limited, and while a step is recorded nothing may depend on what a tensor holds. With
`late` its streams do nothing before they must: work that was submitted is done when somebody waits
for it, which is the latest moment that CUDA allows. What is read too early is then garbage, and
what is overwritten too early is lost.
"""

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pdserve.engine.device.runtime import DeviceGraph, DeviceStream, HostMemory

aten = torch.ops.aten
NAME = "sim"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

READS = {"item", "_local_scalar_dense", "equal", "is_nonzero"}
"""Operators that give the host a value."""
DATA_DEPENDENT = {
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
    "repeat_interleave",
}
"""Operators whose results' shapes depend on values."""
GARBAGE = 0x5A


class Misuse(RuntimeError):
    """What a real device would refuse, or answer with wrong numbers or a wait."""


class SimTensor(Tensor):
    """`held` is a tensor of the host with the same shape, strides and type."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "SimTensor":
        wrapper: Any = torch.Tensor._make_wrapper_subclass
        made: SimTensor = wrapper(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = held
        SIM.memory.add(made, held)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SimTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return SIM.run(func, args, kwargs or {})


class Memory:
    """Which bytes are in use. A device keeps what it once gave out: `most` tells what is left."""

    def __init__(self) -> None:
        self.total = 1 << 40
        self.used = self.most = 0
        self._users: Counter[int] = Counter()
        self._lock = threading.RLock()

    def add(self, tensor: Tensor, inner: Tensor) -> None:
        storage = inner.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        with self._lock:
            self._users[place] += 1
            if self._users[place] == 1:
                self.used += size
                self.most = max(self.most, self.used)
        weakref.finalize(tensor, self._remove, place, size).atexit = False
        if self.used > self.total:
            raise torch.OutOfMemoryError(f"{self.used} bytes of {self.total} on {DEVICE}")

    def _remove(self, place: int, size: int) -> None:
        with self._lock:
            self._users[place] -= 1
            if not self._users[place]:
                del self._users[place]
                self.used -= size


class SimStream:
    """Work in order, done at once or, if late, when somebody waits."""

    def __init__(self) -> None:
        self.todo: list[Callable[[], object]] = []

    def put(self, work: Callable[[], object]) -> None:
        if not SIM.is_late:
            work()
            return
        mode = torch.is_inference_mode_enabled()

        def late() -> None:
            with torch.inference_mode(mode):
                work()

        with SIM.lock:
            self.todo.append(late)

    def drain(self, until: Callable[[], bool] = lambda: False) -> None:
        with SIM.lock:
            while self.todo and not until():
                self.todo.pop(0)()


class SimEvent:
    def __init__(self, stream: SimStream) -> None:
        self._stream = stream
        self.is_done = False
        stream.put(self._happen)

    def _happen(self) -> None:
        self.is_done = True

    def wait(self) -> None:
        self._stream.drain(until=lambda: self.is_done)


class SimGraph:
    """What was dispatched while `compute` ran, with every Python value as it was then."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self.steps: Steps = []
        SIM.recorded = self.steps
        try:
            self._results = compute()
        finally:
            SIM.recorded = None

    def replay(self) -> Any:
        SIM.stream.put(self._run)
        return self._results

    def _run(self) -> None:
        for func, args, kwargs, results in self.steps:
            for old, new in zip(
                tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                # Memory that was made empty is resized by whoever writes its result there.
                if isinstance(old, Tensor) and new.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


Steps = list[tuple[Any, Any, Any, Any]]


class _ThreadState(threading.local):
    stream: SimStream | None = None
    recorded: Steps | None = None


class Sim:
    """The one simulated device of this process."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.is_late = False
        self.lock = threading.RLock()
        self.num_waits = 0
        """How often the host had to wait for a value, other than by an event."""
        self.default_stream = SimStream()
        self.streams: weakref.WeakSet[SimStream] = weakref.WeakSet([self.default_stream])
        self._thread = _ThreadState()

    @property
    def stream(self) -> SimStream:
        return self._thread.stream or self.default_stream

    @stream.setter
    def stream(self, stream: SimStream) -> None:
        self._thread.stream = stream

    @property
    def recorded(self) -> Steps | None:
        return self._thread.recorded

    @recorded.setter
    def recorded(self, steps: Steps | None) -> None:
        self._thread.recorded = steps

    def wait(self, func: Any) -> None:
        """The host needs what the device computes."""
        if self.recorded is not None:
            raise Misuse(f"{func} needs values of the device while a step is recorded")
        self.num_waits += 1
        self.stream.drain()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name == "_to_copy":
            return self._convert(func, args[0], kwargs)
        if name == "copy_" and not (_is_sim(args[0]) and _is_sim(args[1])):
            return self._copy_across(func, args[0], args[1])
        if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
            return parts
        is_masked = name in ("index", "index_put_", "_index_put_impl_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if name in READS or name in DATA_DEPENDENT or is_masked:
            self.wait(func)
        plain_args, plain_kwargs = _unwrap(func, args), _unwrap(func, kwargs)
        if name == "histc" and not plain_args[0].is_floating_point():  # the host counts floats only
            func, plain_args = _histc_of_ints, plain_args
        is_late = self.is_late and "out" not in kwargs and _is_work(func)
        if self.recorded is None and is_late:
            results = self._submit(func, plain_args, plain_kwargs)
        else:
            if "out" in kwargs:
                self.stream.drain()
            results = func(*plain_args, **plain_kwargs)
            if self.recorded is not None:
                self.recorded.append((func, plain_args, plain_kwargs, results))
        given = [each for each in tree_leaves((args, kwargs)) if _is_sim(each)]
        known = {id(each.held): each for each in given}
        # A view of a tensor that was made outside of inference mode is as normal as that.
        is_normal = not _is_work(func) and not all(each.is_inference() for each in given)
        with torch.inference_mode(not is_normal and torch.is_inference_mode_enabled()):
            return tree_map(lambda each: _wrap(each, known), results)

    def _convert(self, func: Any, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """To another type, device or both."""
        target = torch.device(kwargs.get("device") or source.device)
        options = {key: value for key, value in kwargs.items() if key in ("dtype", "memory_format")}
        if not _is_sim(source) or target.type != NAME:
            self.wait(func)
            inner = _inner(source)
            copied = inner.to(kwargs.get("dtype", inner.dtype), copy=True)
            return SimTensor(copied) if target.type == NAME else copied
        args, plain = (_unwrap(func, (source,)), options)
        if self.recorded is None and self.is_late:
            return SimTensor(self._submit(func, args, plain))
        result = func(*args, **plain)
        if self.recorded is not None:
            self.recorded.append((func, args, plain, result))
        return SimTensor(result)

    def _copy_across(self, func: Any, target: Tensor, source: Tensor) -> Tensor:
        self.wait(func)
        _inner(target).copy_(_inner(source))
        return target

    def _submit(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Results of the right shapes, whose content comes when the stream gets that far.

        An operator that cannot tell its shapes beforehand is done at once, after all before it.
        """
        if _returns_arguments(func):
            self.stream.put(lambda: func(*args, **kwargs))
            return args[0]
        try:
            shapes = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
        except (RuntimeError, NotImplementedError):
            self.stream.drain()
            return func(*args, **kwargs)
        results = tree_map(_garbage, shapes)

        def compute() -> None:
            computed = func(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(computed), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        self.stream.put(compute)
        return results


def _is_sim(value: Any) -> bool:
    return isinstance(value, SimTensor)


def _inner(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, SimTensor) else tensor


def _histc_of_ints(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    counts: Tensor = aten.histc.default(values.float(), *args, **kwargs)
    return counts.to(values.dtype)


def _is_work(func: Any) -> bool:
    """It computes something, and is not just another view."""
    if not hasattr(func, "_schema"):
        return True
    aliases = [each.alias_info for each in func._schema.returns]
    return not any(alias is not None and not alias.is_write for alias in aliases)


def _returns_arguments(func: Any) -> bool:
    returns = func._schema.returns if hasattr(func, "_schema") else ()
    return bool(returns) and all(each.alias_info is not None for each in returns)


def _unwrap(func: Any, values: Any) -> Any:
    def unwrapped(value: Any) -> Any:
        if isinstance(value, SimTensor):
            return value.held
        if isinstance(value, Tensor) and value.dim() > 0:
            shape = tuple(value.shape)
            raise Misuse(f"{func}: a host tensor of shape {shape} meets tensors on {DEVICE}")
        if isinstance(value, torch.device) and value.type == NAME:
            return torch.device("cpu")
        return value

    return tree_map(unwrapped, values)


def _wrap(value: Any, known: dict[int, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return known[id(value)] if id(value) in known else SimTensor(value)


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _garbage(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    storage: Any = made.untyped_storage()
    storage.fill_(GARBAGE)
    return made


SIM = Sim()
_library: Any = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
_library.fallback(lambda op, *args, **kwargs: SIM.run(op, args, kwargs), "PrivateUse1")


class SimRuntime:
    """Satisfies `DeviceRuntime`. Use it in a `with` block: all simulations share one device."""

    device = DEVICE
    num_processors = 4

    def __init__(self, *, late: bool = False, total_bytes: int = 1 << 40) -> None:
        self._late, self._total_bytes = late, total_bytes

    def __enter__(self) -> "SimRuntime":
        SIM.is_late = self._late
        SIM.memory.total = self._total_bytes
        SIM.memory.most = SIM.memory.used
        SIM.num_waits = 0
        return self

    @contextlib.contextmanager
    def lateness(self) -> Iterator[None]:
        """Streams run late in the block alone: it takes long, and loading a model has its own."""
        SIM.is_late = True
        try:
            yield
            self.synchronize()
        finally:
            SIM.is_late = self._late

    def __exit__(self, *exc: object) -> None:
        self.synchronize()
        SIM.is_late = False
        SIM.memory.total = 1 << 40

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return SimTensor(_garbage(torch.empty(*shape, dtype=dtype)))

    def pinned(self, num_bytes: int) -> HostMemory:
        return HostMemory(num_bytes)

    def copy(self, target: Tensor, source: Tensor) -> None:
        inner, of = _inner(target), _inner(source)
        SIM.stream.put(lambda: inner.copy_(of))

    def record(self) -> SimEvent:
        return SimEvent(SIM.stream)

    def stream(self) -> SimStream:
        stream = SimStream()
        SIM.streams.add(stream)
        return stream

    @contextlib.contextmanager
    def on(self, stream: DeviceStream) -> Iterator[None]:
        assert isinstance(stream, SimStream)
        before, SIM.stream = SIM.stream, stream
        try:
            yield
        finally:
            SIM.stream = before

    def capture(self, compute: Callable[[], Any], like: DeviceGraph | None = None) -> SimGraph:
        self.synchronize()
        return SimGraph(compute)

    def synchronize(self) -> None:
        for stream in list(SIM.streams):
            stream.drain()

    def free_bytes(self) -> int:
        return self._total_bytes - SIM.memory.most

    def total_bytes(self) -> int:
        return self._total_bytes
