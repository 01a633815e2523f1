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
        self._since_s: float | None = None

    @property
    def step_age_s(self) -> float:
        """0 between steps."""
        return 0.0 if self._since_s is None else self._clock() - self._since_s

    async def step(self, batch: StepBatch) -> StepResult:
        self._since_s = self._clock()
        try:
            return await self._inner.step(batch)
        finally:
            self._since_s = None

    def close(self) -> None:
        self._inner.close()
