"""The measured runs: one row a run, with the engine and the load generator behind it.

Any CSV with these columns can be read. `system, model_path, backend, mode, isl, osl`, one of
`silicon_ttft_ms` and `silicon_tpot_ms`, and one of `concurrency`, `batch_size` and
`decode_batch_size` are needed; a row without them is refused with its reason, not the file.
"""

import csv
import gzip
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.latency_fidelity.engines import (
    BACKENDS,
    Engine,
    Harness,
    Situation,
    Sweep,
    engine_of,
    harness_of,
    sweep_of,
)
from pdserve.domain.errors import LocalFault
from placement.hardware import Gpu, find_gpu
from placement.model_config import load_model, with_quantisation
from placement.model_spec import ModelSpec, Parallelism

DATA = Path(__file__).parent / "data" / "e2e_silicon_calib.csv.gz"
COLUMNS = ("system", "model_path", "backend", "mode", "isl", "osl")
WEIGHTS = {
    "": "bf16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "bf16",
    "fp8": "fp8",
    "fp4": "mxfp4",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "int4": "int4",
    "int8": "int8",
}
STORAGE_SUFFIXES = ("-FP8", "-fp8", "-NVFP4", "-FP4", "-AWQ", "-GPTQ-Int4")
Row = dict[str, str]
Number = Callable[[str], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """One pool of a disaggregated run."""

    count: int
    cut: Parallelism
    is_count_stated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One row. `ttft_s` or `tpot_s` is NaN where the row has none."""

    id: str
    gpu: Gpu
    model: str
    backend: str
    backend_version: str
    precision: str
    prompt_tokens: int
    output_tokens: int
    clients: int  # of one instance when aggregated, of all workers when disaggregated
    is_concurrency_stated: bool
    cut: Parallelism  # of an aggregated instance
    sweep: Sweep
    ttft_s: float
    tpot_s: float
    prefill: Workers | None = None
    decode: Workers | None = None

    @property
    def is_disaggregated(self) -> bool:
        return self.decode is not None

    @property
    def is_complete(self) -> bool:
        """Whether the row says how many workers there are."""
        pools = (self.prefill, self.decode)
        return all(pool is None or pool.is_count_stated for pool in pools)

    @property
    def group(self) -> str:
        """Runs of one configuration at different concurrencies: never split in validation."""
        lengths = f"{self.prompt_tokens}/{self.output_tokens}"
        if self.prefill is not None and self.decode is not None:
            cut = f"{_pool_name(self.prefill)} to {_pool_name(self.decode)}"
        else:
            cut = f"tp{self.cut.tp} ep{self.cut.ep} dp{self.cut.attention_dp}"
        return f"{self.model} {self.gpu.name} {self.backend} {self.precision} {cut} {lengths}"

    @property
    def is_dense(self) -> bool:
        return load_model(self.model).experts is None

    @property
    def family(self) -> tuple[str, ...]:
        """Backend, precision, GPU, and whether experts are there: one set of corrections.

        With experts, designs stand apart: they ran older kernels, under another server.
        """
        kind = ("moe", "designs") if self.sweep is Sweep.DESIGNS else ("moe",)
        family = (self.backend, self.precision or "bf16", self.gpu.name)
        return family if self.is_dense else (*family, *kind)

    @property
    def spec(self) -> ModelSpec:
        return model_spec(self.model, self.precision, self.kv_kind)

    @property
    def kv_kind(self) -> str:
        """KV storage: fp8 in TensorRT-LLM's, InferenceX's H200 and disaggregated fp8 sweeps."""
        model = load_model(self.model)
        if self.precision != "fp8" or model.latent is not None:
            return "bf16"
        if model.precision.kv_bytes == 1:
            return "fp8"  # the checkpoint says so
        is_public = self.sweep is Sweep.INFERENCEX
        if self.backend == "trtllm" or (self.is_disaggregated and not is_public):
            return "fp8"
        return "fp8" if is_public and self.gpu.name == "h200_sxm" else "bf16"

    @property
    def situation(self) -> Situation:
        return Situation(
            backend=self.backend,
            version=self.backend_version,
            sweep=self.sweep,
            precision=self.precision,
            prompt_tokens=self.prompt_tokens,
            clients=self.clients,
            is_disaggregated=self.is_disaggregated,
        )

    @property
    def engine(self) -> Engine:
        return engine_of(self.situation)

    @property
    def harness(self) -> Harness:
        return harness_of(self.situation)


def _pool_name(pool: Workers) -> str:
    cut = f"tp{pool.cut.tp} dp{pool.cut.attention_dp}"
    return f"{pool.count if pool.is_count_stated else '?'} x {cut}"


_SPECS: dict[tuple[str, str, str], ModelSpec] = {}


def model_spec(model: str, precision: str, kv: str) -> ModelSpec:
    key = (model, precision, kv)
    if key not in _SPECS:
        _SPECS[key] = with_quantisation(load_model(model), weights=WEIGHTS[precision], kv=kv)
    return _SPECS[key]


def read_runs(path: Path = DATA) -> tuple[list[Run], list[str]]:
    """Runs in the file's order, and for each row that is none, why.

    Raises `LocalFault` for a file that cannot be read or lacks a column of `COLUMNS`.
    """
    try:
        packed = path.read_bytes()
        text = (gzip.decompress(packed) if path.suffix == ".gz" else packed).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise LocalFault(f"{path} cannot be read: {error}") from None
    lines = csv.DictReader(io.StringIO(text, newline=""))
    absent = [name for name in COLUMNS if name not in (lines.fieldnames or ())]
    if absent:
        raise LocalFault(f"{path} has no column {', '.join(absent)}")
    runs, refused = [], []
    for number, row in enumerate(lines, start=2):
        try:
            runs.append(_run({key: value or "" for key, value in row.items() if key}))
        except (LocalFault, ValueError) as error:
            refused.append(f"line {number} {row.get('id') or ''}: {error}")
    return runs, refused


def _run(row: Row) -> Run:
    def number(name: str) -> int:
        return int(float(row.get(name) or 0))

    backend, precision = row["backend"], row.get("precision", "")
    if backend not in BACKENDS:
        raise LocalFault(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if precision not in WEIGHTS:
        raise LocalFault(f"precision {precision!r} is not one of {', '.join(WEIGHTS)}")
    if number("isl") < 1 or number("osl") < 1:
        raise LocalFault("isl or osl is missing")
    is_disaggregated = row["mode"] == "disagg"
    prefill = _workers(number, "prefill_") if is_disaggregated else None
    decode = _workers(number, "decode_") if is_disaggregated else None
    return Run(
        id=row.get("id") or "",
        gpu=find_gpu(row["system"]),
        model=_known_model(row["model_path"]),
        backend=backend,
        backend_version=row.get("backend_version", ""),
        precision=precision,
        prompt_tokens=number("isl"),
        output_tokens=number("osl"),
        clients=_clients(number, decode),
        is_concurrency_stated=number("concurrency") > 0,
        cut=Parallelism() if is_disaggregated else _cut(number, ""),
        sweep=sweep_of(number("isl"), row.get("measured", "")),
        **_measured(row),
        prefill=prefill,
        decode=decode,
    )


def _known_model(name: str) -> str:
    """Checkpoints named after their storage have the shape of the model that they store."""
    plain = next((name.removesuffix(end) for end in STORAGE_SUFFIXES if name.endswith(end)), name)
    try:
        load_model(name)
    except LocalFault:
        load_model(plain)
        return plain
    return name


def _measured(row: Row) -> dict[str, float]:
    ttft, tpot = row.get("silicon_ttft_ms"), row.get("silicon_tpot_ms")
    if not ttft and not tpot:
        raise LocalFault("neither silicon_ttft_ms nor silicon_tpot_ms is given")
    return {
        "ttft_s": float(ttft) / 1e3 if ttft else math.nan,
        "tpot_s": float(tpot) / 1e3 if tpot else math.nan,
    }


def _clients(number: Number, decode: Workers | None) -> int:
    """Clients as stated, or what the batches hold: concurrency / workers / attention ranks."""
    concurrency, batch = number("concurrency"), number("batch_size")
    if decode is not None:
        ranks = decode.count * max(number("decode_attention_dp_size"), 1)
        concurrency = concurrency or number("decode_batch_size") * ranks
    elif batch:  # instances share the clients evenly
        per_instance = batch * max(number("attention_dp_size"), 1)
        num_instances = max(1, round(concurrency / per_instance))
        concurrency = -(-concurrency // num_instances) or per_instance
    if concurrency < 1:
        raise LocalFault("neither concurrency nor a batch size is given")
    return concurrency


def _cut(number: Number, prefix: str) -> Parallelism:
    """Some sources write the number of GPUs as `tp` beside data-parallel attention."""
    tp, dp = max(number(f"{prefix}tp_size"), 1), max(number(f"{prefix}attention_dp_size"), 1)
    experts = max(number(f"{prefix}moe_tp_size"), 1) * max(number(f"{prefix}moe_ep_size"), 1)
    if tp > 8:  # 16 or 64 beside 8 expert ranks: counted tp * ep
        tp = min(experts, 8)
    if dp > 8:
        dp = 8
    ep = min(max(number(f"{prefix}moe_ep_size"), 1), tp * dp)
    pp = max(number(f"{prefix}pp_size"), 1)
    return Parallelism(tp=tp, pp=pp, ep=ep, attention_dp=dp)


def _workers(number: Number, prefix: str) -> Workers:
    stated = number(f"{prefix}num_workers")
    return Workers(count=max(stated, 1), cut=_cut(number, prefix), is_count_stated=stated > 0)
