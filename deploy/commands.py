"""The commands that start clusters: their options and help; light to import (`pdserve --help`)."""

from pathlib import Path
from typing import Annotated

import typer


def up(
    cluster_file: Annotated[
        Path | None, typer.Argument(help="A cluster file; see --example.", metavar="[CLUSTER.YAML]")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="demo, demo-draft or a model directory.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Name that clients ask for; left out: the model's own.")
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
    as_json: Annotated[
        bool, typer.Option("--json", help="Say that it is ready in one line of JSON.")
    ] = False,
    example: Annotated[
        bool, typer.Option("--example", help="Print a cluster file that explains every field.")
    ] = False,
) -> None:
    """Start a router, prefill and decode workers on this machine.

    Options win over the cluster file. Ctrl-C lets requests finish, then stops everything; a second
    Ctrl-C stops at once.

    \b
    Examples:
      pdserve up
      pdserve up --model ./my-model --prefill 2 --decode 2
      pdserve up --example > cluster.yaml && pdserve up cluster.yaml
      pdserve up --set router.max_num_requests=8 --set timers.drain_s=5
    """
    if example:
        from pdserve.config.cluster import example_yaml

        typer.echo(example_yaml(), nl=False)
        return
    from deploy.up import run_up, settings_of

    flags: dict[str, object] = {
        "model": model,
        "model_name": model_name,
        "prefill.replicas": prefill,
        "decode.replicas": decode,
        "router.port": port,
        "router.internal_port": internal_port,
        "prefill.num_blocks": num_blocks,
        "decode.num_blocks": num_blocks,
        "log_dir": log_dir,
        "log_level": log_level,
    }
    run_up(settings_of(cluster_file, flags, setting or []), as_json=as_json)
