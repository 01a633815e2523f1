from dataclasses import replace

import pytest

from pdserve.config.processes import CoefficientSettings, EngineSettings, WorkerSettings
from pdserve.domain.ids import Epoch
from pdserve.domain.messages import Role
from pdserve.engine.opening import open_engine
from pdserve.worker.parts import WorkerParts


@pytest.mark.parametrize(("kind", "num_stages"), [("timed", 2), ("torch", 1)])
def test_a_worker_says_how_many_steps_it_has_under_way(kind: str, num_stages: int) -> None:
    """Timed engines stand for pipelines that are kept full; ranks compute one step at a time."""
    times = CoefficientSettings(fixed_s=0.1, prefill_token_s=0, decode_token_s=0)
    settings = EngineSettings(engine="timed", pp=2, num_blocks=8, coefficients=times)
    engine = open_engine(settings)
    engine.spec = replace(engine.spec, kind=kind)
    parts = WorkerParts(
        settings=WorkerSettings(role=Role.DECODE, worker_id="decode-0", engine=settings),
        engine=engine,
        coefficients=times.to_coefficients(),
        epoch=Epoch(1),
        clock=lambda: 0.0,
    )
    assert parts.hello("127.0.0.1:1").num_stages == num_stages
    engine.close()
