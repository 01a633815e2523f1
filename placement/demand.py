"""What comes in: requests with lengths, arrivals and shared prefixes, read or drawn.

A `Workload` keeps gaps in units of the mean gap where it can, so that one of them serves all rates.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pdserve.client.workload import TraceRequest, fit_to_context
from pdserve.config.base import Settings
from pdserve.domain.errors import LocalFault
from placement.simulation.trace import Trace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DEFAULT_PREFIX_BLOCK = 512  # Mooncake's


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests by arrival. Either `arrival_s` or `unit_gaps` is there; the first gap is 0 or more.

    `prefix_starts` and `prefix_ids` as in `Trace`. `class_index` says to which SLO class each
    request belongs; None leaves that to the classes' shares.
    """

    prompt_tokens: Ints
    output_tokens: Ints
    arrival_s: Floats | None = None
    unit_gaps: Floats | None = None
    prefix_starts: Ints | None = None
    prefix_ids: Ints | None = None
    prefix_block_tokens: int = DEFAULT_PREFIX_BLOCK
    class_index: Ints | None = None
    source: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def trace(self, rate: float | None = None, *, is_closed: bool = False) -> Trace:
        """Arrays for a simulation: at `rate` requests/s, or at the recorded times.

        Raises `LocalFault` where there are no recorded times to take or to scale.
        """
        if is_closed:
            arrival_s = np.zeros(len(self))
        elif rate is None:
            if self.arrival_s is None:
                raise LocalFault(
                    f"{self.source or 'workload'}: has unit_interarrival and no arrival_s: "
                    "give arrivals: {rate: <requests per second>}"
                )
            arrival_s = self.arrival_s
        else:
            arrival_s = np.cumsum(self.gaps() / rate)
        return Trace(
            arrival_s=arrival_s,
            prompts=self.prompt_tokens,
            outputs=self.output_tokens,
            prefix_starts=self.prefix_starts,
            prefix_ids=self.prefix_ids,
            prefix_block_tokens=self.prefix_block_tokens,
        )

    def fitted(self, max_context_tokens: int) -> "Workload":
        """Lengths shrunk for a model with a short context, as `pdserve bench` does it.

        Prefix blocks shrink with the prompts, so that as large a share of a prompt is known.
        """
        requests = [
            TraceRequest(0.0, int(prompt), int(output))
            for prompt, output in zip(self.prompt_tokens, self.output_tokens, strict=True)
        ]
        fitted = fit_to_context(requests, max_context_tokens)
        factor = max(request.prompt_tokens for request in fitted) / int(self.prompt_tokens.max())
        return replace(
            self,
            prefix_block_tokens=max(int(self.prefix_block_tokens * factor), 1),
            prompt_tokens=np.array([request.prompt_tokens for request in fitted], np.int64),
            output_tokens=np.array([request.output_tokens for request in fitted], np.int64),
        )

    def gaps(self) -> Floats:
        """Gaps before each request in units of the mean gap; recorded times begin at 0."""
        if self.unit_gaps is not None:
            return self.unit_gaps
        assert self.arrival_s is not None
        gaps = np.diff(self.arrival_s, prepend=self.arrival_s[0])
        mean = float(gaps[1:].mean()) if len(gaps) > 1 else 0.0
        if mean == 0.0:
            raise LocalFault(
                f"{self.source or 'workload'}: all requests arrive at once: no rate can be set"
            )
        return gaps / mean

    def head(self, num: int) -> "Workload":
        """The first `num` requests."""
        starts = self.prefix_starts
        return replace(
            self,
            prompt_tokens=self.prompt_tokens[:num],
            output_tokens=self.output_tokens[:num],
            arrival_s=None if self.arrival_s is None else self.arrival_s[:num],
            unit_gaps=None if self.unit_gaps is None else self.unit_gaps[:num],
            prefix_starts=None if starts is None else starts[: num + 1],
            class_index=None if self.class_index is None else self.class_index[:num],
        )


class Lengths(Settings):
    """How long prompts or answers are."""

    distribution: Literal["fixed", "lognormal", "gamma", "uniform"] = "lognormal"
    mean: float = Field(gt=0, description="tokens")
    cv: float = Field(1.0, ge=0, le=20, description="standard deviation / mean; not for fixed")
    min: int = Field(1, ge=1, description="shorter ones become this")
    max: int = Field(1_000_000, ge=1, description="longer ones become this")

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "Lengths":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not exceed max ({self.max})")
        return self

    def draw(self, num: int, rng: np.random.Generator) -> Ints:
        """`num` lengths; the draws of one seed do not depend on the bounds."""
        cv = 0.0 if self.distribution == "fixed" else self.cv
        if cv == 0.0:
            values = np.full(num, self.mean)
        elif self.distribution == "lognormal":
            variance = np.log1p(cv**2)
            values = rng.lognormal(np.log(self.mean) - variance / 2, np.sqrt(variance), num)
        elif self.distribution == "gamma":
            values = rng.gamma(1 / cv**2, self.mean * cv**2, num)
        else:
            half = self.mean * cv * np.sqrt(3)
            values = rng.uniform(self.mean - half, self.mean + half, num)
        lengths: Ints = np.clip(np.rint(values), self.min, self.max).astype(np.int64)
        return lengths


