"""Every pair of divisions of a real model, blocks of two sizes: the tokens of transformers alone.

Ranks are threads, and their KV memories those of the models; what moves between them is as in
service: transports, readers, digests, one channel to each rank.
"""

import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from kvtransfer.following import read_for_leader, serve_for_leader
from kvtransfer.landing import Landing
from kvtransfer.leading import reading, serving
from kvtransfer.reading import BlockReader
from kvtransfer.receiver import HandoffReceiver
from kvtransfer.transports import worker_transports
from kvtransfer.transports.base import End
from kvtransfer.transports.nixl_agent import is_installed
from pdserve.domain.ids import BlockId
from pdserve.domain.kv_demand import num_blocks_for
from pdserve.domain.layout import KvLayout
from pdserve.domain.messages import BlocksOffered, Role
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.paged_model import PagedModel
from pdserve.engine.ranks.service import OpenRankService
from pdserve.engine.sharding import load_rank_model
from pdserve.engine.sharding.thread_group import ThreadGroup
from tests.support.greedy_runs import generated, random_prompts
from tests.support.kv_handoff import handoff_id
from tests.support.rank_threads import RankThreads
from tests.support.ranked_kv import EPOCH, Ranks, ranks_of
from tests.support.tiny_models import save_tiny_model, tiny_model

NEEDS_NIXL = pytest.mark.skipif(
    not is_installed(), reason="needs nixl: pip install 'pdserve[nixl]'"
)
TRANSPORTS = ["shm", "tcp", "collective", pytest.param("nixl", marks=NEEDS_NIXL)]
"""Those that move KV between two workers of one host."""

