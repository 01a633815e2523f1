"""`pdserve smoke`: a minute's proof, from outside, that a cluster serves as it should."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.table import Table

from pdserve.cli.plain_json import json_text
from pdserve.cli.status_view import plain_console
from pdserve.client.admin import AdminClient
from pdserve.client.inference import InferenceClient
from pdserve.client.load import only_model
from pdserve.client.values import Answer, Model, Sampling
from pdserve.client.workload import make_prompt
from pdserve.domain.errors import BadRequest, PdserveError
from pdserve.domain.messages import Role

NUM_TOKENS = 16
NUM_SIDE_BY_SIDE = 8
MAX_PROMPT_TOKENS = 512
ENGINE_SEED = 20
IDLE_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One check: what was seen, or what was wrong."""

    check: str
    is_ok: bool
    seen: str
    elapsed_s: float


class CheckFailed(Exception):
    """The cluster answered, and not as it should."""


async def run_smoke(
    address: str, internal_address: str | None, *, model: str, timeout_s: float, as_json: bool
) -> int:
    """Run all checks, print them, return the exit code; raises `PdserveError` if nobody answers."""
    async with InferenceClient(address) as client:
        served = await only_model(client, model)
        smoke = Smoke(client, served, internal_address, timeout_s)
        results = [result async for result in smoke.run()]
    is_ok = all(result.is_ok for result in results)
    if as_json:
        checks = [asdict(result) for result in results]
        print(json_text({"ok": is_ok, "model": served.name, "checks": checks}))
        return int(not is_ok)
    console = plain_console()
    console.print(_table(results), markup=False)
    num_failed = sum(not result.is_ok for result in results)
    console.print(
        f"{address} serves {served.name} as it should"
        if is_ok
        else f"{num_failed} of {len(results)} checks failed; `pdserve status` shows the workers"
    )
    return int(not is_ok)


