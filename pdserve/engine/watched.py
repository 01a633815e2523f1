"""How long the engine has been in its step: what tells a stuck worker from a busy one."""

from collections.abc import Callable

from pdserve.engine.contract import Engine, StepBatch, StepResult


class WatchedEngine:
    """`inner`, and the age of the step that it is in. Satisfies `Engine`."""

    def __init__(self, inner: Engine, clock: Callable[[], float]) -> None:
        self.spec = inner.spec
        self.kv = inner.kv
        self._inner = inner
        self._clock = clock
        self._since_s = 0.0
        self._num_under_way = 0

    @property
    def looks_ahead(self) -> bool:
        return self._inner.looks_ahead

    @property
    def step_age_s(self) -> float:
        """0 between steps. A step that waits behind another one is as old as that one's end."""
        return self._clock() - self._since_s if self._num_under_way else 0.0

    async def step(self, batch: StepBatch) -> StepResult:
        if not self._num_under_way:
            self._since_s = self._clock()
        self._num_under_way += 1
        try:
            return await self._inner.step(batch)
        finally:
            self._num_under_way -= 1
            self._since_s = self._clock()

    def close(self) -> None:
        self._inner.close()
