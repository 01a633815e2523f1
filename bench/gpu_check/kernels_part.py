"""Every attention path against `attend_dense` in float32 on the CPU.

Each case compiles kernels of its own for seconds, so on a GPU the cases are shared among processes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from bench.gpu_check.findings import Finding, must
from bench.gpu_check.machine import Machine

_LIMIT_S = 65.0  # of each path, on a GPU
_SLOW_LIMIT_S = 420.0  # on a CPU that others use too


def measure(machine: Machine) -> Iterator[Finding]:
    for kernels in ("triton", "torch"):
        verdicts = _verdicts(machine, kernels)
        wrong = {name: faults for name, faults in verdicts.items() if faults}
        where = "on the GPU" if machine.is_gpu else "interpreted" * (kernels == "triton")
        what = f"{kernels} agrees with dense attention"
        yield must(what, not wrong, value=f"{len(verdicts) - len(wrong)}/{len(verdicts)}",
                   note=where)  # fmt: skip
        for name, faults in wrong.items():
            yield must(f"{kernels}: {name}", False, note="; ".join(faults))


def _verdicts(machine: Machine, kernels: str) -> dict[str, list[str]]:
    """What is wrong with each case; empty lists are right."""
    shares = min(12, os.cpu_count() or 1) if machine.is_gpu and kernels == "triton" else 1
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.attention_cases"]
    command += ["--device", str(machine.device), "--kernels", kernels]
    command += ["--large"] if machine.is_gpu else []
    children = {
        f"{share}/{shares}": subprocess.Popen(
            [*command, "--share", f"{share}/{shares}"], stdout=subprocess.PIPE, text=True
        )
        for share in range(shares)
    }
    deadline_s = time.monotonic() + machine.size(_LIMIT_S, _SLOW_LIMIT_S)
    verdicts: dict[str, list[str]] = {}
    for share, child in children.items():
        try:
            said, _ = child.communicate(timeout=max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            said, _ = child.communicate()
            verdicts[f"share {share} of the cases"] = ["not done in time"]
        verdicts.update(json.loads(line) for line in said.splitlines() if line.startswith("["))
        if child.returncode > 0:
            verdicts[f"share {share} of the cases"] = [f"exit code {child.returncode}"]
    return verdicts
