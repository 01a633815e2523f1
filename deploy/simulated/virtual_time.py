"""An asyncio event loop whose time passes only when nothing else is left to do.

Real `asyncio.sleep`, `timeout`, `TaskGroup` and locks run on it unchanged: a test of many seconds
takes as long as its computation, and the same seed gives the same run.
"""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine, Mapping
from random import Random
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

START_S = 1000.0
MAX_TURNS_WITHOUT_TIME = 100_000
MAX_THREAD_S = 0.02
_NANOSECOND = 1e-9


class Deadlock(AssertionError):
    """Every task waits for another; names them all."""


class Livelock(AssertionError):
    """Tasks wake each other for ever, and no time passes."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """With `rng`, callbacks that are ready in one turn run in a random order."""

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng
        self._clock = _VirtualSelector(self._report)
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """After some virtual time, in this thread: another would end at a moment of its own."""
        future: asyncio.Future[T] = self.create_future()

        def run() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001  raised where it is awaited
                future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        self.call_later(self._rng.uniform(0, MAX_THREAD_S) if self._rng else 0.0, run)
        return future

    def block(self, elapsed_s: float) -> None:
        """Let time pass within a callback, as a slow computation does."""
        self._clock.now_s += elapsed_s

    def _run_once(self) -> None:
        ready = self._ready  # type: ignore[attr-defined]
        if self._rng is not None and len(ready) > 1:
            handles = list(ready)
            self._rng.shuffle(handles)
            ready.clear()
            ready.extend(handles)
        super()._run_once()  # type: ignore[misc]

    def _report(self) -> str:
        waiting = []
        for task in asyncio.all_tasks(self):
            frames = task.get_stack(limit=1)
            line = f"{frames[-1].f_code.co_qualname}:{frames[-1].f_lineno}" if frames else "?"
            waiting.append(f"{task.get_name()} {line}")
        return "; ".join(sorted(waiting))


class _VirtualSelector(selectors.BaseSelector):
    """Has no files to watch; waiting moves the clock, by whole nanoseconds and at least one."""

    def __init__(self, report: Callable[[], str]) -> None:
        self.now_s = START_S
        self._report = report
        self._num_turns = 0
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock(self._report())
        if timeout > 0:
            self.now_s = round(max(self.now_s + timeout, self.now_s + _NANOSECOND), 9)
            self._num_turns = 0
        self._num_turns += 1
        if self._num_turns > MAX_TURNS_WITHOUT_TIME:
            raise Livelock(self._report())
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = selectors.SelectorKey(fileobj, fileobj, events, data)  # the loop gives numbers
        self._keys[fileobj] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


def run_virtual(main: Coroutine[Any, Any, T], *, seed: int | None = None) -> T:
    """Run `main` to its end in virtual time; with `seed`, in a random but repeatable order."""
    rng = None if seed is None else Random(seed)
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(rng)) as runner:
        return runner.run(main)


def virtual(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Run an async test in virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return run_virtual(test(*args, **kwargs))

    return run
