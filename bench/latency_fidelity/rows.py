"""The measured runs: one row a run, with the rules of the engine and harness behind it."""

import csv
import gzip
import io
from dataclasses import dataclass, replace
from pathlib import Path

from bench.latency_fidelity.closed_loop import SGLANG, TRTLLM, VLLM
from pdserve.domain.errors import LocalFault
from placement.hardware import Gpu, find_gpu
from placement.model_config import load_model, with_quantisation
from placement.model_spec import ModelSpec, Parallelism

DATA = Path(__file__).parent / "data" / "e2e_silicon_calib.csv.gz"
WEIGHTS = {"": "bf16", "fp8": "fp8", "fp4": "mxfp4", "int4": "int4"}


MANY = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How one framework was run: assumptions about its settings, the same for all its rows."""

    rule: int
    memory_share: float
    step_tokens: int | None  # prompt budget of a step; None: that of `prompts_per_step` prompts
    prompts_per_step: int = MANY
    num_waves: int = 10  # requests of a run over its concurrency
    spare_clients: int = 0  # clients beyond the engine's slots: so many always wait


# Sources of each assumption: docs/latency-model.md, "Engines behind the fidelity rows".
ENGINES = {
    "vllm": Engine(rule=VLLM, memory_share=0.9, step_tokens=None, prompts_per_step=2, num_waves=16),
    "sglang": Engine(rule=SGLANG, memory_share=0.825, step_tokens=16384, num_waves=8),
    "trtllm": Engine(
        rule=TRTLLM, memory_share=0.9, step_tokens=None, prompts_per_step=4, num_waves=16
    ),
}
MIXED_SGLANG = Engine(rule=VLLM, memory_share=0.825, step_tokens=8192, num_waves=4)
MIXED_SGLANG_SINCE = (0, 5, 6)
INFERENCEX_STEP_TOKENS = 8192
INFERENCEX_WAVES = 10
INFERENCEX_LENGTHS = 0.8  # lengths even between this share of the nominal one and all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One row."""

    id: str
    gpu: Gpu
    model: str
    backend: str
    backend_version: str
    precision: str
    is_disaggregated: bool
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    is_concurrency_stated: bool
    cut: Parallelism
    is_inferencex: bool
    ttft_s: float
    tpot_s: float
    prefill: tuple[int, Parallelism] | None = None  # workers and how each is cut
    decode: tuple[int, Parallelism] | None = None

    @property
    def group(self) -> str:
        """Runs of one configuration at different concurrencies: never split in validation."""
        cut = f"tp{self.cut.tp} ep{self.cut.ep} dp{self.cut.attention_dp}"
        lengths = f"{self.prompt_tokens}/{self.output_tokens}"
        return f"{self.model} {self.gpu.name} {self.backend} {self.precision} {cut} {lengths}"

    @property
    def is_dense(self) -> bool:
        return self.spec.experts is None

    @property
    def family(self) -> tuple[str, ...]:
        """Backend, precision, GPU, and whether experts are there: one set of corrections."""
        kind = () if self.is_dense else ("moe",)
        return (self.backend, self.precision or "bf16", self.gpu.name, *kind)

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
        if self.backend == "trtllm" or (self.is_disaggregated and not self.is_inferencex):
            return "fp8"
        return "fp8" if self.is_inferencex and self.gpu.name == "h200_sxm" else "bf16"

    @property
    def engine(self) -> Engine:
        """Later SGLang sweeps mixed prompt chunks with decodes; InferenceX sets vLLM's budget."""
        engine = ENGINES[self.backend]
        if self.is_inferencex:
            engine = replace(engine, num_waves=INFERENCEX_WAVES)
            if self.backend == "vllm":
                tokens = INFERENCEX_STEP_TOKENS
                engine = replace(engine, step_tokens=tokens, prompts_per_step=MANY)
            return engine
        version = tuple(int(part) for part in self.backend_version.split(".")[:3] if part.isdigit())
        if self.backend == "trtllm" and not self.precision:
            return replace(engine, spare_clients=1)
        if self.backend == "sglang" and version >= MIXED_SGLANG_SINCE:
            return MIXED_SGLANG
        return engine


_SPECS: dict[tuple[str, str, str], ModelSpec] = {}


def model_spec(model: str, precision: str, kv: str) -> ModelSpec:
    key = (model, precision, kv)
    if precision not in WEIGHTS:
        raise LocalFault(f"precision {precision!r} is not known here")
    if key not in _SPECS:
        _SPECS[key] = with_quantisation(load_model(model), weights=WEIGHTS[precision], kv=kv)
    return _SPECS[key]


def read_runs(path: Path = DATA) -> list[Run]:
    """All rows, in the file's order; raises `LocalFault` for one it cannot read."""
    packed = path.read_bytes()
    text = (gzip.decompress(packed) if path.suffix == ".gz" else packed).decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    return [_run(row, f"{path}:{number}") for number, row in enumerate(rows, start=2)]


def _run(row: dict[str, str], where: str) -> Run:
    def number(name: str) -> int:
        return int(float(row[name] or 0))

    try:
        is_disaggregated = row["mode"] == "disagg"
        prefill = _pool(number, "prefill_") if is_disaggregated else None
        decode = _pool(number, "decode_") if is_disaggregated else None
        concurrency = number("concurrency") or number("batch_size")
        if not concurrency and decode is not None:
            num, cut = decode
            concurrency = number("decode_batch_size") * num * cut.attention_dp
        return Run(
            id=row["id"],
            gpu=find_gpu(row["system"]),
            model=row["model_path"],
            backend=row["backend"],
            backend_version=row["backend_version"],
            precision=row["precision"],
            is_disaggregated=is_disaggregated,
            prompt_tokens=number("isl"),
            output_tokens=number("osl"),
            concurrency=max(concurrency, 1),
            is_concurrency_stated=bool(row["concurrency"]),
            cut=_cut(number, "") if not is_disaggregated else Parallelism(),
            is_inferencex=bool(row["measured"]) and bool(row["concurrency"]),
            ttft_s=float(row["silicon_ttft_ms"]) / 1e3,
            tpot_s=float(row["silicon_tpot_ms"]) / 1e3,
            prefill=prefill,
            decode=decode,
        )
    except (KeyError, ValueError) as error:
        raise LocalFault(f"{where}: not a fidelity row: {error}") from None


def _cut(number, prefix: str) -> Parallelism:  # type: ignore[no-untyped-def]
    """Some sources write the number of GPUs as `tp` beside data-parallel attention."""
    tp, dp = max(number(f"{prefix}tp_size"), 1), max(number(f"{prefix}attention_dp_size"), 1)
    experts = max(number(f"{prefix}moe_tp_size"), 1) * max(number(f"{prefix}moe_ep_size"), 1)
    if tp > 8:  # 16 or 64 beside 8 expert ranks: counted tp * ep
        tp = min(experts, 8)
    if dp > 8:
        dp = 8
    ep = min(max(number(f"{prefix}moe_ep_size"), 1), tp * dp)
    return Parallelism(tp=tp, ep=ep, attention_dp=dp)


def _pool(number, prefix: str) -> tuple[int, Parallelism]:  # type: ignore[no-untyped-def]
    return max(number(f"{prefix}num_workers"), 1), _cut(number, prefix)
