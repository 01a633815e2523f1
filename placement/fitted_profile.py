"""What `pdserve profile` found out, and the `profile.json` that keeps it.

The file has DistServe's form (coefficients in ms by model and tensor parallelism), so that whatever
reads that form reads this one, and under `pdserve` in each entry what that form has no place for.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pdserve.config.files import write_file
from pdserve.domain.errors import LocalFault
from pdserve.domain.latency import StepCoefficients
from placement.fitting import TERMS, Phase, Residual
from placement.simulation.timing import StepTiming
from placement.simulation.values import Link, PdserveOptions, Pool, PoolRole

SECTION = "pdserve"
FORM = 3
NO_THRESHOLD = 1 << 30  # DistServe's second decode line starts beyond any batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """What passing a request on adds. `handoff_s` is in TTFT, the link's part in the second token's
    gap."""

    handoff_s: float
    link_latency_s: float
    link_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a cluster that serves differs from one that answers one kind of probe in a row.

    Requests of all lengths find caches and clocks colder. Workers, router and client share cores,
    caches and memory, so that a step takes longer while the other role computes. The decode worker
    owns a request: it forwards the prompt, lands and checks its KV and sends its first token on the
    thread that also drives its steps.
    """

    prefill: float = 1.0  # time of a prefill step / of the same one among like ones in a row
    decode: float = 1.0
    beside_prefill: float = 1.0  # time of a prefill step while the decode workers compute / alone
    beside_answer: float = 0.0  # more, for each answer of a decode worker after the first
    beside_decode: float = 1.0  # time of a decode step while the prefill workers compute / alone
    stolen_s: float = 0.0  # that a new request takes from the answers that are decoded
    wake_s: float = 0.0  # what the first decode step after a pause takes longer
    busy_handoff_s: float = 0.0  # added to TTFT where the decode worker is in a step
    answer_scatter: float = 0.0  # relative standard deviation of TPOT that all this leaves
    step_scatter: float = 0.0  # and of each step by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the workers are bound by, as they report it; KV in tokens of one worker."""

    prefill_kv_tokens: int
    decode_kv_tokens: int
    kv_bytes_per_token: float
    block_size: int
    max_step_tokens: int
    max_num_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """How a worker of one role was divided when it was measured, communication included."""

    tp: int = 1
    pp: int = 1

    def __str__(self) -> str:
        return f"tp {self.tp} pp {self.pp}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedProfile:
    """What `pdserve profile` found out about one model on one kind of worker.

    `prefill` and `decode` are steps of like probes in a row; `coefficients` are those of a cluster
    that serves.
    """

    model: str
    gpu: str = "profiled"  # what it runs on, by the name that plans call it
    prefill: StepCoefficients
    decode: StepCoefficients
    handoff: Handoff
    limits: Limits
    serving: Serving = Serving()
    prefill_ranks: Ranks = Ranks()
    decode_ranks: Ranks = Ranks()
    residuals: tuple[Residual, ...] = ()
    foreign_cores: float | None = None  # busy with other programs while measuring; None: not known

    @property
    def relative_error(self) -> float:
        """Root mean square over the points of the phase that fits worse."""
        return max(self.prefill.relative_error, self.decode.relative_error)

    def coefficients(self, phase: Phase) -> StepCoefficients:
        """Steps while requests of all lengths come, beside no other worker."""
        if phase == "prefill":
            return _stretched(self.prefill, self.serving.prefill)
        return _stretched(self.decode, self.serving.decode)

    def pool(self, role: PoolRole, replicas: int) -> Pool:
        """Workers as they were profiled, for the simulator.

        A colocated one was not profiled: it takes each phase's own times, and of what steps have
        in common the lesser. Raises `LocalFault` for a worker of several stages.
        """
        ranks = self.ranks(role)
        if ranks.pp > 1:
            raise LocalFault(
                f"{self.model} was profiled at {ranks} ({role}): the simulation lets a worker of "
                "several stages have several steps under way, which these workers do not: profile "
                "pp 1"
            )
        prefill, decode = (
            StepTiming.of_coefficients(self.coefficients(phase), source="fitted on the engine")
            for phase in ("prefill", "decode")
        )
        timing = replace(
            prefill,
            decode_s=decode.decode_s,
            context_s=decode.context_s,
            shared_s=min(prefill.shared_s, decode.shared_s),
        )
        handoff, limits, serving = self.handoff, self.limits, self.serving
        reads, writes = role is not PoolRole.DECODE, role is not PoolRole.PREFILL
        beside = serving.beside_prefill if reads else serving.beside_decode
        return Pool(
            role=role,
            replicas=replicas,
            timing=timing,
            tp=ranks.tp,
            gpu=self.gpu,
            kv_tokens=limits.decode_kv_tokens if writes else limits.prefill_kv_tokens,
            kv_bytes_per_token=limits.kv_bytes_per_token,
            link=Link(bytes_per_s=handoff.link_bytes_per_s, latency_s=handoff.link_latency_s),
            beside=1.0 if reads and writes else beside,
            beside_answer=0.0 if writes else serving.beside_answer,
            wake_s=serving.wake_s if writes else 0.0,
            stolen_s=serving.stolen_s if writes else 0.0,
        )

    def ranks(self, role: PoolRole) -> Ranks:
        """Of a worker of a role; a colocated one would be a decode worker that reads, too."""
        return self.prefill_ranks if role is PoolRole.PREFILL else self.decode_ranks

    def pools(self, *, num_prefill: int, num_decode: int) -> tuple[Pool, ...]:
        """The profiled cluster, with any number of workers, for the simulator."""
        return self.pool(PoolRole.PREFILL, num_prefill), self.pool(PoolRole.DECODE, num_decode)

    def options(self) -> PdserveOptions:
        """The workers' limits and the handoff, for the simulator under rules pdserve."""
        return PdserveOptions(
            max_step_tokens=self.limits.max_step_tokens,
            max_num_requests=self.limits.max_num_requests,
            block_size=self.limits.block_size,
            handoff_s=self.handoff.handoff_s,
            busy_handoff_s=self.serving.busy_handoff_s,
            answer_scatter=self.serving.answer_scatter,
            step_scatter=self.serving.step_scatter,
        )


