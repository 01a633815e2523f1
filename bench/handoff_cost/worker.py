"""What both workers of the benchmark are built from: engines that sleep, and tiny KV."""

import time
from dataclasses import asdict

from pdserve.config.processes import CoefficientSettings, EngineSettings, WorkerSettings
from pdserve.config.timers import Timers
from pdserve.domain.ids import Epoch
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.layout import KvLayout, LayerKv
from pdserve.domain.messages import Role
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.timed_engine import TimedEngine
from pdserve.worker.parts import WorkerParts

BLOCK_SIZE, PROMPT_TOKENS = 16, 64
NUM_BLOCKS = 4096
TIMERS = Timers()
LAYOUT = KvLayout(
    layers=(LayerKv(1, 2, 2),) * 2, block_size=BLOCK_SIZE, dtype="float32", item_bytes=4
)


def parts_of(role: Role, *, step_s: float, num_prompts: int) -> WorkerParts:
    """A worker whose steps take `step_s` and read `num_prompts` prompts each at most."""
    coefficients = StepCoefficients(
        fixed_s=step_s,
        prefill_token_s=0.0,
        prefill_attention_s=0.0,
        decode_token_s=0.0,
        decode_context_token_s=0.0,
    )
    settings = WorkerSettings(
        worker_id=role.value,
        role=role,
        engine=EngineSettings(
            engine="timed",
            block_size=BLOCK_SIZE,
            prefix_reuse=False,
            coefficients=CoefficientSettings(**asdict(coefficients)),
        ),
        max_step_tokens=num_prompts * PROMPT_TOKENS,
        transports=("shm", "tcp"),
        timers=TIMERS,
    )
    engine = TimedEngine(
        ModelFiles.open("demo"),
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        coefficients=coefficients,
        layout=LAYOUT,
    )
    return WorkerParts(
        settings=settings,
        engine=engine,
        coefficients=coefficients,
        epoch=Epoch(1),
        clock=time.monotonic,
    )
