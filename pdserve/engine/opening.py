"""From settings to a loaded engine; the only place that knows every kind."""

from typing import TYPE_CHECKING

from pdserve.config.processes import EngineSettings, WorkerSettings
from pdserve.domain.errors import LocalFault
from pdserve.engine.contract import Engine, StepLimits
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.timed_engine import TimedEngine

if TYPE_CHECKING:  # it names tensors, and timed engines do without torch
    from pdserve.engine.rank_group import RankGroup

_LIMITS = StepLimits()


def open_engine(settings: EngineSettings, limits: StepLimits = _LIMITS) -> Engine:
    """Load the model; raises `LocalFault` with what to do if it cannot be served.

    On a device there is room for steps up to `limits`.
    """
    files = ModelFiles.open(settings.model, settings.override_config)
    if settings.engine == "timed":
        assert settings.coefficients is not None
        return TimedEngine(
            files,
            block_size=settings.block_size,
            num_blocks=settings.host_num_blocks,
            coefficients=settings.coefficients.to_coefficients(),
            dtype=settings.dtype,
        )
    if settings.num_ranks > 1:
        raise LocalFault(
            f"tp {settings.tp}, pp {settings.pp}: {settings.num_ranks} ranks are processes, which "
            "only the process of a worker starts"
        )
    try:
        from pdserve.engine.device.compiled_body import INDUCTOR
        from pdserve.engine.torch_engine import TorchEngine
    except ModuleNotFoundError as error:
        raise LocalFault(
            f"engine: torch needs {error.name}; install the extra: pip install 'pdserve[worker]'"
        ) from None
    return TorchEngine.load(
        files,
        block_size=settings.block_size,
        num_blocks=settings.planned_num_blocks,
        dtype=settings.dtype,
        device=settings.device,
        block_order=settings.block_order,
        memory_fraction=settings.memory_fraction,
        limits=limits,
        compiler=INDUCTOR if settings.compile else None,
    )


def limits_of(settings: WorkerSettings) -> StepLimits:
    """The largest steps that the worker makes."""
    return StepLimits(
        max_num_requests=settings.max_num_requests, max_num_tokens=settings.max_step_tokens
    )


def load_rank_part(
    files: ModelFiles, settings: EngineSettings, limits: StepLimits, group: "RankGroup"
) -> Engine:
    """One rank's part of the model, beside which all others compute theirs."""
    from pdserve.engine.torch_engine import TorchEngine

    return TorchEngine.load(
        files,
        block_size=settings.block_size,
        num_blocks=settings.planned_num_blocks,
        dtype=settings.dtype,
        device=settings.device,
        block_order=settings.block_order,
        memory_fraction=settings.memory_fraction,
        limits=limits,
        group=group,
    )