def _stretched(coefficients: StepCoefficients, factor: float) -> StepCoefficients:
    return replace(coefficients, **{name: factor * getattr(coefficients, name) for name in TERMS})


def to_json(profile: FittedProfile) -> dict[str, Any]:
    """The content of `profile.json`."""
    prefill, decode = profile.coefficients("prefill"), profile.coefficients("decode")
    ms = 1e3
    pair = prefill.prefill_attention_s / 2  # L**2 = 2 * pairs - L
    decode_line = [
        decode.fixed_s * ms,
        decode.decode_context_token_s * ms,
        (decode.decode_token_s - decode.decode_context_token_s) * ms,
    ]
    plain = asdict(profile)
    entry = {
        "prefill": [prefill.fixed_s * ms, (prefill.prefill_token_s + pair) * ms, pair * ms],
        "decoding_smallbs": decode_line,
        "decoding_largebs": decode_line,
        "decoding_large_small_bs_threshold": NO_THRESHOLD,
        "max_num_tokens": profile.limits.decode_kv_tokens,
        SECTION: {
            "form": FORM,
            **{name: value for name, value in plain.items() if name != "model"},
        },
    }
    return {profile.model: {str(profile.decode_ranks.tp): entry}}


def write_profile(profile: FittedProfile, path: Path) -> None:
    """Raises `LocalFault` where that cannot be."""
    write_file(path, json.dumps(to_json(profile), indent=1) + "\n")


def parse_section(model: str, section: Mapping[str, Any], *, source: str) -> FittedProfile:
    """What an entry of `profile.json` holds under `pdserve`; raises `LocalFault`."""
    if section.get("form") != FORM:
        raise LocalFault(
            f"{source}: form {section.get('form')!r}; this pdserve reads form {FORM}: "
            "run `pdserve profile` again"
        )
    try:
        return FittedProfile(
            model=model,
            gpu=section["gpu"],
            prefill=StepCoefficients(**section["prefill"]),
            decode=StepCoefficients(**section["decode"]),
            handoff=Handoff(**section["handoff"]),
            limits=Limits(**section["limits"]),
            serving=Serving(**section["serving"]),
            prefill_ranks=Ranks(**section.get("prefill_ranks", {})),
            decode_ranks=Ranks(**section.get("decode_ranks", {})),
            residuals=tuple(Residual(**each) for each in section["residuals"]),
            foreign_cores=section["foreign_cores"],
        )
    except (KeyError, TypeError) as error:
        raise LocalFault(f"{source}: damaged: {error}") from None


def simulation_yaml(profile: FittedProfile, profile_file: str) -> str:
    """A `sim.yaml` of one prefill and one decode worker as profiled.

    Handoff, link and limits are the profile's, unless the file gives its own.
    """
    return f"""\
rules: pdserve
latency: {{profile: {profile_file}, model: {profile.model}}}
pools:
  - {{role: prefill, replicas: 1}}
  - {{role: decode, replicas: 1}}
slo: {{ttft_s: 1.0, tpot_s: 0.1, attainment: 0.9}}
"""
