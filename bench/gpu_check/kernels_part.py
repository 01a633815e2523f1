"""Every attention path against `attend_dense` in float32 on the CPU.

Each case compiles kernels of its own for seconds, so on a GPU the cases are shared among processes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

from bench.gpu_check.findings import Finding, must
from bench.gpu_check.machine import Machine

_LIMIT_S = 140.0


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
    verdicts: dict[str, list[str]] = {}
    for share, child in children.items():
        said, _ = child.communicate(timeout=_LIMIT_S)
        verdicts.update(json.loads(line) for line in said.splitlines() if line.startswith("["))
        if child.returncode != 0:
            verdicts[f"share {share} of the cases"] = [f"exit code {child.returncode}"]
    return verdicts
