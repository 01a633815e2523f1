"""Prefill and decode workers that compute, on the simulated device or the CPU: their handoffs."""

import dataclasses
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import pytest

from pdserve.config.timers import Timers
from pdserve.domain.ids import BlockId, Epoch
from pdserve.domain.layout import BlockOrder
from pdserve.domain.messages import Role
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import SampledToken
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch, StepLimits
from pdserve.engine.device.device_kv import DeviceKv
from pdserve.engine.torch_engine import TorchEngine
from pdserve.worker.parts import WorkerParts
from tests.support.sim_device import SIM, SimRuntime
from tests.support.worker_pair import BLOCK_SIZE, Call, Sizes, WorkerPair, demo_files

PROMPTS = [tuple(Random(seed).randrange(2, 500) for _ in range(5 + 11 * seed)) for seed in range(3)]
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.9, "top_p": 0.8, "seed": 4},
]


class ComputingPair(WorkerPair):
    """Workers that compute, their weights and KV on the device or the CPU."""

    def __init__(
        self, orders: Mapping[Role, BlockOrder | None], runtime: SimRuntime | None = None
    ) -> None:
        """`orders`: of each role's blocks on the device; None: they are the CPU's."""
        super().__init__(Sizes(max_step_tokens=16), timers=Timers())
        self._runtime = runtime
        self._orders = orders

    def parts(self, role: Role, name: str, epoch: Epoch) -> WorkerParts:
        parts = super().parts(role, name, epoch)
        num_blocks = parts.engine.kv.num_blocks
        parts.engine.close()
        limits = StepLimits(max_num_requests=4, max_num_tokens=16)
        order = self._orders[role]
        engine = TorchEngine.load(
            demo_files(),
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            device="cpu" if order is None or self._runtime is None else self._runtime,
            block_order=order or BlockOrder.TOKENS,
            limits=limits,
        )
        assert isinstance(engine.kv, DeviceKv) == (order is not None)
        assert engine.spec.layout.order is engine.kv.layout.order is (order or BlockOrder.TOKENS)
        return dataclasses.replace(parts, engine=engine)


def alone(engine: TorchEngine, prompt: tuple[int, ...], params: SamplingParams) -> tuple[int, ...]:
    """What one engine answers."""
    known, start = list(prompt), 0
    while len(known) < len(prompt) + params.max_tokens:
        step = SequenceStep(
            token_ids=tuple(known[start:]),
            start=start,
            block_table=tuple(BlockId(block) for block in range(32)),
            sample=SampleStep(params=params, token_index=len(known) - len(prompt)),
        )
        [drawn] = engine.compute(StepBatch((step,))).sampled
        assert isinstance(drawn, SampledToken)
        start = len(known)
        known.append(drawn.token_id)
    return tuple(known[len(prompt) :])


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (BlockOrder.TOKENS, BlockOrder.TOKENS),
        pytest.param(BlockOrder.HEADS, BlockOrder.HEADS, marks=pytest.mark.slow),
        pytest.param(BlockOrder.TOKENS, BlockOrder.HEADS, marks=pytest.mark.slow),
        (BlockOrder.HEADS, None),
    ],
)
async def test_kv_of_a_device_goes_through_the_host_and_gives_the_tokens_of_the_cpu(
    prefill: BlockOrder, decode: BlockOrder | None
) -> None:
    options = [{**each, "max_tokens": 6, "ignore_eos": True} for each in SAMPLING]
    with SimRuntime() as runtime:
        async with ComputingPair({Role.PREFILL: prefill, Role.DECODE: decode}, runtime) as pair:
            SIM.num_waits = 0
            with runtime.lateness():
                calls = [
                    pair.submit(prompt, **each)
                    for prompt, each in zip(PROMPTS, options, strict=True)
                ]
                for call in calls:
                    await call.completed()
            assert SIM.num_waits == 0
            assert pair.transport.num_reads > 0
            assert pair.transport.num_reads_of_parts == 0  # the host does not see layers end
    assert_as_alone(calls)


async def test_blocks_that_are_read_while_their_layers_are_computed_give_the_same_tokens() -> None:
    options = [{**each, "max_tokens": 6, "ignore_eos": True} for each in SAMPLING]
    async with ComputingPair({Role.PREFILL: None, Role.DECODE: None}) as pair:
        calls = [pair.submit(prompt, **each) for prompt, each in zip(PROMPTS, options, strict=True)]
        for call in calls:
            await call.completed()
        assert pair.transport.num_reads_of_parts > 0
        assert pair.handoffs.num_corrupt_blocks == 0
    assert_as_alone(calls)


def assert_as_alone(calls: Sequence[Call]) -> None:
    """The tokens are those of one engine."""
    on_cpu = TorchEngine.load(demo_files(), block_size=BLOCK_SIZE, num_blocks=64)
    for call in calls:
        submit = call.submit
        assert call.token_ids == alone(on_cpu, submit.prompt_token_ids, submit.sampling)
    on_cpu.close()