class ArrivalProcess(Settings):
    """When requests come."""

    rate: float = Field(1.0, gt=0, description="requests/s, the mean over the whole time")
    cv: float = Field(
        1.0, ge=0, le=50, description="of the gaps (gamma): 1 Poisson, 0 regular, 2 bursty"
    )
    diurnal: tuple[float, ...] = Field(
        (), description="relative rates over one period, in equal steps; left out: constant"
    )
    period_s: float = Field(86_400.0, gt=0, description="length of the diurnal profile")

    @model_validator(mode="after")
    def _profile_is_positive(self) -> "ArrivalProcess":
        if self.diurnal and (min(self.diurnal) < 0 or max(self.diurnal) == 0):
            raise ValueError("diurnal: rates must be 0 or more, one of them above 0")
        return self

    def unit_gaps(self, num: int, rng: np.random.Generator) -> Floats:
        """Gaps of mean 1; the first is 0."""
        shape = 1 / self.cv**2 if self.cv else np.inf
        gaps = rng.gamma(shape, 1 / shape, num) if self.cv else np.ones(num)
        gaps[:1] = 0.0
        return gaps

    def arrival_s(self, unit_gaps: Floats) -> Floats:
        """Times; a profile stretches them where its rate is low, so that the shape of bursts stays.

        The unit process runs on the cumulative rate; its inverse gives the time.
        """
        progress = np.cumsum(unit_gaps)
        if not self.diurnal:
            return progress / self.rate
        weights = np.array(self.diurnal) / np.mean(self.diurnal)
        edges_s = np.linspace(0.0, self.period_s, len(weights) + 1)
        per_period = self.rate * self.period_s
        cumulative = np.concatenate([[0.0], np.cumsum(weights)]) / len(weights) * per_period
        periods, rest = np.divmod(progress, per_period)
        return periods * self.period_s + np.interp(rest, cumulative, edges_s)


class SharedPrefix(Settings):
    """Prompts that begin alike: system prompts, tools, documents."""

    share: float = Field(ge=0, le=1, description="of the requests that begin with a known prefix")
    tokens: int = Field(ge=1, description="length of a prefix; a shorter prompt has less of it")
    groups: int = Field(1, ge=1, description="different prefixes, equally likely")


class WorkloadSpec(Settings):
    """A workload as distributions: what `pdserve workload fit` writes and `generate` reads."""

    num_requests: int = Field(1000, ge=1, le=10_000_000)
    arrivals: ArrivalProcess = ArrivalProcess()
    prompt_tokens: Lengths
    output_tokens: Lengths
    prefix: SharedPrefix | None = None
    seed: int = Field(0, ge=0)

    def generate(self, seed: int | None = None) -> Workload:
        """Draw it; the same seed gives the same requests at every rate."""
        seeds = np.random.SeedSequence(self.seed if seed is None else seed).spawn(4)
        arrivals, prompts, outputs, prefixes = (np.random.default_rng(item) for item in seeds)
        unit_gaps = self.arrivals.unit_gaps(self.num_requests, arrivals)
        prompt_tokens = self.prompt_tokens.draw(self.num_requests, prompts)
        workload = Workload(
            prompt_tokens=prompt_tokens,
            output_tokens=self.output_tokens.draw(self.num_requests, outputs),
            arrival_s=self.arrivals.arrival_s(unit_gaps),
            unit_gaps=None if self.arrivals.diurnal else unit_gaps,
            source="distributions",
        )
        return workload if self.prefix is None else _with_prefixes(workload, self.prefix, prefixes)


def _with_prefixes(workload: Workload, prefix: SharedPrefix, rng: np.random.Generator) -> Workload:
    """Give a share of the prompts a prefix of whole blocks; the rest, 1 token at least, is own."""
    block = min(DEFAULT_PREFIX_BLOCK, prefix.tokens)
    num_shared = prefix.tokens // block
    has_prefix = rng.random(len(workload)) < prefix.share
    group = rng.integers(0, prefix.groups, len(workload))
    counts = -(-workload.prompt_tokens // block)
    shared = np.minimum((workload.prompt_tokens - 1) // block, num_shared)
    starts = np.concatenate([[0], np.cumsum(counts)])
    ids = np.arange(starts[-1]) + prefix.groups * num_shared
    for request in np.flatnonzero(has_prefix):
        first = starts[request]
        own = np.arange(shared[request])
        ids[first : first + len(own)] = group[request] * num_shared + own
    _, dense = np.unique(ids, return_inverse=True)
    return replace(
        workload,
        prefix_starts=starts.astype(np.int64),
        prefix_ids=dense.astype(np.int64),
        prefix_block_tokens=block,
    )
