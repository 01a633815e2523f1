"""What a communicator of NCCL takes of the GPU, and how fast it can be given up.

One rank: two ranks on one GPU are refused before NCCL 2.30. The settings are those of a pair that
moves KV: few channels, no call that blocks.
"""

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from bench.gpu_check.findings import Finding, must
from bench.gpu_check.machine import Machine

_MOST_ABORT_S = 3.0


def measure(machine: Machine) -> Iterator[Finding]:
    dist: Any = torch.distributed
    options = dist.ProcessGroupNCCL.Options()
    options.config.blocking = 0
    options.config.max_ctas = 4
    options._timeout = timedelta(seconds=20)
    torch.zeros(1, device=machine.device)
    before, _ = torch.cuda.mem_get_info(machine.device)
    began_s = time.perf_counter()
    group = dist.ProcessGroupNCCL(dist.HashStore(), 0, 1, options)
    group.eager_connect_single_device(machine.device)
    ones = torch.ones(1 << 20, device=machine.device)
    group.allreduce([ones]).wait()
    machine.synchronize()
    yield Finding(what="first operation", value=time.perf_counter() - began_s, unit="s")
    after, _ = torch.cuda.mem_get_info(machine.device)
    yield Finding(what="memory of a communicator of one rank", value=(before - after) / 2**20,
                  unit="MiB", note="4 MiB of it is the test's")  # fmt: skip
    began_s = time.perf_counter()
    group.abort()
    elapsed_s = time.perf_counter() - began_s
    yield Finding(what="abort", value=1e3 * elapsed_s, unit="ms")
    yield must("an abort returns in time", elapsed_s < _MOST_ABORT_S)
