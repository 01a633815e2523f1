"""Ranks of one worker on devices: threads in place of processes, on the simulated device."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pdserve.domain.errors import LocalFault
from pdserve.domain.ids import BlockId
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch, StepLimits
from pdserve.engine.sharding.thread_group import ThreadGroup, of_rank, results_of, thread_groups
from pdserve.engine.torch_engine import TorchEngine
from tests.support.sim_device import SIM, SimRuntime
from tests.support.tiny_models import save_tiny_model

TOTALS = (256 << 20, 64 << 20)  # of the device of each rank
LIMITS = StepLimits(max_num_requests=2, max_num_tokens=16)


class UnrecordedGroup(ThreadGroup):
    """Threads meet in code, which a graph does not hold; steps are launched one by one then."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        _check_not_recorded()
        return ThreadGroup.all_reduce(self, tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        _check_not_recorded()
        return ThreadGroup.all_gather(self, tensor)

    def send(self, tensor: Tensor) -> None:
        _check_not_recorded()
        ThreadGroup.send(self, tensor)

    def receive(self, tensor: Tensor) -> Tensor:
        _check_not_recorded()
        return ThreadGroup.receive(self, tensor)


def _check_not_recorded() -> None:
    if SIM.recorded is not None:
        raise RuntimeError("threads cannot be recorded")


class RankRuntime(SimRuntime):
    """All ranks share the simulation's one memory: here what they take of it does not count."""

    def free_bytes(self) -> int:
        return self.total_bytes()


class DeviceRanks:
    """One engine for each rank, of a device with so many bytes each."""

    def __init__(self, model: Path, tp: int, pp: int, **options: Any) -> None:
        self._groups = [
            UnrecordedGroup(each.place, each.deadline_s, each._worker)
            for each in thread_groups(tp, pp)
        ]
        self._threads = ThreadPoolExecutor(tp * pp)
        options = {"block_size": 8, "num_blocks": None, "limits": LIMITS, **options}

        def load(rank: int) -> TorchEngine:
            runtime = RankRuntime(total_bytes=TOTALS[rank])
            return TorchEngine.load(model, device=runtime, group=self._groups[rank], **options)

        try:
            self.engines: list[TorchEngine] = self._all(load)
        except BaseException:
            self._threads.shutdown()
            raise

    def draws(self, batch: StepBatch) -> list[Any]:
        results = self._all(lambda rank: self.engines[rank].compute(batch).sampled)
        [drawn] = [each for each in results if any(each)]
        return list(drawn)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self._threads.shutdown()

    def _all(self, call: Any) -> list[Any]:
        return results_of(
            [
                self._threads.submit(of_rank, group, lambda rank=rank: call(rank))
                for rank, group in enumerate(self._groups)
            ]
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("model")
    save_tiny_model("llama", model_dir)
    return model_dir


def batch_of(block: int) -> StepBatch:
    sample = SampleStep(params=SamplingParams(), token_index=0)
    table = (BlockId(block), BlockId(0))
    return StepBatch(
        (SequenceStep(token_ids=tuple(range(5, 16)), start=0, block_table=table, sample=sample),)
    )


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_ranks_agree_on_the_blocks_that_the_fullest_device_has_room_for(
    model: Path, tp: int, pp: int
) -> None:
    alone = TorchEngine.load(model, block_size=8, num_blocks=4)
    expected = alone.compute(batch_of(3)).sampled
    alone.close()
    with SimRuntime():
        ranks = DeviceRanks(model, tp, pp, memory_fraction=0.5)
        counts = {engine.kv.num_blocks for engine in ranks.engines}
        assert len(counts) == 1
        num_blocks = counts.pop()
        both = zip(ranks.engines, TOTALS, strict=True)
        rooms = [total // 2 // engine.kv.layout.block_bytes for engine, total in both]
        assert num_blocks == min(rooms) == rooms[1]
        assert ranks.draws(batch_of(num_blocks - 1)) == list(expected)
        assert not any(engine.looks_ahead for engine in ranks.engines)
        ranks.close()


def test_blocks_that_one_rank_has_no_room_for_are_refused_by_all(model: Path) -> None:
    with SimRuntime(), pytest.raises(LocalFault, match="do not fit on sim:0") as caught:
        DeviceRanks(model, 2, 1, num_blocks=(70 << 20) // (3 * 2 * 8 * 16 * 4))
    assert "Raise memory_fraction" in caught.value.message
