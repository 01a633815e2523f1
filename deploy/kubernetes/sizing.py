"""Memory, CPU and disk that a pod asks for, from the model's and the KV's size."""

import math
from dataclasses import dataclass

from deploy.deployment import Deployment
from deploy.kubernetes.accelerators import Accelerator
from deploy.kubernetes.pools import Pool
from deploy.kubernetes.values import Manifest
from pdserve.domain.errors import LocalFault
from pdserve.engine.model_files import resolve_model_dir
from placement.model_config import load_model
from placement.model_spec import ModelSpec, Parallelism

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
WORKER_BASE_BYTES = 2 * GIB  # interpreter, torch, grpc, kernels compiled at the start
RANK_BYTES = GIB // 2  # of one more rank: it begins as a fork, and shares what is imported
TIMED_BASE_BYTES = GIB  # the same without torch
WEIGHT_COPIES = 2.0  # read from the file and packed for the kernels, before the first is freed
HOST_BYTES_PER_GPU = 4 * GIB  # driver, pinned buffers of copies to and from the GPU
SHM_BYTES_PER_GPU = GIB  # collectives between ranks use /dev/shm
LOAD_BYTES_PER_S = 100e6  # a slow network file system
START_BASE_S = 300.0
GATHER_S = 600.0  # the pods of a worker may start so long after one another
PACKAGED = ("demo", "demo-draft")
SCRATCH_BYTES = 2 * GIB  # kernels compiled at the start, under /tmp


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSize:
    """What one worker pod is given; bytes and cores."""

    memory_bytes: int
    cpu: float
    shm_bytes: int
    scratch_bytes: int
    start_s: float  # loading may take this long before the pod counts as stuck

    def resources(self, gpus: int, accelerator: Accelerator | None) -> Manifest:
        """Requests and limits alike, so that a worker is neither throttled nor evicted first."""
        amounts: dict[str, str | int] = {
            "cpu": _cores(self.cpu),
            "memory": f"{math.ceil(self.memory_bytes / 2**20)}Mi",
            "ephemeral-storage": f"{math.ceil(1.5 * self.scratch_bytes / 2**20)}Mi",
        }
        if accelerator is not None and gpus:
            amounts[accelerator.resource] = gpus
        return {"requests": dict(amounts), "limits": dict(amounts)}


def size_of(pool: Pool, model: ModelSpec) -> PodSize:
    """Of one pod of `pool` that serves `model`."""
    engine = pool.settings.engine
    value_bytes = DTYPE_BYTES[engine.dtype]
    weight_bytes = model.num_params * value_bytes / pool.num_pods
    # GPUs keep quantised weights and KV as the config says; the CPU engine knows `dtype` only.
    kv_share = value_bytes / model.precision.kv_bytes if not pool.num_gpus else 1.0
    token_bytes = model.kv_bytes_per_token() * kv_share
    if engine.engine == "torch":
        # Ranks beyond the number of KV heads hold some again; each stage counts as the fullest.
        cut = Parallelism(tp=engine.tp, pp=engine.pp)
        token_bytes = model.kv_bytes_per_gpu_token(cut) * engine.num_ranks * kv_share
    kv_bytes = engine.host_num_blocks * engine.block_size * token_bytes
    if pool.num_gpus:
        weight_bytes = min(weight_bytes, model.weight_bytes() / pool.num_pods)
        shm = SHM_BYTES_PER_GPU * pool.gpus_per_pod if pool.num_gpus > 1 else 0
        # KV is in GPU memory; the file's pages pass through the host's once.
        memory = WORKER_BASE_BYTES + pool.gpus_per_pod * HOST_BYTES_PER_GPU + weight_bytes + shm
        cpu = 2.0 + 4.0 * pool.gpus_per_pod
    elif engine.engine == "timed":
        weight_bytes, shm, cpu = 0.0, 0, 1.0
        memory = TIMED_BASE_BYTES + kv_bytes
    else:
        num_others = pool.ranks_per_pod - 1
        shm, cpu = 0, 2.0 + num_others  # each rank computes, the first one serves, too
        memory = WORKER_BASE_BYTES + num_others * RANK_BYTES + WEIGHT_COPIES * weight_bytes
        memory += kv_bytes
    gather_s = GATHER_S if pool.is_multi_node else 0.0
    return PodSize(
        memory_bytes=round(memory),
        cpu=cpu,
        shm_bytes=shm,
        scratch_bytes=SCRATCH_BYTES,
        start_s=START_BASE_S + weight_bytes / LOAD_BYTES_PER_S + gather_s,
    )


def model_spec(deployment: Deployment) -> ModelSpec:
    """The model's sizes: of the plan's model, since containers may have it at another path.

    Raises `LocalFault` for one that is neither packaged, nor here, nor in the catalogue.
    """
    plan = deployment.plan
    name = plan.model if plan and plan.model else deployment.router.model
    try:
        return load_model(resolve_model_dir(name) if name in PACKAGED else name)
    except LocalFault as fault:
        raise LocalFault(
            f"{fault.message}; the sizes of pods come from it: render where its folder is"
        ) from None


def _cores(cpu: float) -> str | int:
    return int(cpu) if cpu == int(cpu) else f"{round(cpu * 1000)}m"
