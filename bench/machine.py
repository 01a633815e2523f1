"""What a benchmark ran on, as a text that figures can be quoted with."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

AS_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own loops, and those that its compiler writes
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse4.2",
}
"""What keeps libraries and compilers from using more than AVX2, and AVX-512 with it."""

_EXTENSIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "avx512_fp16": "AVX-512 fp16",
    "amx_bf16": "AMX bf16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    cpu: str
    isa: str
    num_cpus: int
    load_1_min: float

    @classmethod
    def here(cls, variables: Mapping[str, str]) -> "Machine":
        """This machine, as contenders that are started with `variables` may use it."""
        isa = ", ".join(name for flag, name in _EXTENSIONS.items() if flag in _flags())
        if variables:
            isa = f"AVX2, emulated by keeping all contenders from more ({isa or 'none known'})"
        return cls(
            cpu=_cpu(),
            isa=isa or "no known extensions",
            num_cpus=len(os.sched_getaffinity(0)),
            load_1_min=os.getloadavg()[0],
        )

    @property
    def text(self) -> str:
        return f"{self.cpu}, {self.num_cpus} CPUs, {self.isa}, load {self.load_1_min:.1f}"


def _cpu() -> str:
    """Clouds hide the model's number in its name; family and model tell the generation."""
    name, family, model = (_field(key) for key in ("model name", "cpu family", "model"))
    return f"{name or os.uname().machine} (family {family or '?'}, model {model or '?'})"


def _flags() -> set[str]:
    return set(_field("flags").split())


def _field(key: str) -> str:
    """Of the first processor; empty if the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""
