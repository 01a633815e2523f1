"""How much of a transfer is seen, by when the blocks may travel."""

import pytest

from deploy.simulated.virtual_time import virtual
from pdserve.domain.overlap import Overlap
from pdserve.domain.tokens import PhaseTimeline
from tests.support.worker_pair import BLOCK_SIZE, LAYOUT, Sizes, WorkerPair, oracle

NUM_CHUNKS, CHUNK_BLOCKS = 8, 2
PROMPT = tuple(range(10, 10 + NUM_CHUNKS * CHUNK_BLOCKS * BLOCK_SIZE))
BLOCK_S = 0.002


def timeline_of(overlap: Overlap, *, parts_above_bytes: int = 0) -> PhaseTimeline:
    """Of a prompt of 8 chunks, each of which takes longer to compute than to move."""
    timelines: list[PhaseTimeline] = []

    @virtual
    async def run() -> None:
        sizes = Sizes(
            max_step_tokens=CHUNK_BLOCKS * BLOCK_SIZE,
            overlap=overlap,
            parts_above_bytes=parts_above_bytes,
        )
        async with WorkerPair(sizes) as pair:
            pair.transport.block_s = lambda: BLOCK_S
            call = pair.submit(PROMPT, max_tokens=4)
            timelines.append((await call.completed()).timeline)
            assert call.token_ids == oracle(PROMPT, call.submit.sampling)

    run()
    return timelines[0]


def test_without_overlap_the_whole_transfer_is_seen() -> None:
    timeline = timeline_of("none")
    whole_s = NUM_CHUNKS * CHUNK_BLOCKS * BLOCK_S
    assert timeline.handoff_wait_s == pytest.approx(whole_s)
    assert timeline.transfer_s == pytest.approx(whole_s)


def test_chunk_by_chunk_only_the_last_chunk_is_seen() -> None:
    timeline = timeline_of("chunks")
    assert timeline.handoff_wait_s == pytest.approx(CHUNK_BLOCKS * BLOCK_S)
    assert timeline.transfer_s > 0.8 * timeline.prefill_s  # all but the first chunk's time


def test_by_layers_only_the_last_layers_of_the_last_chunk_are_seen() -> None:
    timeline = timeline_of("layers")
    assert LAYOUT.num_parts == 2
    assert timeline.handoff_wait_s == pytest.approx(CHUNK_BLOCKS * BLOCK_S / 2)
    assert timeline.transferred_bytes == NUM_CHUNKS * CHUNK_BLOCKS * LAYOUT.block_bytes


@pytest.mark.parametrize(("spare_bytes", "share"), [(-1, 0.5), (0, 1.0)])
def test_layers_are_told_of_only_in_chunks_of_more_than_so_many_bytes(
    spare_bytes: int, share: float
) -> None:
    num_bytes = CHUNK_BLOCKS * LAYOUT.block_bytes
    timeline = timeline_of("layers", parts_above_bytes=num_bytes + spare_bytes)
    assert timeline.handoff_wait_s == pytest.approx(share * CHUNK_BLOCKS * BLOCK_S)
