"""`pdserve profile`: options and help, and the two ways to a cluster; light to import.

The command lives above `placement`, which measures and fits, since it may start a cluster itself.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdserve.cli.options import INTERNAL_ADDRESS_NAMES, AsJson, address_given

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploy.deployment import Deployment
    from pdserve.config.cluster import ClusterSettings
    from placement.fitted_profile import FittedProfile
    from placement.probing import Advance, ProbePlan

UNNAMED_GPU = "profiled"


def profile(
    internal_address: Annotated[
        str | None,
        typer.Option(
            *INTERNAL_ADDRESS_NAMES,
            callback=address_given,
            help="The router's internal host:port; it must serve no one.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Start a cluster of 1 + 1 workers with this model."),
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="--model: tensor parallel ranks of each worker [1].")
    ] = None,
    pp: Annotated[
        int | None, typer.Option(min=1, help="--model: pipeline stages of each worker [1].")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="--model: cpu, or cuda, which needs --gpu [cpu].")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="--model: float32, bfloat16 or float16 [float32].")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="--model: any field of a cluster file, such as prefill.tp=2; repeatable.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the profile goes.")] = Path(
        "profile.json"
    ),
    sim: Annotated[
        Path | None, typer.Option("--sim", help="Also write a configuration for pdserve simulate.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, max=100, help="Each figure is the median of so many.")
    ] = 5,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Answers side by side at one decode worker at most.")
    ] = 16,
    gpu: Annotated[
        str, typer.Option(help="GPU type of the workers, as in `pdserve gpus`; plans name it.")
    ] = UNNAMED_GPU,
    as_json: AsJson = False,
) -> None:
    """Fit the latency model to a running cluster, by requests; show how well it fits.

    Give --internal-address for a cluster that runs (and serves nobody else), or --model.

    \b
    Examples:
      pdserve profile --model demo
      pdserve profile --internal-address 127.0.0.1:7451 --output a100.json --sim sim.yaml
      pdserve simulate --config sim.yaml --workload w.csv
      pdserve profile --internal-address 10.0.0.5:7451 --gpu h100_sxm --output h100.json
      pdserve profile --model ./my-model --device cuda --dtype bfloat16 --gpu h100_sxm --tp 2
    """
    from dataclasses import replace

    from pdserve.cli.running import run
    from pdserve.config.files import write_file
    from pdserve.domain.errors import LocalFault
    from placement.fitted_profile import simulation_yaml, to_json, write_profile
    from placement.probing import ProbePlan

    if (internal_address is None) == (model is None):
        given = "both" if model else "neither"
        raise LocalFault(f"give --internal-address or --model, one of them; got {given}")
    flags = {"model": model, "tp": tp, "pp": pp, "device": device, "dtype": dtype}
    given_flags = {name: value for name, value in flags.items() if value is not None}
    if model is None and (given_flags or setting):
        names = ", ".join([*(f"--{name}" for name in given_flags), *(["--set"] if setting else [])])
        raise LocalFault(f"{names}: a cluster that runs has its own; these are for --model")
    settings = profiled_settings(given_flags, setting or []) if model is not None else None
    if settings is not None and settings.device != "cpu" and gpu == UNNAMED_GPU:
        raise LocalFault(
            f"--device {settings.device} needs --gpu TYPE, a type of `pdserve gpus`: plans from "
            "this profile start their workers where such GPUs are"
        )
    if settings is not None and sim is not None:
        for worker in settings.worker_settings(""):
            if worker.engine.pp > 1:
                raise LocalFault(
                    f"--sim: {worker.role} workers have pp {worker.engine.pp}, and a profile of "
                    "several stages is not simulated; leave --sim out, or profile pp 1"
                )
    for path in (output, sim):
        _check_writable(path)
    plan = ProbePlan(num_rounds=rounds, max_batch=max_batch)

    async def start() -> None:
        found = replace(await _measure(internal_address, settings, plan), gpu=gpu)
        write_profile(found, output)
        if sim is not None:
            write_file(sim, simulation_yaml(found, str(output.resolve())))
        if as_json:
            import json

            typer.echo(json.dumps(to_json(found), indent=1))
            return
        from pdserve.cli.status_view import plain_console
        from placement.profile_view import show_profile

        show_profile(found, plain_console())
        typer.echo(f"wrote {output}" + (f" and {sim}" if sim else ""))

    run(start)


async def profile_cluster(
    internal_address: str, plan: "ProbePlan", advance: "Advance"
) -> "FittedProfile":
    """Measure the cluster of the router at this address.

    Raises `LocalFault` if it refuses what is asked, since it is then not free to be measured, or
    if a request fails, such as by the loss of a worker.
    """
    from pdserve.client.admin import AdminClient
    from pdserve.client.inference import InferenceClient
    from pdserve.client.load import only_model
    from pdserve.domain.errors import LocalFault, PdserveError, Refused
    from placement.probing import Prober, Workers

    async with AdminClient(internal_address) as admin:
        state = await admin.cluster_state()
    workers = Workers.of(state)
    async with InferenceClient(state.public_address) as client:
        served = await only_model(client)
        prober = Prober(client=client, model=served, workers=workers, plan=plan, advance=advance)
        try:
            return await prober.measure()
        except* PdserveError as group:
            failed = _first_of(group)
    if isinstance(failed, LocalFault):
        raise failed
    if not isinstance(failed, Refused):
        raise LocalFault(
            f"a request of the profile failed in the cluster at {internal_address}: {failed}; "
            "times of a cluster that fails are not worth keeping: profile again"
        )
    raise LocalFault(
        f"the cluster at {internal_address} refused a request of the profile: {failed}; profile "
        "one that serves nobody else and has no plan's limits: `pdserve profile --model` starts one"
    )


def _first_of(group: BaseException) -> BaseException:
    """The first error in a group of groups."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def profiled_settings(
    flags: "Mapping[str, object]", assignments: "Sequence[str]"
) -> "ClusterSettings":
    """One worker of each kind on free ports, with `assignments` and then `flags` laid over it.

    Raises `LocalFault` naming the field.
    """
    from pdserve.config.base import parse_assignment
    from pdserve.config.cluster import parse_cluster_settings

    own = {"router": {"port": 0, "internal_port": 0}, "log_level": "warning"}
    given = dict(map(parse_assignment, assignments)) | dict(flags)
    return parse_cluster_settings(own, given, source="settings")


def profiled_deployment(settings: "ClusterSettings") -> "Deployment":
    """On cores as a plan's workers have them, so that the profile is of what a plan starts."""
    from deploy.deployment import deployment_of_cluster
    from deploy.opening import pinned

    return pinned(deployment_of_cluster(settings))


async def _measure(
    address: str | None, settings: "ClusterSettings | None", plan: "ProbePlan"
) -> "FittedProfile":
    from dataclasses import replace

    from rich.console import Console

    from deploy.local import LocalCluster
    from deploy.machine_load import LoadMeter, families

    with Console(stderr=True).status("looking at the cluster") as status:
        if address is not None:
            return await profile_cluster(address, plan, status.update)
        assert settings is not None
        deployment = profiled_deployment(settings)
        async with LocalCluster.start(deployment, report=status.update) as cluster:
            meter = LoadMeter(families(process.pid for process in cluster.processes))
            found = await profile_cluster(cluster.internal_address, plan, status.update)
            return replace(found, foreign_cores=meter.foreign_cores())


def _check_writable(path: Path | None) -> None:
    """A path that cannot be written is told before minutes of measuring."""
    from pdserve.domain.errors import LocalFault

    if path is not None and not path.resolve().parent.is_dir():
        raise LocalFault(f"{path}: no such folder")
