"""From settings to a loaded engine; the only place that knows every kind."""

from pdserve.config.processes import EngineSettings
from pdserve.domain.errors import LocalFault
from pdserve.engine.contract import Engine
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.timed_engine import TimedEngine


def open_engine(settings: EngineSettings) -> Engine:
    """Load the model; raises `LocalFault` with what to do if it cannot be served."""
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
    if settings.tp * settings.pp > 1:
        raise LocalFault(
            f"engine: torch serves on one rank; got tp {settings.tp}, pp {settings.pp}: plan "
            "with search: {tp: [1], pp: [1]}, or use engine: timed"
        )
    try:
        from pdserve.engine.torch_engine import TorchEngine
    except ModuleNotFoundError as error:
        raise LocalFault(
            f"engine: torch needs {error.name}; install the extra: pip install 'pdserve[worker]'"
        ) from None
    return TorchEngine.load(
        files,
        block_size=settings.block_size,
        num_blocks=settings.host_num_blocks,
        dtype=settings.dtype,
        device=settings.device,
    )
