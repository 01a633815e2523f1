"""The GPUs of this machine, and which of them each worker gets."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.deployment import PlacedWorker
from deploy.processes import VISIBLE_GPUS
from pdserve.domain.errors import LocalFault

DEV = Path("/dev")
ROUNDING = 1e-6


def num_gpus() -> int:
    """GPUs of this machine that the kernel shows, NVIDIA's and AMD's."""
    nvidia = [each for each in DEV.glob("nvidia*") if each.name[len("nvidia") :].isdigit()]
    return len(nvidia) + len(list(DEV.glob("dri/renderD*")) if (DEV / "kfd").exists() else [])


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """GPUs that this process may use, as CUDA_VISIBLE_GPUS_DEVICES names them."""
    told = environment.get(VISIBLE_GPUS)
    if told is None:
        return tuple(map(str, range(num_gpus())))
    return tuple(name for each in told.split(",") if (name := each.strip()))


def assign_gpus(
    workers: Sequence[PlacedWorker], gpus: Sequence[str], *, share: bool
) -> Mapping[str, tuple[str, ...]]:
    """The GPUs of each worker that computes on some, one for each of its ranks.

    No GPU is given twice unless the workers may `share` them; then all GPUs are used as evenly as
    can be. `cuda:N` chooses number N itself. Raises `LocalFault` if there are too few.
    """
    on_gpus = [worker for worker in workers if worker.computes_on_gpus]
    chosen = {worker.name: _chosen(worker, gpus) for worker in on_gpus}
    load = Counter(gpu for own in chosen.values() for gpu in own)
    _check_number(on_gpus, gpus, load, share=share)
    for worker in on_gpus:
        if chosen[worker.name]:
            continue
        # sorted() is stable: GPUs that are used alike are taken in their order.
        least = sorted(gpus, key=lambda gpu: load[gpu])[: worker.num_gpus]
        chosen[worker.name] = tuple(least)
        load.update(least)
    _check_memory(on_gpus, chosen, load)
    return chosen


def gpu_environment(worker: PlacedWorker, gpus: Sequence[str]) -> Mapping[str, str]:
    """What the process of a worker is told of its GPUs; `cuda:N` counts from those seen here."""
    is_told = gpus and worker.settings.engine.device == "cuda"
    return {VISIBLE_GPUS: ",".join(gpus)} if is_told else {}


def _chosen(worker: PlacedWorker, gpus: Sequence[str]) -> tuple[str, ...]:
    """Empty: any will do."""
    _, colon, number = worker.settings.engine.device.partition(":")
    if not colon:
        return ()
    if int(number) >= len(gpus):
        raise LocalFault(
            f"{worker.name}: device {worker.settings.engine.device}, and this machine has "
            f"{len(gpus)} GPUs, counted from 0"
        )
    return (gpus[int(number)],)


def _check_number(
    workers: Sequence[PlacedWorker], gpus: Sequence[str], load: Counter[str], *, share: bool
) -> None:
    types = sorted({worker.gpu for worker in workers} - {""})
    wanted = f" ({', '.join(types)})" if types else ""
    elsewhere = (
        "start it where they are (--backend ray, pdserve render kubernetes), use --scale if fewer "
        "will do, or try it here with --device cpu (real tokens) or --engine timed (the plan's "
        "step times)"
    )
    needed = sum(worker.num_gpus for worker in workers)
    if not share and (needed > len(gpus) or max(load.values(), default=0) > 1):
        several = (
            "; workers of one rank can have GPUs together with share_gpus: true and a "
            "memory_fraction for each"
            if gpus
            else ""
        )
        twice = [gpu for gpu, count in load.items() if count > 1]
        if needed <= len(gpus):
            raise LocalFault(
                f"device: GPU {twice[0]} is named for {load[twice[0]]} workers: give each its "
                f"own (device: cuda){several}"
            )
        raise LocalFault(
            f"the workers need {needed} GPUs{wanted}; this machine has {len(gpus)}: "
            f"{elsewhere}{several}"
        )
    for worker in workers:
        if worker.num_gpus > len(gpus):
            raise LocalFault(
                f"{worker.name} needs {worker.num_gpus} GPUs{wanted}, one a rank; this machine has "
                f"{len(gpus)}: {elsewhere}"
            )


def _check_memory(
    workers: Sequence[PlacedWorker],
    chosen: Mapping[str, tuple[str, ...]],
    load: Counter[str],
) -> None:
    for gpu, num_workers in load.items():
        mates = [worker for worker in workers if gpu in chosen[worker.name]]
        taken = sum(worker.settings.engine.memory_fraction for worker in mates)
        if num_workers > 1 and taken > 1 + ROUNDING:
            raise LocalFault(
                f"memory_fraction: {num_workers} workers share GPU {gpu} and would take "
                f"{taken:g} of its memory: give at most {1 / num_workers:.2f}"
            )
