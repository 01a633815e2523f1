"""A thread for calls that block and that nothing can call off."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class GuardThread:
    """Runs what it is given, one after the other, until `end`.

    It is a daemon: a call that never returns costs this thread and keeps no process from ending.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """The work goes on if the future is cancelled; nobody has to await it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())

        def report(result: T | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, failure = None, None
            try:
                result = work()
            except Exception as error:  # noqa: BLE001  raised where the future is awaited
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(report, result, failure)

        self._jobs.put(run)
        return future

    async def end(self, last: Callable[[], None], patience_s: float) -> bool:
        """Have `last` run after all else, and the thread end; False if it has not by then.

        Also if cancelled, it waits that long.
        """
        if not self._thread.is_alive():
            return True
        ending = self.submit(last)
        self._jobs.put(None)
        waiting = asyncio.ensure_future(asyncio.wait([ending], timeout=patience_s))
        is_cancelled = False
        while not waiting.done():
            try:
                await asyncio.shield(waiting)
            except asyncio.CancelledError:
                is_cancelled = True
        if ending.done():
            self._thread.join(1.0)  # it has nothing left to do
        if is_cancelled:
            raise asyncio.CancelledError
        return ending.done()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # else it keeps what it holds until the next one comes
