"""What `pdserve render` does: plan in, folder out, a summary for people or programs."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.compose import ComposeOptions, render_compose
from deploy.deployment import Deployment
from deploy.kubernetes.pools import pools_of
from deploy.kubernetes.rendering import render, warnings_of
from deploy.kubernetes.values import RenderOptions
from deploy.opening import read_deployment
from deploy.output_folder import write_files


def read_for_rendering(
    path: Path,
    flags: Mapping[str, object],
    assignments: Sequence[str],
    *,
    scale: float | None,
    gpus_file: Path | None,
) -> Deployment:
    """The file's cluster; no worker is tied to cores of this machine."""
    return read_deployment(path, flags, assignments, scale=scale, gpus_file=gpus_file, pin=False)


def write_kubernetes(
    deployment: Deployment,
    options: RenderOptions,
    folder: Path,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Render and write; warnings go to stderr."""
    files = render(deployment, options)
    warnings = warnings_of(deployment, options.model_claim)
    write_files(folder, files, overwrite=overwrite)
    target = shlex.quote(str(folder))
    steps = [
        f"kubectl apply -k {target}/overlays/production",
        f"kubectl apply -k {target}/smoke",
    ]
    _say(deployment, folder, files, warnings, steps, as_json=as_json)


def write_compose(
    deployment: Deployment,
    options: ComposeOptions,
    folder: Path,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Render and write; warnings go to stderr."""
    files = render_compose(deployment, options)
    warnings = warnings_of(deployment, options.models_dir)
    write_files(folder, files, overwrite=overwrite)
    target = shlex.quote(str(folder))
    steps = [
        f"docker compose --project-directory {target} up --wait",
        f"docker compose --project-directory {target} run --rm smoke",
    ]
    _say(deployment, folder, files, warnings, steps, as_json=as_json)


def _say(
    deployment: Deployment,
    folder: Path,
    files: Mapping[str, str],
    warnings: Sequence[str],
    steps: Sequence[str],
    *,
    as_json: bool,
) -> None:
    for warning in warnings:
        print(f"pdserve: note: {warning}", file=sys.stderr)
    pools = pools_of(deployment.workers)
    if as_json:
        summary = {
            "folder": str(folder),
            "files": sorted(files),
            "pools": [
                {"name": pool.name, "replicas": pool.replicas, "gpus_per_worker": pool.num_gpus}
                for pool in pools
            ],
            "warnings": list(warnings),
        }
        print(json.dumps(summary))
        return
    print(f"{len(files)} files in {folder}")
    for pool in pools:
        gpus = f", {pool.num_gpus} {pool.gpu} each" if pool.num_gpus else ""
        print(f"  {pool.name}: {pool.replicas} workers{gpus}")
    print("next:\n" + "\n".join(f"  {step}" for step in steps))
