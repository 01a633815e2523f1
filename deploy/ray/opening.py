"""The ways from the command line to Ray; imports Ray only when it is used."""

import asyncio
from typing import TYPE_CHECKING

from deploy.backend import Cluster, Report
from deploy.deployment import Deployment
from deploy.ray.resources import RayOptions
from pdserve.domain.errors import LocalFault

if TYPE_CHECKING:
    from deploy.ray.stopping import Stopped

NOT_INSTALLED = "--backend ray needs the extra: pip install 'pdserve[ray]'"


def open_on_ray(deployment: Deployment, options: RayOptions, report: Report) -> Cluster:
    """A cluster that starts when its block is entered; raises `LocalFault` without Ray."""
    try:
        from deploy.ray_cluster import RayCluster
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise LocalFault(NOT_INSTALLED) from None
    return RayCluster.start(deployment, options=options, report=report)


def stop_on_ray(ray_address: str | None, cluster: str | None) -> "Stopped":
    """Have the cluster at public address `cluster`, or the only one, drain and go."""
    try:
        from deploy.ray.stopping import stop_cluster
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise LocalFault(NOT_INSTALLED) from None
    return asyncio.run(stop_cluster(ray_address, cluster))
