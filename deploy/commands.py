"""The commands that start clusters: their options and help; light to import (`pdserve --help`)."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pdserve.cli.options import AsJson, GpusFile, OptionalPublicAddress, RayAddress
from pdserve.domain.errors import LocalFault


class Backend(StrEnum):
    """Where `pdserve up` starts a cluster."""

    LOCAL = "local"
    RAY = "ray"


def up(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="A plan of `pdserve plan`, or a cluster file; see --example.",
            metavar="[FILE.YAML]",
        ),
    ] = None,
    backend: Annotated[
        Backend, typer.Option(help="This machine, or a Ray cluster.")
    ] = Backend.LOCAL,
    ray_address: RayAddress = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="demo, demo-draft or a model directory.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Name that clients ask for; left out: the model's own.")
    ] = None,
    override_config: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Rope scaling or context in place of the model's config.json; see docs/models.md.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="torch: real tokens [torch]; timed: step times only, of the plan."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="torch device of every worker; left out: as the plan says.")
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="Plan: this share of every pool's workers, at least one each [1]."),
    ] = None,
    prefill: Annotated[
        int | None, typer.Option(min=0, help="Prefill workers [1]; 0 is colocated serving.")
    ] = None,
    decode: Annotated[int | None, typer.Option(min=1, help="Decode workers [1].")] = None,
    port: Annotated[
        int | None, typer.Option(help="Public port [7450]; 0 picks a free one.")
    ] = None,
    internal_port: Annotated[
        int | None, typer.Option(help="Workers' and operators' port [7451].")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address of the router's ports [127.0.0.1].")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines in, without TLS and login.")
    ] = False,
    pin: Annotated[
        bool | None,
        typer.Option(
            "--pin/--no-pin", help="Prefill and decode on cores of their own [plans: --pin]."
        ),
    ] = None,
    gpus_file: GpusFile = None,
    ray_resource: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GPU_TYPE=NAME[:AMOUNT]",
            help="Ray resource that a rank asks for instead of a plan's GPU type; repeatable.",
        ),
    ] = None,
    ray_cpus: Annotated[
        float, typer.Option(min=0, help="CPUs that each rank asks Ray for; may be a fraction.")
    ] = 1.0,
    show_logs: Annotated[
        bool, typer.Option("--show-logs", help="Ray: print every line that processes log.")
    ] = False,
    num_blocks: Annotated[
        int | None, typer.Option(min=1, help="KV blocks of each worker [1024].")
    ] = None,
    log_dir: Annotated[
        str | None, typer.Option(help="Folder of log files [temporary, removed on a clean exit].")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error [info].")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any field; may be repeated."),
    ] = None,
    as_json: AsJson = False,
    example: Annotated[
        bool, typer.Option("--example", help="Print a cluster file that explains every field.")
    ] = False,
) -> None:
    """Start a router, prefill and decode workers: those of a plan, of a cluster file, or 1 + 1.

    Options win over the file. Ctrl-C, or pdserve down, lets requests finish, then stops everything;
    a second Ctrl-C stops at once.

    \b
    Examples:
      pdserve up
      pdserve up --model ./my-model --prefill 2 --decode 2
      pdserve up plan.yaml
      pdserve up plan.yaml --engine timed --model demo --scale 0.1
      pdserve up plan.yaml --backend ray --ray-address 10.0.0.1:6379
      pdserve up --example > cluster.yaml && pdserve up cluster.yaml
      pdserve up --override-config '{"max_context_tokens": 512}'
      pdserve up --set router.max_num_requests=8 --set timers.drain_s=5
    """
    if example:
        from pdserve.config.cluster import example_yaml

        typer.echo(example_yaml(), nl=False)
        return
    from deploy.opening import read_deployment
    from deploy.up import run_up
    from pdserve.config.base import parse_object

    flags: dict[str, object] = {
        "model": model,
        "model_name": model_name,
        "override_config": parse_object("--override-config", override_config),
        "engine": engine,
        "device": device,
        "prefill.replicas": prefill,
        "decode.replicas": decode,
        "router.host": host,
        "router.insecure": True if insecure else None,
        "router.port": port,
        "router.internal_port": internal_port,
        "prefill.num_blocks": num_blocks,
        "decode.num_blocks": num_blocks,
        "log_dir": log_dir,
        "log_level": log_level,
    }
    deployment = read_deployment(
        file, flags, setting or [], scale=scale, gpus_file=gpus_file, pin=pin
    )
    if backend is Backend.RAY:
        from deploy.ray.opening import open_on_ray
        from deploy.ray.resources import RayOptions, parse_gpu_resources

        options = RayOptions(
            address=ray_address,
            cpus_per_rank=ray_cpus,
            gpu_resources=parse_gpu_resources(ray_resource or []),
            shows_logs=show_logs,
        )
        run_up(
            lambda report: open_on_ray(deployment, options, report),
            deployment,
            backend="ray",
            as_json=as_json,
        )
        return
    if ray_address is not None or ray_resource or show_logs:
        raise LocalFault("--ray-address, --ray-resource and --show-logs are for --backend ray")
    from deploy.local import LocalCluster

    run_up(
        lambda report: LocalCluster.start(deployment, report=report),
        deployment,
        backend="local",
        as_json=as_json,
    )


def down(
    address: OptionalPublicAddress = None,
    backend: Annotated[
        Backend,
        typer.Option(help="Where it runs. ray: wherever its `pdserve up` is, --ray-address tells."),
    ] = Backend.LOCAL,
    ray_address: RayAddress = None,
    every: Annotated[bool, typer.Option("--all", help="All clusters of this user.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop a cluster that `pdserve up` started, after its requests have finished.

    Without --backend ray it is looked for among those of this machine.

    \b
    Examples:
      pdserve down
      pdserve down --address 127.0.0.1:7450
      pdserve down --backend ray --ray-address 10.0.0.1:6379
      pdserve down --all
    """
    import json
    from dataclasses import asdict

    from deploy import runs

    if backend is Backend.RAY:
        from deploy.ray.opening import stop_on_ray

        if every:
            raise LocalFault("--all is for clusters of this machine: name one by --address")
        done = stop_on_ray(ray_address, address)
        text = f"stopped the cluster at {done.address} in {done.elapsed_s:.1f} s"
        typer.echo(json.dumps([asdict(done)]) if as_json else text)
        return
    stopped = []
    chosen = runs.running()
    for run in chosen if every else runs.choose(chosen, address):
        if not as_json:
            typer.echo(f"stopping the cluster at {run.address}", err=True)
        elapsed_s = runs.stop(run)
        stopped.append(asdict(run) | {"stop_s": round(elapsed_s, 3)})
        if not as_json:
            typer.echo(f"stopped in {elapsed_s:.1f} s")
    if as_json:
        typer.echo(json.dumps(stopped))
