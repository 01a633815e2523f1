"""How the measured engines and their load generators were set, one set for each sweep.

The rows do not state these settings. None is chosen for a row, and each has its source in
docs/latency-model.md, "Engines behind the fidelity rows".
"""

from dataclasses import dataclass
from enum import StrEnum

from bench.latency_fidelity.closed_loop import SGLANG, TRTLLM, VLLM

MANY = 10**6


class Sweep(StrEnum):
    """Who measured a row, which decides how."""

    GRID = "grid"  # one instance over lengths that are powers of two
    DESIGNS = "designs"  # what aiconfigurator proposed, run by its own benchmark script
    INFERENCEX = "inferencex"  # dated runs of the public InferenceX dashboard


def sweep_of(prompt_tokens: int, measured: str) -> Sweep:
    """Designs are the only ones whose prompts are thousands; InferenceX dates its runs."""
    if prompt_tokens % 1000 == 0:
        return Sweep.DESIGNS
    return Sweep.INFERENCEX if measured else Sweep.GRID


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a row says about the engine it ran on."""

    backend: str
    version: str
    sweep: Sweep
    precision: str
    prompt_tokens: int
    clients: int
    is_disaggregated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Settings of one framework."""

    rule: int
    memory_share: float
    step_tokens: int  # prompt tokens of a step
    prompts_per_step: int = MANY
    spare_clients: int = 0  # clients beyond the engine's slots: so many always wait
    keeps_prefixes: bool = False  # serves a prompt seen before from its prefix cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """How load was made. All clients start at once; means over all requests are reported."""

    num_waves: int  # requests of a run over its clients
    num_prompts: int | None = None  # distinct prompts, sent again and again; None: all differ
    shortest: float = 1.0  # lengths are even between this share of the nominal one and all of it


BACKENDS = ("vllm", "sglang", "trtllm")
MEMORY_SHARE = {"vllm": 0.9, "sglang": 0.825, "trtllm": 0.9}
MIXED_SGLANG_SINCE = (0, 5, 6)
DEFAULT_STEP_TOKENS = 8192
SGLANG_STEP_TOKENS = 16384
PROMPTS_PER_STEP = 2  # requests come through one frontend process, one by one
DESIGN_SPARE_TOKENS = 1500  # aiconfigurator sets a step's budget to one prompt and so many more


def engine_of(at: Situation) -> Engine:
    """The settings of one framework in one sweep."""
    return {"vllm": _vllm, "sglang": _sglang, "trtllm": _trtllm}[at.backend](at)


def _vllm(at: Situation) -> Engine:
    share = MEMORY_SHARE[at.backend]
    if at.sweep is Sweep.GRID:
        return Engine(
            rule=VLLM,
            memory_share=share,
            step_tokens=PROMPTS_PER_STEP * at.prompt_tokens,
            prompts_per_step=PROMPTS_PER_STEP,
        )
    return Engine(
        rule=VLLM,
        memory_share=share,
        step_tokens=DEFAULT_STEP_TOKENS,
        keeps_prefixes=at.sweep is Sweep.DESIGNS,
    )


def _sglang(at: Situation) -> Engine:
    share = MEMORY_SHARE[at.backend]
    if at.sweep is Sweep.DESIGNS or _numbers(at.version) >= MIXED_SGLANG_SINCE:
        return Engine(
            rule=VLLM,
            memory_share=share,
            step_tokens=DEFAULT_STEP_TOKENS,
            keeps_prefixes=at.sweep is Sweep.DESIGNS and at.is_disaggregated,
        )
    return Engine(rule=SGLANG, memory_share=share, step_tokens=SGLANG_STEP_TOKENS)


def _trtllm(at: Situation) -> Engine:
    share = MEMORY_SHARE[at.backend]
    if at.sweep is Sweep.DESIGNS:
        tokens = at.prompt_tokens + DESIGN_SPARE_TOKENS + at.clients
        return Engine(rule=TRTLLM, memory_share=share, step_tokens=tokens, keeps_prefixes=True)
    return Engine(
        rule=TRTLLM,
        memory_share=share,
        step_tokens=PROMPTS_PER_STEP * at.prompt_tokens + at.clients,
        prompts_per_step=PROMPTS_PER_STEP,
        spare_clients=1 if at.sweep is Sweep.GRID and not at.precision else 0,
    )


def harness_of(at: Situation) -> Harness:
    """How load was made in one sweep."""
    is_mixed = _numbers(at.version) >= MIXED_SGLANG_SINCE
    if at.sweep is Sweep.DESIGNS:
        is_sglang = at.backend == "sglang" and not at.is_disaggregated
        return Harness(num_waves=5 if is_sglang else 10, num_prompts=100)
    if at.sweep is Sweep.INFERENCEX:
        return Harness(num_waves=10, shortest=0.8)
    if at.backend == "sglang":
        return Harness(num_waves=4 if is_mixed else 8)
    return Harness(num_waves=16)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
