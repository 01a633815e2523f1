"""A Ray cluster of several nodes on this machine, with custom resources standing for GPUs."""

import contextlib
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

GPU = "big_gpu"
PATIENCE_S = 90.0
MIB = 2**20
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class RayNodes:
    """The head, which has no GPU, and the nodes that were added to it."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.address: str = cluster.address

    def add(self, *, gpus: int, cpus: int = 8, cuda_gpus: int = 0) -> Any:
        """One more node; returns what `kill` takes.

        Ray hands out `cuda_gpus` by CUDA_VISIBLE_DEVICES, whether they are there or not.
        """
        node = self._cluster.add_node(
            num_cpus=cpus,
            num_gpus=cuda_gpus,
            resources={GPU: gpus},
            object_store_memory=80 * MIB,
        )
        self._cluster.wait_for_nodes(PATIENCE_S)
        return node

    def kill(self, node: Any) -> None:
        """SIGKILL for the node's own process: nothing is shut down in order."""
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_and_wait(self, node: Any) -> None:
        """The same, until Ray knows that the node is dead: some seconds later."""
        self.kill(node)
        self._cluster.wait_for_nodes(PATIENCE_S)

    def kill_all_but(self, kept: Collection[Any]) -> None:
        """What one test has added is not there for the next one."""
        for node in self._cluster.worker_nodes - set(kept):
            self.kill(node)
        self._cluster.wait_for_nodes(PATIENCE_S)


@contextlib.contextmanager
def ray_nodes() -> Iterator[RayNodes]:
    """Start the head; everything is gone when the block ends."""
    folder = tempfile.mkdtemp(prefix="pdray")  # sockets lie below it: their paths must be short
    patch = pytest.MonkeyPatch()
    for name, value in QUIET.items():
        patch.setenv(name, value)
    patch.delenv("RAY_ADDRESS", raising=False)
    # Ray notes the head's address below RAY_TMPDIR/ray, which only an earlier run would have made.
    patch.setenv("RAY_TMPDIR", folder)
    (Path(folder) / "ray").mkdir()
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "object_store_memory": 80 * MIB,
            "include_dashboard": False,
            "temp_dir": folder,
        },
    )
    try:
        yield RayNodes(cluster)
    finally:
        cluster.shutdown()
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)
