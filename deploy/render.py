"""What `pdserve render` does: plan in, folder out, a summary for people or programs."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.deployment import Deployment
from deploy.kubernetes.pools import pools_of
from deploy.kubernetes.rendering import warnings_of
from deploy.output_folder import write_files
from deploy.preflight import check_ranks_if_possible


def write_rendering(
    deployment: Deployment,
    files: Mapping[str, str],
    folder: Path,
    *,
    models: str,
    steps: Sequence[str],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the files and say so; warnings go to stderr.

    Raises `LocalFault` for ranks among which a model that is here cannot be divided.
    `models` is mounted at /models, if any. `steps`, which name the folder as {}, come next.
    """
    warnings = [*warnings_of(deployment, models), *check_ranks_if_possible(deployment)]
    write_files(folder, files, overwrite=overwrite)
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
        gpus = f", {pool.num_gpus} {pool.gpu or 'GPUs'} each" if pool.num_gpus else ""
        print(f"  {pool.name}: {pool.replicas} workers{gpus}")
    target = shlex.quote(str(folder))
    print("next:\n" + "\n".join(f"  {step.format(target)}" for step in steps))
