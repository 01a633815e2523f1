"""`pdserve render`: options and help; light to import."""

from pathlib import Path
from typing import Annotated

import typer

from pdserve.cli.options import AsJson, GpusFile

app = typer.Typer(
    help="Write a plan as files for another place: Kubernetes, Docker Compose.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

PlanFile = Annotated[
    Path,
    typer.Argument(help="A plan of `pdserve plan`, or a cluster file.", metavar="PLAN.YAML"),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder that the files go to.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier rendering there.")]
Name = Annotated[str, typer.Option(help="Name of the cluster; all its objects begin with it.")]
ImageRouter = Annotated[
    str | None, typer.Option(help="Image of routers, with version or digest [pdserve-router].")
]
ImageWorker = Annotated[
    str | None, typer.Option(help="Image of workers, with version or digest [pdserve-worker].")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Where containers find the model; left out: as the plan says."
    ),
]
Engine = Annotated[
    str | None, typer.Option(help="torch: real tokens [torch]; timed: step times only.")
]
Scale = Annotated[
    float | None, typer.Option(help="This share of every pool's workers, at least one each [1].")
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any field of a cluster file; repeatable."),
]


@app.command()
def kubernetes(
    plan: PlanFile,
    output: Output,
    name: Name = "pdserve",
    namespace: Annotated[str, typer.Option(help="Namespace, which is created.")] = "pdserve",
    routers: Annotated[int, typer.Option(min=1, help="Routers; each enforces its share.")] = 2,
    image_router: ImageRouter = None,
    image_worker: ImageWorker = None,
    model: Model = None,
    model_claim: Annotated[
        str, typer.Option(help="PersistentVolumeClaim with models, mounted at /models.")
    ] = "",
    engine: Engine = None,
    scale: Scale = None,
    gpus_file: GpusFile = None,
    gpu_label: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE=LABEL=VALUE", help="Node label of a GPU type; repeatable."),
    ] = None,
    prometheus_namespace: Annotated[
        str, typer.Option(help="Where Prometheus runs, for the monitoring overlay.")
    ] = "monitoring",
    setting: Setting = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write manifests for `kubectl apply -k`: a base, overlays dev, production, monitoring.

    \b
    Examples:
      pdserve render kubernetes plan.yaml -o k8s
      pdserve render kubernetes plan.yaml -o k8s --model-claim models --model /models/my-model
      kubectl apply -k k8s/overlays/production
    """
    from deploy.kubernetes.accelerators import parse_gpu_label
    from deploy.kubernetes.rendering import render
    from deploy.kubernetes.values import ROUTER_IMAGE, WORKER_IMAGE, RenderOptions
    from deploy.opening import read_deployment
    from deploy.render import write_rendering

    options = RenderOptions(
        name=name,
        namespace=namespace,
        num_routers=routers,
        model_claim=model_claim,
        prometheus_namespace=prometheus_namespace,
        gpu_labels=dict(map(parse_gpu_label, gpu_label or [])),
        image_router=image_router or ROUTER_IMAGE,
        image_worker=image_worker or WORKER_IMAGE,
    )
    flags = {"model": model, "engine": engine}
    deployment = read_deployment(
        plan, flags, setting or [], scale=scale, gpus_file=gpus_file, pin=False
    )
    write_rendering(
        deployment,
        render(deployment, options),
        output,
        models=options.model_claim,
        steps=("kubectl apply -k {}/overlays/production", "kubectl apply -k {}/smoke"),
        overwrite=overwrite,
        as_json=as_json,
    )


@app.command()
def compose(
    plan: PlanFile,
    output: Output,
    name: Name = "pdserve",
    image_router: ImageRouter = None,
    image_worker: ImageWorker = None,
    model: Model = None,
    models_dir: Annotated[
        str, typer.Option(help="Folder of this machine with models, mounted at /models.")
    ] = "",
    engine: Engine = None,
    scale: Scale = None,
    gpus_file: GpusFile = None,
    setting: Setting = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a Docker Compose project: the plan's processes as containers of one machine.

    \b
    Examples:
      pdserve render compose plan.yaml -o compose
      cd compose && docker compose up --wait && docker compose run --rm smoke
    """
    from deploy.compose import ComposeOptions, render_compose
    from deploy.kubernetes.values import ROUTER_IMAGE, WORKER_IMAGE
    from deploy.opening import read_deployment
    from deploy.render import write_rendering

    options = ComposeOptions(
        name=name,
        image_router=image_router or ROUTER_IMAGE,
        image_worker=image_worker or WORKER_IMAGE,
        models_dir=models_dir,
    )
    flags = {"model": model, "engine": engine}
    deployment = read_deployment(
        plan, flags, setting or [], scale=scale, gpus_file=gpus_file, pin=False
    )
    compose = "docker compose --project-directory {} "
    write_rendering(
        deployment,
        render_compose(deployment, options),
        output,
        models=options.models_dir,
        steps=(f"{compose}up --wait", f"{compose}run --rm smoke"),
        overwrite=overwrite,
        as_json=as_json,
    )
