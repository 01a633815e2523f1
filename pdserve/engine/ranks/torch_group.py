"""Tensors between the ranks of a worker: gloo on CPUs, NCCL on GPUs, behind one class.

Groups are made by constructor: `init_process_group` would fix one world for the whole process.
gloo's `abort` wakes nobody, so the only bound on its operations is their deadline.
"""

import contextlib
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from pdserve.domain.errors import RankLost
from pdserve.domain.rank_place import RankPlace

_dist: Any = torch.distributed  # much of what is used here has no types
Store = Any
"""Where ranks find each other: a `TCPStore`, or a part of one."""


def serve_store(host: str, num_ranks: int, deadline_s: float) -> Store:
    """The store where the ranks of a worker find each other, at a free port of `host` alone."""
    listener = socket.create_server((host, 0), family=_family(host))
    port = listener.getsockname()[1]
    return _dist.TCPStore(
        host,
        port,
        num_ranks,
        is_master=True,
        timeout=timedelta(seconds=deadline_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )


def reach_store(host: str, port: int, num_ranks: int, deadline_s: float) -> Store:
    """Raises `RankLost` if there is none."""
    timeout = timedelta(seconds=deadline_s)
    with _losing(f"no store at {host}:{port}"):
        return _dist.TCPStore(
            host, port, num_ranks, is_master=False, timeout=timeout, wait_for_workers=False
        )


class TorchGroup:
    """Satisfies `RankGroup`. `host` is this rank's own address, as other ranks reach it.

    All ranks make theirs at the same time; that takes until the last one does, `deadline_s` at
    most, and raises `RankLost` after that. Every later call waits for as long at most.
    """

    def __init__(
        self,
        place: RankPlace,
        store: Store,
        *,
        host: str,
        device: torch.device,
        deadline_s: float,
    ) -> None:
        self.place = place
        self._timeout = timedelta(seconds=deadline_s)
        self._is_lost = False
        self._store = store
        self._stage = self._pipe = None
        with _losing("ranks did not come together"):
            if place.tp > 1:
                self._stage = _make(
                    _dist.PrefixStore(f"stage{place.stage}", store),
                    *(place.shard, place.tp, self._timeout, host, device),
                )
            if place.pp > 1:
                self._pipe = _make(
                    _dist.PrefixStore(f"pipe{place.shard}", store),
                    *(place.stage, place.pp, self._timeout, host, device),
                )

    def set_deadline(self, deadline_s: float) -> None:
        """For every call from now on."""
        self._timeout = timedelta(seconds=deadline_s)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self._stage is None:
            return tensor
        tensor = tensor.contiguous()
        options = _dist.AllreduceOptions()
        options.timeout = self._timeout
        with self._working("all_reduce"):
            self._stage.allreduce([tensor], options).wait()
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        if self._stage is None:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.place.tp)]
        with self._working("all_gather"):
            self._stage.allgather(parts, tensor, self._timeout).wait()
        return torch.cat(parts, dim=-1)

    def least(self, number: int, device: torch.device) -> int:
        """Among the ranks of each stage, then among the stages."""
        value = torch.tensor(number, dtype=torch.int64, device=device)
        options = _dist.AllreduceOptions()
        options.reduceOp = _dist.ReduceOp.MIN
        options.timeout = self._timeout
        for group in (self._stage, self._pipe):
            if group is not None:
                with self._working("least"):
                    group.allreduce([value], options).wait()
        return int(value)

    def send(self, tensor: Tensor) -> None:
        with self._working("send"):
            self._pipes().send([tensor.contiguous()], self.place.stage + 1, 0).wait(self._timeout)

    def receive(self, tensor: Tensor) -> Tensor:
        with self._working("receive"):
            self._pipes().recv([tensor], self.place.stage - 1, 0).wait(self._timeout)
        return tensor

    def close(self) -> None:
        self._stage = self._pipe = None
        self._is_lost = True

    def _pipes(self) -> Any:
        if self._pipe is None:
            raise ValueError("a worker of one stage sends nothing to a next one")
        return self._pipe

    @contextlib.contextmanager
    def _working(self, what: str) -> Iterator[None]:
        if self._is_lost:
            raise RankLost("the group of ranks is closed, or has lost one")
        try:
            with _losing(f"rank {self.place.rank} lost another one in {what}"):
                yield
        except RankLost:
            self._is_lost = True
            raise


def _make(
    store: Store, rank: int, size: int, timeout: timedelta, host: str, device: torch.device
) -> Any:
    if device.type == "cuda":
        return _make_nccl(store, rank, size, timeout, device)
    options = _dist.ProcessGroupGloo._Options()
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    options._threads = 1  # operations of a rank follow each other
    return _dist.ProcessGroupGloo(store, rank, size, options)


def _make_nccl(store: Store, rank: int, size: int, timeout: timedelta, device: torch.device) -> Any:
    """NCCL's own watchdog ends this process when an operation is late: so the deadline holds."""
    options = _dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    group = _dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group


@contextlib.contextmanager
def _losing(what: str) -> Iterator[None]:
    """torch's errors here are many kinds of `RuntimeError`, with texts that name addresses."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(what) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