class Smoke:
    """The checks, against one router. With its internal address also the workers' books."""

    def __init__(
        self,
        client: InferenceClient,
        model: Model,
        internal_address: str | None,
        timeout_s: float,
    ) -> None:
        self._client = client
        self._model = model
        self._internal_address = internal_address
        self._timeout_s = timeout_s
        # No prefix cache has prompts of an earlier run.
        self._seed = secrets.randbits(40)

    async def run(self) -> AsyncIterator[Result]:
        """Each check once the one before has ended."""
        checks: list[tuple[str, Callable[[], Awaitable[str]]]] = [
            ("one prompt", self._one_prompt),
            ("a long prompt", self._long_prompt),
            ("the same again", self._same_again),
            (f"{NUM_SIDE_BY_SIDE} side by side", self._side_by_side),
            ("a request that cannot be", self._impossible),
            ("a client that goes away", self._goes_away),
        ]
        if self._internal_address is not None:
            checks.append(("workers' books", self._books))
        for name, check in checks:
            started = time.monotonic()
            try:
                async with asyncio.timeout(self._timeout_s):
                    seen, is_ok = await check(), True
            except CheckFailed as error:
                seen, is_ok = str(error), False
            except PdserveError as error:
                seen, is_ok = f"{error.reason}: {error.message}", False
            except TimeoutError:
                seen, is_ok = f"no end within {self._timeout_s:g} s (--timeout)", False
            elapsed_s = round(time.monotonic() - started, 4)
            yield Result(check=name, is_ok=is_ok, seen=seen, elapsed_s=elapsed_s)

    async def _one_prompt(self) -> str:
        stream = self._client.generate(
            self._prompt(8), _sampling(), model=self._model.name, timeout_s=self._timeout_s
        )
        started, first_s, num_tokens = time.monotonic(), 0.0, 0
        async with contextlib.aclosing(stream):
            async for chunk in stream:
                if chunk.tokens and not num_tokens:
                    first_s = time.monotonic() - started
                num_tokens += len(chunk.tokens)
        _expect(num_tokens == NUM_TOKENS, f"{num_tokens} tokens came, {NUM_TOKENS} were asked for")
        return f"{num_tokens} tokens, the first after {first_s * 1e3:.1f} ms"

    async def _long_prompt(self) -> str:
        answer = await self._ask(self._prompt(self._long_tokens))
        reader = answer.finished.timeline.prefill_worker
        who = f"read by {reader}, its KV handed over" if reader else "read by the decode worker"
        return f"{answer.finished.usage.prompt_tokens} tokens {who}"

    async def _same_again(self) -> str:
        prompt = self._prompt(self._long_tokens)
        sampling = _sampling(temperature=1.0, seed=ENGINE_SEED)
        first, second = [_ids(await self._ask(prompt, sampling)) for _ in range(2)]
        _expect(first == second, f"one seed gave two answers: {first} and {second}")
        return "one seed, one answer, with and without the prefix cache"

    async def _side_by_side(self) -> str:
        prompts = [self._prompt(16 + 8 * index) for index in range(NUM_SIDE_BY_SIDE)]
        together = await asyncio.gather(*map(self._ask, prompts))
        alone = [await self._ask(prompt) for prompt in prompts]
        wrong = sum(_ids(a) != _ids(b) for a, b in zip(together, alone, strict=True))
        _expect(not wrong, f"{wrong} answers differ from those to the same prompts alone")
        return "the answers are those to the same prompts alone"

    async def _impossible(self) -> str:
        most = self._model.max_context_tokens
        try:
            await self._ask(self._prompt(16), _sampling(max_tokens=most))
        except BadRequest as error:
            return f"refused: {error.reason}"
        raise CheckFailed(f"16 + {most} tokens were taken in a context of {most}")

    async def _goes_away(self) -> str:
        sampling = _sampling(max_tokens=max(self._model.max_context_tokens // 2, 2))
        stream = self._client.generate(self._prompt(16), sampling, model=self._model.name)
        async with contextlib.aclosing(stream):
            await anext(stream)
        return "cancelled after the first tokens"

    async def _books(self) -> str:
        assert self._internal_address is not None
        async with AdminClient(self._internal_address) as admin:
            state = await admin.settled_state(IDLE_WITHIN_S)
        busy = state.busy_workers
        _expect(not busy, f"KV blocks are held by {', '.join(busy)}, or others use the cluster")
        sick = [str(w.hello.worker_id) for w in state.workers if w.health != "alive"]
        _expect(not sick, f"not alive: {', '.join(sick)}")
        counts = {role: sum(w.hello.role is role for w in state.workers) for role in Role}
        return (
            f"{counts[Role.PREFILL]} prefill and {counts[Role.DECODE]} decode workers alive, "
            "every KV block is free again"
        )

    async def _ask(self, prompt: tuple[int, ...], sampling: Sampling | None = None) -> Answer:
        return await self._client.complete(
            prompt, sampling or _sampling(), model=self._model.name, timeout_s=self._timeout_s
        )

    @property
    def _long_tokens(self) -> int:
        return max(min(MAX_PROMPT_TOKENS, self._model.max_context_tokens // 2), 1)

    def _prompt(self, num_tokens: int) -> tuple[int, ...]:
        self._seed += 1
        return make_prompt(num_tokens, vocab_size=self._model.vocab_size, seed=self._seed)


def _sampling(
    *, max_tokens: int = NUM_TOKENS, temperature: float = 0.0, seed: int | None = None
) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=True)


def _ids(answer: Answer) -> list[int]:
    return [token.token_id for token in answer.tokens]


def _expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise CheckFailed(otherwise)


def _table(results: Sequence[Result]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("check", no_wrap=True)
    table.add_column("")
    table.add_column("seen")
    table.add_column("took", justify="right", no_wrap=True)
    for result in results:
        mark = "ok" if result.is_ok else "FAILED"
        table.add_row(result.check, mark, result.seen, f"{result.elapsed_s:.2f} s")
    return table
