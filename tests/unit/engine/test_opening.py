"""Settings to engines."""

import pytest

from pdserve.config.processes import CoefficientSettings, EngineSettings
from pdserve.domain.errors import LocalFault
from pdserve.engine.opening import open_engine
from pdserve.engine.timed_engine import TimedEngine


def test_timed_engine_has_the_size_and_times_of_its_settings() -> None:
    given = CoefficientSettings(fixed_s=1.0, prefill_token_s=2.0, decode_token_s=3.0)
    engine = open_engine(
        EngineSettings(engine="timed", coefficients=given, num_blocks=5, block_size=8)
    )
    assert isinstance(engine, TimedEngine)
    assert engine.kv.num_blocks == 5
    assert engine.spec.layout.block_size == 8
    assert engine.coefficients == given.to_coefficients()
    engine.close()


def test_model_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(LocalFault, match="no-such-model"):
        open_engine(EngineSettings(model="/no-such-model"))
