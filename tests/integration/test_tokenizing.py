"""Texts are encoded in processes of their own, which end with whoever waits for them."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from random import Random

import pytest
import tokenizers
from tokenizers import models

from pdserve.domain.errors import BadRequest, Refused
from pdserve.engine.tokenizer import Tokenizer
from pdserve.models import DEMO_MODEL_DIR
from router.tokenizing import (
    LANES,
    MAX_LONG_CHARS,
    MAX_SHORT_CHARS,
    LaneSettings,
    TextEncoder,
)
from tests.support.loop_turns import longest_s, watch_turns

SOON_S = 60.0
TOKENIZER = Tokenizer.load(DEMO_MODEL_DIR)


def prose(num_chars: int, seed: int = 0) -> str:
    rng = Random(seed)
    words = ["".join(rng.choices("abcdefgh_ij", k=rng.randint(1, 9))) for _ in range(500)]
    return " ".join(rng.choices(words, k=num_chars // 2))[:num_chars]


LONG = prose(MAX_LONG_CHARS)
HUGE = prose(500_000)


@contextlib.asynccontextmanager
async def open_encoder(lanes: Sequence[LaneSettings] = LANES) -> AsyncIterator[TextEncoder]:
    before = set(children_of(os.getpid()))
    async with asyncio.timeout(SOON_S), TextEncoder(TOKENIZER, DEMO_MODEL_DIR, lanes) as encoder:
        yield encoder
    assert set(children_of(os.getpid())) <= before


def children_of(pid: int) -> list[int]:
    """Processes that `pid` has started and that have not ended."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(") ")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                children.append(int(path.parent.name))
    return children


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


def server_pid() -> int:
    """Of the children of this process that other tests have not left for later ones."""
    [pid] = [
        child
        for child in children_of(os.getpid())
        if b"multiprocessing" not in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    return pid


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def until_at_work(count: int = 1) -> list[int]:
    """Until so many processes encode; returns their ids."""
    server = server_pid()
    await until(lambda: len(children_of(server)) == count)
    return children_of(server)


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):",
        "x" * MAX_SHORT_CHARS,
        "x" * (MAX_SHORT_CHARS + 1),
        LONG,
        LONG + "x",
        "é漢🙂\u0301" * 50_000,
        "<|begin_of_text|>" * 10_000,
        " " * 300_000,
        "\x00\n\t" * 100_000,
    ],
    ids=lambda text: f"{len(text)} of {text[:3]!r}",
)
async def test_tokens_are_those_of_the_tokenizer_however_long_the_text(text: str) -> None:
    async with open_encoder() as encoder:
        for adds in (True, False):
            token_ids = await encoder.encode(text, add_special_tokens=adds)
            assert tuple(token_ids) == TOKENIZER.encode(text, add_special_tokens=adds)


async def test_text_does_not_wait_for_longer_ones_and_none_of_them_holds_up_the_event_loop() -> (
    None
):
    async with open_encoder() as encoder, asyncio.TaskGroup() as tasks:
        huge = [tasks.create_task(encoder.encode(HUGE)) for _ in range(4)]
        await until_at_work(2)
        async with watch_turns() as turns_s:
            for _ in range(5):
                for text in (LONG[:20_000], "def f(x):"):
                    assert tuple(await encoder.encode(text)) == TOKENIZER.encode(text)
                assert not any(task.done() for task in huge)
            await asyncio.wait(huge)
        assert longest_s(turns_s) < 0.1


async def test_text_that_nobody_waits_for_costs_nothing_more() -> None:
    async with open_encoder() as encoder:
        text = HUGE * 4
        stays = asyncio.create_task(encoder.encode(text))
        await until_at_work(1)
        tasks = [asyncio.create_task(encoder.encode(text)) for _ in range(6)]
        await until_at_work(2)
        started_s = time.monotonic()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until_at_work(1)
        gone_s = time.monotonic() - started_s
        await stays
        # The other one's process took as long again many times over, at the same work.
        assert gone_s < 0.25 * (time.monotonic() - started_s)


async def test_process_that_is_killed_is_replaced() -> None:
    async with open_encoder() as encoder:
        for text in (LONG, HUGE):
            task = asyncio.create_task(encoder.encode(text))
            [child] = await until_at_work()
            os.kill(child, signal.SIGKILL)
            assert tuple(await task) == TOKENIZER.encode(text)
            if text is LONG:  # it is kept for the next one: this one goes while nobody waits
                [child] = children_of(server_pid())
                os.kill(child, signal.SIGKILL)
                await until(lambda: not children_of(server_pid()))
                assert tuple(await encoder.encode(text)) == TOKENIZER.encode(text)
                [child] = children_of(server_pid())
                os.kill(child, signal.SIGKILL)
                await until(lambda: not children_of(server_pid()))


async def test_tokenizer_process_that_is_killed_is_replaced() -> None:
    async with open_encoder() as encoder:
        first = server_pid()
        os.kill(first, signal.SIGKILL)
        assert tuple(await encoder.encode(LONG)) == TOKENIZER.encode(LONG)
        assert server_pid() != first


async def test_too_many_texts_are_refused_with_a_time() -> None:
    lane = LaneSettings(max_chars=None, num_processes=1, niceness=0, max_num_queued=2)
    async with open_encoder([lane]) as encoder:
        tasks = [asyncio.create_task(encoder.encode(HUGE)) for _ in range(3)]
        await until_at_work()
        with pytest.raises(Refused, match="the limit is 2") as caught:
            await encoder.encode(HUGE)
        assert caught.value.retry_after_s > 0
        tasks[1].cancel()
        await asyncio.wait([tasks[1]])
        tasks.append(asyncio.create_task(encoder.encode(HUGE)))  # the place is free again
        await asyncio.sleep(0)
        assert not tasks[-1].done()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_text_that_the_tokenizer_cannot_encode_is_the_clients_mistake(
    tmp_path: Path,
) -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    inner.save(str(tmp_path / "tokenizer.json"))
    async with asyncio.timeout(SOON_S):
        async with TextEncoder(Tokenizer.load(tmp_path), tmp_path) as encoder:
            for text in ("b", "b" * (MAX_SHORT_CHARS + 1), "b" * (MAX_LONG_CHARS + 1)):
                with pytest.raises(BadRequest, match="cannot encode"):
                    await encoder.encode(text)


ALONE = """
import asyncio, random, sys, time
from pathlib import Path
from pdserve.engine.tokenizer import Tokenizer
from router.tokenizing import TextEncoder

async def main():
    model_dir = Path(sys.argv[1])
    async with TextEncoder(Tokenizer.load(model_dir), model_dir) as encoder:
        await encoder.encode("x " * 5000)  # leaves an idle process behind
        started_s = time.monotonic()
        text = "".join(random.choices("abcdefghij ", k=400_000))
        await encoder.encode(text)
        print(time.monotonic() - started_s, flush=True)
        await encoder.encode(text * 12)

asyncio.run(main())
"""


async def test_router_that_is_killed_leaves_no_process_behind() -> None:
    async with asyncio.timeout(SOON_S):
        router = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ALONE, str(DEMO_MODEL_DIR), stdout=asyncio.subprocess.PIPE
        )
        assert router.stdout is not None
        part_s = float(await router.stdout.readline())
        [server] = children_of(router.pid)
        await until(lambda: len(children_of(server)) == 2)
        started = [server, *children_of(server)]
        router.kill()
        await router.wait()
        async with asyncio.timeout(4 * part_s):  # a third of what the text would have taken
            await until(lambda: not any(is_running(pid) for pid in started))