DIVISIONS = list(itertools.product([1, 2, 4], [1, 2]))  # tp, pp
VOCAB_SIZE = 163
NUM_NEW_TOKENS = 6
NUM_TOKENS = 96  # of KV memory, for one prompt at a time
CHUNK = 19


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A model in one division."""

    tp: int
    pp: int
    model: RankThreads
    block_size: int

    @property
    def name(self) -> str:
        return f"tp {self.tp}, pp {self.pp}"

    @property
    def table(self) -> tuple[BlockId, ...]:
        """All of its blocks, out of order."""
        num_blocks = num_blocks_for(NUM_TOKENS, self.block_size)
        return tuple(BlockId(place * 5 % num_blocks) for place in range(num_blocks))

    def run(self, known: list[int], start: int) -> int:
        """Compute what is known from `start` on; returns the next token."""
        token = -1
        while start < len(known):
            end = min(start + CHUNK, len(known))
            is_last = end == len(known)
            step = SequenceStep(
                token_ids=tuple(known[start:end]),
                start=start,
                block_table=self.table,
                sample=SampleStep(params=SamplingParams(), token_index=0) if is_last else None,
                num_tokens=len(known),
            )
            logits = self.model.forward(StepBatch((step,)))
            if is_last:
                token = int(logits[0].argmax())
            start = end
        return token

    def memories(self) -> list[KvMemory]:
        return [rank.kv for rank in self.model.ranks if isinstance(rank.kv, KvMemory)]


@contextlib.contextmanager
def workers(files: ModelFiles, block_size: int) -> Iterator[list[Worker]]:
    """One of each division."""

    def load(group: ThreadGroup) -> PagedModel:
        return PagedModel(
            load_rank_model(files, "float32", group.place, group),
            block_size=block_size,
            num_blocks=num_blocks_for(NUM_TOKENS, block_size),
            dtype="float32",
            max_context_tokens=files.max_context_tokens,
        )

    with contextlib.ExitStack() as stack:
        found = []
        for tp, pp in DIVISIONS:
            model = RankThreads(tp, pp, load)
            stack.callback(model.close)
            found.append(Worker(tp=tp, pp=pp, model=model, block_size=block_size))
        yield found


@contextlib.asynccontextmanager
async def linked(
    source: Worker, target: Worker, whole: KvLayout, transport: str
) -> AsyncIterator[tuple[Ranks, BlockReader]]:
    """Rank 0 of the source, and what the target reads with."""
    async with contextlib.AsyncExitStack() as stack:

        async def ranks(worker: Worker, role: Role, open_service: OpenRankService) -> Ranks:
            return await stack.enter_async_context(
                ranks_of(
                    worker.tp,
                    worker.pp,
                    open_service,
                    role=role,
                    whole=replace(whole, block_size=worker.block_size),
                    memories=worker.memories(),
                    transports=(transport,),
                )
            )

        giver = await ranks(source, Role.PREFILL, serve_for_leader)
        taker = await ranks(target, Role.DECODE, read_for_leader)
        by, into = (worker_transports(each.settings, End(EPOCH)) for each in (giver, taker))
        regions = await stack.enter_async_context(
            serving(giver.kv, by, lambda block_ids: True, epoch=EPOCH)
        )
        open_reader = await stack.enter_async_context(
            reading(taker.kv, taker.layout, into, epoch=EPOCH, read_s=60.0)
        )
        reader = await open_reader(giver.hello(regions))
        assert reader is not None
        stack.push_async_callback(reader.close)
        yield giver, reader


async def hand_on(
    giver: Ranks, reader: BlockReader, source: Worker, target: Worker, num_tokens: int
) -> None:
    """All of a prompt in two offers, as a prefill worker makes them."""
    own = target.table[: num_blocks_for(num_tokens, target.block_size)]
    receiver = HandoffReceiver(
        handoff_id(),
        reader=reader,
        landing=Landing(blocks=own, first_block=0, block_size=target.block_size),
        num_tokens=num_tokens,
        vocab_size=VOCAB_SIZE,
        on_first_token=lambda done: True,
    )
    num_blocks = num_blocks_for(num_tokens, source.block_size)
    for first, end in itertools.pairwise(sorted({0, num_blocks // 2, num_blocks})):
        block_ids = source.table[first:end]
        digests = await giver.kv.digests(handoff_id(), range(first, end), block_ids)
        offer = BlocksOffered(
            handoff=handoff_id(), first_block=first, block_ids=block_ids, digests=tuple(digests)
        )
        assert receiver.hear(offer)
        await receiver.land()
    assert receiver.is_complete
    receiver.end()


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("prefill_size", "decode_size"), [(16, 32), (32, 16)])
@pytest.mark.parametrize("num_kv_heads", [4, 1])
async def test_tokens_are_those_of_one_process_for_every_pair_of_divisions(
    num_kv_heads: int, prefill_size: int, decode_size: int, transport: str, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"num_key_value_heads": num_kv_heads, "vocab_size": VOCAB_SIZE}
    save_tiny_model("llama", tmp_path, eos_token_id=2, **sizes)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    files = ModelFiles.open(tmp_path)
    plain = tiny_model("llama", **sizes)
    plain.generation_config.eos_token_id = None
    prompts = random_prompts()
    expected = [generated(plain, prompt, NUM_NEW_TOKENS)[0] for prompt in prompts]
    wrong = []
    with workers(files, prefill_size) as sources, workers(files, decode_size) as targets:
        whole = sources[0].model.ranks[0].layout
        for source in sources:
            for prompt, tokens in zip(prompts, expected, strict=True):
                first_token = source.run(prompt, 0)
                for target in targets:
                    for memory in target.memories():
                        memory.bytes[:] = bytes(memory.num_bytes)
                    async with linked(source, target, whole, transport) as (giver, reader):
                        await hand_on(giver, reader, source, target, len(prompt))
                    known = [*prompt, first_token]
                    while len(known) < len(prompt) + NUM_NEW_TOKENS:
                        known.append(target.run(known, len(known) - 1))
                    if known[len(prompt) :] != tokens:
                        wrong.append((source.name, target.name, len(prompt)))
    assert not wrong, wrong
    assert len(sources) * len(targets) == 36
