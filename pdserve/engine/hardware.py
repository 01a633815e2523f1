"""What a worker computes on, as a text: equal for workers that should be equally fast."""

import functools
import os
import platform
from pathlib import Path

from pdserve.config.processes import EngineSettings


def describe_hardware(settings: EngineSettings) -> str:
    """The processor, how much of it the worker may use, and what it computes in."""
    if settings.engine == "timed":
        return "timed"
    # Communication between ranks is part of what a step takes.
    ranks = f", tp {settings.tp} pp {settings.pp}" if settings.num_ranks > 1 else ""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{settings.device}, {processor_name()}, {num_cpus} CPUs, {settings.dtype}{ranks}"


@functools.cache
def processor_name() -> str:
    """The first processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {names[0] if names else platform.processor()}".strip()
