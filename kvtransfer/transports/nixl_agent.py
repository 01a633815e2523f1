"""One agent of NVIDIA's transfer library, nixl, and the thread that alone calls it.

    event loop                             thread
    call(work)   ───────── queue ────────▶ work(agent)
    post(flight) ────────────────────────▶ the read is posted, and its state asked for until it ends
    flight.tell  ◀─ call_soon_threadsafe ─ it is over, it has failed, or its peer is silent

The library is not safe to call from several threads, and without a thread of its own (which would
keep a core busy) it moves bytes within calls only. So this thread also calls it now and then when
others read from here.

Nothing stops a read that was posted: released, forgotten or deregistered, all of its bytes still
arrive. A flight that nobody waits for any more is therefore asked about until it is over.
"""

import asyncio
import contextlib
import importlib
import importlib.util
import logging.config
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any, Protocol, TypeVar

import structlog

from pdserve.domain.errors import LocalFault
from pdserve.engine.threads import run_to_end

log = structlog.get_logger(__name__)

T = TypeVar("T")
Agent = Any
"""`nixl_cu13._api.nixl_agent`, of an extra and without types."""

Errors = tuple[type[Exception], ...]

PACKAGE = "nixl_cu13"
SERVING_POLL_S = 1e-3
"""How often a serving agent looks for what peers want of it. If they reach its memory by themselves
(RDMA, or the same host), that is only when they connect."""
_MIN_POLL_S, _MAX_POLL_S = 20e-6, 5e-3
_QUIET = {"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "fatal"}
"""Else the library writes to standard output, also of what is no fault, as when a peer has died."""


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


class Outcome(Enum):
    """What has become of a read. All but `SILENT` are final."""

    LANDED = "landed"
    FAILED = "failed"  # nothing arrives any more
    BROKEN = "broken"  # nobody knows whether bytes still arrive
    SILENT = "silent"  # under way for longer than a peer may take


class Flight(Protocol):
    """A read, as the thread sees it."""

    is_given_up: bool  # set by the event loop: need not be posted any more

    def prepare(self, agent: Agent) -> Any:
        """The handle of the transfer, which the thread posts; called on the thread."""
        ...

    def tell(self, outcome: Outcome, why: str) -> None:
        """Called on the event loop: at most once `SILENT`, and then one of the others."""
        ...


@dataclass(slots=True, kw_only=True)
class _Posted:
    flight: Flight
    handle: Any
    since_s: float
    is_silent: bool = False


@contextlib.contextmanager
def _logging_kept() -> Iterator[None]:
    """When imported, the library configures the logging of the whole process anew.

    That would close the handlers of everybody else.
    """
    configure, raises = logging.config.dictConfig, logging.raiseExceptions
    logging.config.dictConfig = lambda config: None
    try:
        yield
    finally:
        logging.config.dictConfig, logging.raiseExceptions = configure, raises


class _Library:
    """The package, loaded when the first agent is made."""

    def __init__(self) -> None:
        for name, level in _QUIET.items():
            os.environ.setdefault(name, level)
        try:
            with _logging_kept():
                api: ModuleType = importlib.import_module(f"{PACKAGE}._api")
        except ImportError as error:
            raise LocalFault(f"transport nixl: its library cannot be loaded: {error}") from None
        bindings = importlib.import_module(f"{PACKAGE}._bindings")
        self._api = api
        self.disconnected: type[Exception] = bindings.nixlRemoteDisconnectError
        names = [name for name in dir(bindings) if name.endswith("Error")]
        self.errors: Errors = tuple(getattr(bindings, name) for name in names)

    def agent(self, name: str) -> Agent:
        config = self._api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        try:
            agent = self._api.nixl_agent(name, config)
        except self.errors as error:
            raise LocalFault(f"transport nixl: no agent can be made: {error}") from None
        if "UCX" not in agent.backends:
            raise LocalFault("transport nixl: its library has no UCX")
        return agent


class AgentThread(Executor):
    """The thread starts with the object and runs until `close`.

    With `serves` it keeps the library going for those who read from here. A flight is told to be
    silent `silence_s` after it was posted.
    """

    def __init__(self, *, silence_s: float, serves: bool = False) -> None:
        self.name = f"pdserve-{os.getpid()}-{secrets.token_hex(8)}"  # of this life alone
        self._silence_s = silence_s
        self._serves = serves
        self._loop = asyncio.get_running_loop()
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._posted: list[_Posted] = []
        self._library: _Library | None = None
        self._agent: Agent = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="kv-nixl", daemon=True)
        self._thread.start()

    # On the event loop --------------------------------------------------------------------------

    async def call(self, work: Callable[[Agent], T]) -> T:
        """Run `work` on the thread, to its end even if cancelled.

        Raises what it raises, and `LocalFault` if there is no agent.
        """
        return await run_to_end(lambda _: work(self._made_agent()), self)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - whoever waits for the future has it
                done.set_exception(error)

        if self._is_closed:
            raise LocalFault("transport nixl: closed")
        self._work.put(run)
        return done

    def soon(self, work: Callable[[Agent], object], then: Callable[[], object]) -> None:
        """Run `work` on the thread, then `then` on the event loop, also if `work` fails."""

        def run() -> None:
            try:
                work(self._made_agent())
            finally:
                self._loop.call_soon_threadsafe(then)

        self._work.put(run)

    def post(self, flight: Flight) -> None:
        """Have the read done; `flight` is told what becomes of it unless this is closed before."""
        self._work.put(lambda: self._post(flight))

    @property
    def errors(self) -> Errors:
        """What the library raises; none before an agent was made."""
        return self._library.errors if self._library else ()

    async def close(self, clean_up: Callable[[Agent], None]) -> None:
        """End the thread and its agent; safe to call twice.

        `clean_up` runs on it first, and drops all that was made with the agent. Nothing is written
        by a read any more afterwards: nobody moves its bytes.
        """
        if self._is_closed:
            return
        self._is_closed = True

        def end() -> None:
            for posted in self._posted:
                self._release(posted.handle)
            self._posted.clear()
            try:
                if self._agent is not None:
                    clean_up(self._agent)
            finally:
                self._agent = None

        self._work.put(end)
        self._work.put(None)
        await run_to_end(lambda _: self._thread.join())

    # On the thread ------------------------------------------------------------------------------

    def _made_agent(self) -> Agent:
        if self._agent is None:
            self._library = _Library()
            self._agent = self._library.agent(self.name)
        return self._agent

    def _run(self) -> None:
        while True:
            try:
                work = self._work.get(timeout=self._pause_s())
            except queue.Empty:
                work = self._progress
            if work is None:
                return
            try:
                work()
            except Exception:
                log.exception("nixl.thread_failed")
            work = None  # it may hold on to the agent
            if self._posted:
                self._look()

    def _pause_s(self) -> float | None:
        """Until the library is called again: the longer a read has taken, the longer."""
        if self._posted:
            age_s = time.monotonic() - max(posted.since_s for posted in self._posted)
            return min(max(age_s / 8, _MIN_POLL_S), _MAX_POLL_S)
        return SERVING_POLL_S if self._serves else None

    def _progress(self) -> None:
        if self._serves and self._agent is not None:
            self._agent.get_new_notifs()

    def _post(self, flight: Flight) -> None:
        if flight.is_given_up:
            return self._tell(flight, Outcome.FAILED, "given up before it was posted")
        handle, is_posted = None, False
        try:
            agent = self._made_agent()
            handle = flight.prepare(agent)
            is_posted = True
            state = agent.transfer(handle)
        except LocalFault as error:
            return self._tell(flight, Outcome.FAILED, error.message)
        except self.errors as error:
            outcome = self._outcome(error) if is_posted else Outcome.FAILED
            self._release(handle)
            return self._tell(flight, outcome, _name(error))
        posted = _Posted(flight=flight, handle=handle, since_s=time.monotonic())
        if not self._settle(posted, state):
            self._posted.append(posted)
        return None

    def _look(self) -> None:
        """Ask for the state of every read, which is what moves them on."""
        now_s = time.monotonic()
        for posted in list(self._posted):
            try:
                is_over = self._settle(posted, self._agent.check_xfer_state(posted.handle))
            except self.errors as error:
                self._release(posted.handle)
                self._tell(posted.flight, self._outcome(error), _name(error))
                is_over = True
            if is_over:
                self._posted.remove(posted)
            elif not posted.is_silent and now_s - posted.since_s > self._silence_s:
                posted.is_silent = True
                self._tell(posted.flight, Outcome.SILENT, f"silent for {self._silence_s:g} s")

    def _settle(self, posted: _Posted, state: str) -> bool:
        """Whether it is over, which its flight has been told then."""
        if state == "PROC":
            return False
        self._release(posted.handle)
        outcome = Outcome.LANDED if state == "DONE" else Outcome.BROKEN
        self._tell(posted.flight, outcome, "its state is an error")
        return True

    def _outcome(self, error: Exception) -> Outcome:
        """Of a read that was posted. A peer that is gone sends nothing any more."""
        is_gone = self._library is not None and isinstance(error, self._library.disconnected)
        return Outcome.FAILED if is_gone else Outcome.BROKEN

    def _release(self, handle: Any) -> None:
        """What cannot be released is left to the agent."""
        if handle is None:
            return
        try:
            handle.release()
        except self.errors as error:
            log.warning("nixl.release_failed", error=_name(error))

    def _tell(self, flight: Flight, outcome: Outcome, why: str) -> None:
        self._loop.call_soon_threadsafe(flight.tell, outcome, why)


def _name(error: Exception) -> str:
    return str(error) or type(error).__name__
