"""Latency profiles: DistServe's coefficients (JSON), Splitwise's measurements (CSV), and our own.

Ours, written by `pdserve profile`, have DistServe's form and more: `placement.fitted_profile`.

A profile is named by a path, or by its file name if it is one of those in `placement/data`.
"""

import csv
import difflib
import functools
import gzip
import importlib.resources
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pdserve.domain.errors import LocalFault
from placement.fitted_profile import SECTION, FittedProfile, parse_section
from placement.simulation.timing import DistserveTiming, SplitwiseTiming

T = TypeVar("T")

PACKAGED = {
    "profiler-a100-80g.distserve.json": "distserve",
    "profiler-a100-80g.vllm.json": "distserve",
    "perf_model.csv": "splitwise",
}
GPU_BYTES = 85_899_345_920
"""Memory of each GPU in Splitwise's simulator, A100 and H100 alike."""
SPLITWISE_COLUMNS = (
    "model",
    "hardware",
    "tensor_parallel",
    "prompt_size",
    "batch_size",
    "prompt_time",
    "token_time",
)
HARDWARE_ALIASES = {
    "a100": "a100-80gb",
    "a100_sxm": "a100-80gb",
    "dgx-a100": "a100-80gb",
    "h100": "h100-80gb",
    "h100_sxm": "h100-80gb",
    "dgx-h100": "h100-80gb",
    "h100-pcap": "h100-80gb-pcap",
    "dgx-h100-pcap": "h100-80gb-pcap",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitwiseModel:
    """What Splitwise's simulator knows of a model; its KV size ignores grouped-query attention."""

    weight_bytes: int
    hidden_size: int
    num_layers: int

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.hidden_size * self.num_layers * 2


SPLITWISE_MODELS = {
    "bloom-176b": SplitwiseModel(weight_bytes=329 * 10**9, hidden_size=14336, num_layers=70),
    "llama2-70b": SplitwiseModel(weight_bytes=135 * 10**9, hidden_size=8192, num_layers=80),
}


@dataclass(frozen=True, slots=True)
class DistserveProfile:
    """Coefficients by model and tensor parallelism, and KV capacities."""

    source: str
    models: Mapping[str, Mapping[str, Any]]
    max_num_tokens: Mapping[tuple[str, int, int], int]

    def timing(
        self, model: str, *, tp: int, pp: int = 1, max_num_tokens: int | None = None
    ) -> DistserveTiming:
        """The fit for one parallelism; raises `LocalFault` that lists what there is."""
        by_tp = _look_up(self.models, model, f"{self.source}: model")
        if str(tp) not in by_tp:
            known = ", ".join(sorted(by_tp, key=int))
            raise LocalFault(f"{self.source}: {model} has no coefficients for tp {tp}; has {known}")
        if max_num_tokens is None:
            max_num_tokens = self.max_num_tokens.get((model, tp, pp)) or by_tp[str(tp)].get(
                "max_num_tokens"
            )
        if max_num_tokens is None:
            known = ", ".join(
                f"tp {t} pp {p}" for m, t, p in sorted(self.max_num_tokens) if m == model
            )
            raise LocalFault(
                f"{self.source}: {model} has no KV capacity for tp {tp} pp {pp}; "
                f"has {known or 'none'}; or give max_num_tokens"
            )
        fit = by_tp[str(tp)]
        try:
            return DistserveTiming(
                prefill=_triple(fit["prefill"]),
                decode_small=_triple(fit["decoding_smallbs"]),
                decode_large=_triple(fit["decoding_largebs"]),
                threshold=int(fit["decoding_large_small_bs_threshold"]),
                max_num_tokens=max_num_tokens,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LocalFault(f"{self.source}: {model} tp {tp}: bad entry: {error}") from None

    def fitted(self, model: str) -> FittedProfile | None:
        """All that `pdserve profile` found out about a model; None where it did not write this."""
        by_tp = _look_up(self.models, model, f"{self.source}: model")
        for entry in by_tp.values():
            if SECTION in entry:
                return parse_section(model, entry[SECTION], source=self.source)
        return None


@dataclass(frozen=True, slots=True)
class SplitwiseProfile:
    """Measured rows by (model, hardware, tp): batch tokens, prompt ms, token ms."""

    source: str
    rows: Mapping[tuple[str, str, int], tuple[tuple[int, float, float], ...]]

    def timing(self, model: str, *, hardware: str, tp: int = 8) -> SplitwiseTiming:
        """Medians by batch tokens; raises `LocalFault` that lists what there is."""
        _look_up({key[0]: None for key in self.rows}, model, f"{self.source}: model")
        name = HARDWARE_ALIASES.get(hardware.lower(), hardware.lower())
        of_model = {key[1]: None for key in self.rows if key[0] == model}
        _look_up(of_model, name, f"{self.source}: gpu of {model}")
        if (model, name, tp) not in self.rows:
            known = sorted(key[2] for key in self.rows if key[:2] == (model, name))
            listed = ", ".join(map(str, known))
            raise LocalFault(f"{self.source}: {model} on {name} has no tp {tp}; has {listed}")
        shape = _look_up(SPLITWISE_MODELS, model, f"{self.source}: size of model")
        prompts: dict[int, list[float]] = {}
        tokens: dict[int, list[float]] = {}
        for batch_tokens, prompt_ms, token_ms in self.rows[model, name, tp]:
            prompts.setdefault(batch_tokens, []).append(prompt_ms)
            tokens.setdefault(batch_tokens, []).append(token_ms)
        knots = sorted(prompts)
        if len(knots) < 2:
            raise LocalFault(f"{self.source}: {model} on {name}: at least 2 batch sizes needed")
        return SplitwiseTiming(
            tokens=np.array(knots, float),
            prompt_s=np.array([statistics.median(t / 1000 for t in prompts[n]) for n in knots]),
            token_s=np.array([statistics.median(t / 1000 for t in tokens[n]) for n in knots]),
            memory_bytes=float(GPU_BYTES * tp),
            weight_bytes=float(shape.weight_bytes),
            kv_bytes_per_token=float(shape.kv_bytes_per_token),
        )


Profile = DistserveProfile | SplitwiseProfile

OPT_SHAPES = {  # layers, hidden size
    "facebook/opt-13b": (40, 5120),
    "facebook/opt-66b": (64, 9216),
    "facebook/opt-175b": (96, 12288),
}


def distserve_kv_bytes_per_token(model: str) -> float:
    """KV of one token in 16 bits; 0 for a model whose shape is not known here."""
    layers, hidden_size = OPT_SHAPES.get(model, (0, 0))
    return 4.0 * layers * hidden_size


def load_fitted(
    name: str | None, model: str, *, folder: Path | None = None
) -> FittedProfile | None:
    """The profile that `pdserve profile` wrote of a model; None for any other, and for no name."""
    profile = load_profile(name, folder=folder) if name is not None else None
    return profile.fitted(model) if isinstance(profile, DistserveProfile) else None


def load_profile(name: str, *, folder: Path | None = None) -> Profile:
    """Read a profile from a path (relative to `folder`) or from those that come with pdserve.

    Raises `LocalFault` for a missing, unreadable or malformed file.
    """
    path = (folder or Path()) / name
    if path.exists():
        return _parse(_read(path), str(path))
    if name.removesuffix(".gz") in PACKAGED:
        return _packaged_profile(name.removesuffix(".gz"))
    close = difflib.get_close_matches(name, PACKAGED, n=1)
    hint = f"did you mean {close[0]}?" if close else f"packaged: {', '.join(PACKAGED)}"
    raise LocalFault(f"{path}: no such profile; {hint}")


@functools.cache
def _packaged_profile(name: str) -> Profile:
    folder = importlib.resources.files("placement") / "data" / PACKAGED[name]
    suffix = ".gz" if PACKAGED[name] == "splitwise" else ""
    data = (folder / (name + suffix)).read_bytes()
    return _parse(gzip.decompress(data) if suffix else data, name)


@functools.cache
def capacities() -> Mapping[tuple[str, int, int], int]:
    """DistServe's KV capacities in tokens by (model, tp, pp)."""
    folder = importlib.resources.files("placement") / "data" / "distserve"
    text = (folder / "max_num_tokens.csv").read_text(encoding="utf-8")
    return {
        (row["model"], int(row["tp"]), int(row["pp"])): int(row["max_num_tokens"])
        for row in csv.DictReader(text.splitlines())
    }


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not gzip"
        raise LocalFault(f"{path}: {reason}") from None


def _parse(data: bytes, source: str) -> Profile:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LocalFault(f"{source}: not UTF-8 at byte {error.start}") from None
    if text.lstrip().startswith("{"):
        return _parse_distserve(text, source)
    return _parse_splitwise(text, source)


def _parse_distserve(text: str, source: str) -> DistserveProfile:
    try:
        models = json.loads(text)
    except json.JSONDecodeError as error:
        raise LocalFault(f"{source}:{error.lineno}: not JSON: {error.msg}") from None
    if not all(isinstance(by_tp, dict) for by_tp in models.values()):
        raise LocalFault(f"{source}: expected coefficients by model and tensor parallelism")
    return DistserveProfile(source, models, capacities())


def _parse_splitwise(text: str, source: str) -> SplitwiseProfile:
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in SPLITWISE_COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise LocalFault(
            f"{source}: neither DistServe's JSON nor Splitwise's CSV: no column {missing[0]}"
        )
    rows: dict[tuple[str, str, int], list[tuple[int, float, float]]] = {}
    for row in reader:
        try:
            key = (row["model"], row["hardware"], int(row["tensor_parallel"]))
            batch_tokens = int(row["prompt_size"]) * int(row["batch_size"])
            times = float(row["prompt_time"]), float(row["token_time"])
        except (TypeError, ValueError) as error:
            raise LocalFault(f"{source}:{reader.line_num}: {error}") from None
        if not all(math.isfinite(time) and time > 0 for time in times):
            raise LocalFault(f"{source}:{reader.line_num}: times must be positive; got {times}")
        rows.setdefault(key, []).append((batch_tokens, *times))
    return SplitwiseProfile(source, {key: tuple(value) for key, value in rows.items()})


def _look_up(known: Mapping[str, T], name: str, what: str) -> T:
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise LocalFault(f"{what} {name!r} is not in it; {hint}has {', '.join(known)}")


def _triple(values: Iterable[float]) -> tuple[float, float, float]:
    a, b, c = (float(value) for value in values)
    return a, b, c
