"""`pdserve gpus`: the GPU types that plans can use, and what one model needs on each."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from pdserve.cli.options import AsJson, GpusFile

if TYPE_CHECKING:
    from placement.hardware import Gpu
    from placement.model_spec import ModelSpec


EXAMPLE = """\
# GPU types of your own: pdserve gpus --gpus-file gpus.yaml; in inputs of a plan cluster.gpus_file
gpus:
  - name: acme_x1              # a name of the catalogue replaces that type
    memory_gib: 96
    memory_gb_per_s: 4000      # 1e9 bytes/s
    bf16_tflops: 900           # dense
    fp8_tflops: 1800           # fp8_tflops, fp4_tflops left out: it has none
    tdp_w: 600
    gpus_per_node: 8
    intra_node_gb_per_s: 400   # one GPU to its node, one way
    inter_node_gb_per_s: 50    # one GPU to other nodes, one way
    usd_per_hour: 2.5          # needed for costs
    # tables: h100_sxm         # take step times from this system's measured tables
    source: data sheet of 2026-01
"""


def gpus(
    name: Annotated[
        str | None, typer.Argument(help="One GPU type, in full; left out: all, as a table.")
    ] = None,
    gpus_file: GpusFile = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Model name or config.json: adds what fits, how fast."),
    ] = None,
    as_json: AsJson = False,
    example: Annotated[
        bool, typer.Option("--example", help="Print a file of own GPU types, explained.")
    ] = False,
) -> None:
    """List GPU types: memory, bandwidth, arithmetic, links, power, assumed price."""
    if example:
        typer.echo(EXAMPLE, nl=False)
        return
    from placement.hardware import find_gpu, load_gpus
    from placement.model_config import load_model

    known = load_gpus(gpus_file)
    chosen = [find_gpu(name, known)] if name else list(known.values())
    spec = load_model(model) if model else None
    if as_json:
        typer.echo(json.dumps([_record(gpu, spec) for gpu in chosen], indent=2))
        return
    if name and spec is None:
        for field, value in chosen[0].model_dump().items():
            typer.echo(f"{field:22} {'-' if value is None else value}")
        return
    _print_table(chosen, spec)


def _record(gpu: "Gpu", spec: "ModelSpec | None") -> dict[str, object]:
    record: dict[str, object] = gpu.model_dump()
    record["latency_source"] = "measured" if gpu.has_tables else "roofline"
    if spec is not None:
        record["model"] = {"name": spec.name, **_fit(gpu, spec)}
    return record


def _fit(gpu: "Gpu", spec: "ModelSpec") -> dict[str, object]:
    """The least TP inside one node that holds the weights, and speed there."""
    from placement.latency import composed_latency, kv_capacity_tokens
    from placement.model_spec import Parallelism

    tp = 1
    while tp <= gpu.gpus_per_node:
        cut = Parallelism(tp=tp)
        tokens = kv_capacity_tokens(spec, gpu, cut) if spec.fits(cut) is None else 0
        if tokens >= 4096:
            latency = composed_latency(spec, gpu, cut)
            return {
                "tp": tp,
                "kv_tokens": tokens,
                "prefill_2048_s": latency.prefill_s([2048]),
                "decode_16_s": latency.decode_s(16, 2048),
                "relative_error": latency.relative_error,
            }
        tp *= 2
    return {"tp": None}


def _print_table(chosen: "list[Gpu]", spec: "ModelSpec | None") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("GPU", no_wrap=True)
    heads = ["GiB", "TB/s", "bf16 TF", "fp8 TF", "node GB/s", "net GB/s", "W", "$/h*", "latency"]
    if spec is not None:
        heads = ["GiB", "$/h*", "latency", "TP", "KV tokens", "prefill 2k", "decode x16"]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for gpu in chosen:
        price = "-" if gpu.usd_per_hour is None else f"{gpu.usd_per_hour:.2f}"
        latency = "measured" if gpu.has_tables else "roofline"
        if spec is None:
            table.add_row(
                gpu.name,
                f"{gpu.memory_gib:.0f}",
                f"{gpu.memory_gb_per_s / 1e3:.2f}",
                f"{gpu.bf16_tflops:.0f}",
                "-" if gpu.fp8_tflops is None else f"{gpu.fp8_tflops:.0f}",
                f"{gpu.intra_node_gb_per_s:.0f}",
                f"{gpu.inter_node_gb_per_s:.1f}",
                f"{gpu.tdp_w:.0f}",
                price,
                latency,
            )
        else:
            table.add_row(gpu.name, f"{gpu.memory_gib:.0f}", price, latency, *_fit_cells(gpu, spec))
    console = Console(width=110, soft_wrap=True)
    console.print(table)
    console.print(
        "* our assumption of a list price: set your own with --gpus-file gpus.yaml", style="dim"
    )


def _fit_cells(gpu: "Gpu", spec: "ModelSpec") -> list[str]:
    fit = _fit(gpu, spec)
    if fit["tp"] is None:
        return ["-", "no fit", "-", "-"]
    prefill_s, decode_s = float(str(fit["prefill_2048_s"])), float(str(fit["decode_16_s"]))
    return [
        str(fit["tp"]),
        f"{fit['kv_tokens']:,}",
        f"{prefill_s * 1e3:.0f} ms",
        f"{decode_s * 1e3:.1f} ms",
    ]
