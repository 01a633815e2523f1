"""`pdserve check-links`: options and help; light to import."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdserve.cli.options import INTERNAL_ADDRESS_NAMES, AsJson, address_given
from pdserve.domain.errors import LocalFault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.deployment import Deployment
    from deploy.link_check.links import Link

DEFAULT_MIB = 32.0


def check_links(
    file: Annotated[
        Path | None,
        typer.Argument(help="A plan of `pdserve plan`, or a cluster file.", metavar="[FILE.YAML]"),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            "-a",
            callback=address_given,
            help="The router's public host:port; a cluster that `pdserve up` started here.",
        ),
    ] = None,
    internal_address: Annotated[
        str | None,
        typer.Option(
            *INTERNAL_ADDRESS_NAMES,
            callback=address_given,
            help="The router's internal host:port; of a cluster that serves anywhere.",
        ),
    ] = None,
    size_mib: Annotated[
        float | None,
        typer.Option(min=1, max=4096, help=f"File: KV moved at a time, in MiB [{DEFAULT_MIB:g}]."),
    ] = None,
    min_gib_per_s: Annotated[
        float, typer.Option(min=0, help="A link that moves less has failed.")
    ] = 0.0,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="File: any field, as in pdserve up."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what moves KV between each prefill and decode worker; exit 1 if a link is no good.

    Of a file: on this machine, before anything serves. Processes with a little KV memory stand for
    the ranks of each pool; no model is loaded. Of a cluster that serves: by a few prompts of its
    own for each pair of workers.

    \b
    Examples:
      pdserve check-links plan.yaml
      pdserve check-links cluster.yaml --set transports=[tcp] --min-gib-per-s 0.5
      pdserve check-links --address 127.0.0.1:7450
      pdserve check-links --internal-address 10.0.0.1:7451 --json
    """
    if sum(each is not None for each in (file, address, internal_address)) != 1:
        raise LocalFault(
            "give one of these: a plan or cluster file, --address or --internal-address of a "
            "cluster that serves"
        )
    if file is None and (size_mib is not None or setting):
        raise LocalFault("--size-mib and --set are for files: a cluster that serves has its own")
    from deploy.link_check.links import GIB
    from pdserve.cli.running import run

    async def check() -> int:
        notes: Sequence[str] = ()
        if file is None:
            from deploy.link_check.running import measure_cluster

            links = await measure_cluster(internal_address or _internal_address(address))
        else:
            from deploy.link_check.planned import measure_deployment
            from deploy.opening import read_deployment

            deployment = read_deployment(file, {}, setting or [])
            size_bytes = int((size_mib or DEFAULT_MIB) * 2**20)
            links = await measure_deployment(deployment, size_bytes)
            notes = _notes(deployment)
        return _report(links, min_gib_per_s * GIB, notes, as_json=as_json)

    run(check)


def _internal_address(address: str | None) -> str:
    """Of the cluster of this machine that serves at `address`; raises `LocalFault`."""
    from deploy import runs

    for run in runs.running():
        if address in (run.address, run.internal_address):
            return run.internal_address
    raise LocalFault(
        f"`pdserve up` started no cluster at {address} on this machine: give --internal-address"
    )


def _notes(deployment: "Deployment") -> list[str]:
    notes = ["measured between processes of this machine: --internal-address measures what serves"]
    if any(worker.computes_on_gpus for worker in deployment.workers):
        notes.append("the workers' KV is on GPUs: what is measured here is memory of the host")
    return notes


def _report(
    links: "Sequence[Link]", min_bytes_per_s: float, notes: "Sequence[str]", *, as_json: bool
) -> int:
    from deploy.link_check.report import links_as_json, print_links
    from pdserve.cli.status_view import plain_console

    if as_json:
        typer.echo(links_as_json(links, min_bytes_per_s, notes))
    else:
        print_links(plain_console(), links, min_bytes_per_s, notes)
    return int(any(link.verdict(min_bytes_per_s) for link in links))
