"""An engine without a model: its steps take predicted time, its tokens follow from its KV bytes.

KV is a chain over the tokens, so a block that is stale, foreign, swapped or torn changes every
token drawn after it. With all sums modulo 2**64:

    state[p] = state[p-1] * FACTOR + mix(token[p] + 1),  state[-1] = seed of the model
    tag[p, k] = state[p] if k == 0 else mix(state[p] + k * GOLDEN)      k = 2 * layer + (0 K | 1 V)
    KV of position p: K of layer l is tag[p, 2l] over and over, V is tag[p, 2l + 1]
    token drawn after n positions = mix(sum over p, k of tag[p, k] * (2p + 1) * (2k + 3), ...)

A step knows only its own chunk: the state before it is read from the cache, and so are all tags
that a drawn token depends on.
"""

import asyncio
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pdserve.domain.engine_spec import EngineSpec
from pdserve.domain.errors import LocalFault, Reason
from pdserve.domain.invariants import check_invariant
from pdserve.domain.latency import StepLatency
from pdserve.domain.layout import KvLayout
from pdserve.domain.tokens import Failed, SampledToken
from pdserve.engine.contract import Drawn, OnLayers, SampleStep, SequenceStep, StepBatch, StepResult
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.mixing import GOLDEN, Words, mix, mix_ints
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.model_shape import kv_layout
from pdserve.engine.tokenizer import Tokenizer

_WORD_BYTES = 8
_FACTOR = 0xD1342543DE82EF95  # odd, so that it has an inverse


class TimedEngine:
    """Satisfies `Engine`. `layout` stands in for the model's own where memory must stay small."""

    looks_ahead = False

    def __init__(
        self,
        files: ModelFiles,
        *,
        block_size: int,
        num_blocks: int,
        coefficients: StepLatency,
        dtype: str = "float32",
        layout: KvLayout | None = None,
    ) -> None:
        layout = layout or kv_layout(files.config, block_size=block_size, dtype=dtype)
        check_invariant(layout.block_size == block_size, "one block size", block_size, layout)
        self.spec = EngineSpec(
            kind="timed",
            model_name=files.name,
            model_hash=hashlib.blake2b(b"timed" + files.model_hash, digest_size=16).digest(),
            tokenizer_hash=Tokenizer.load(files.model_dir).digest,
            vocab_size=files.vocab_size,
            max_context_tokens=files.max_context_tokens,
            eos_token_ids=files.eos_token_ids,
            layout=layout,
        )
        self.coefficients = coefficients
        self.kv = KvMemory(layout, num_blocks, holds_numbers=False)
        self._tags = _TagMemory(self.kv)
        self._seed = _seed(self.spec)
        self._free_at_s = 0.0  # on the event loop's clock

    async def step(self, batch: StepBatch) -> StepResult:
        """Sleep for the predicted time, then write KV and draw.

        If layers are told of, each takes an equal part of the time, and is written after it. A
        cancelled call writes no more, and the next one still waits until its time is over.
        """
        loop = asyncio.get_running_loop()
        elapsed_s = self.coefficients.step_s(batch.shape())
        self._free_at_s = max(loop.time(), self._free_at_s) + elapsed_s
        if batch.on_layers is not None:
            await self._write_by_layer(batch, batch.on_layers, elapsed_s)
        await asyncio.sleep(self._free_at_s - loop.time())
        return StepResult(tuple(self._run(each) for each in batch.sequences), elapsed_s)

    async def _write_by_layer(
        self, batch: StepBatch, on_layers: OnLayers, elapsed_s: float
    ) -> None:
        loop, num_layers = asyncio.get_running_loop(), len(self.spec.layout.layers)
        began_s = self._free_at_s - elapsed_s
        for layer in range(num_layers):
            await asyncio.sleep(began_s + elapsed_s * (layer + 1) / num_layers - loop.time())
            for each in batch.sequences:
                self._write(each, layer)
            on_layers(layer + 1)

    def close(self) -> None:
        self._tags.close()
        self.kv.close()

    def _write(self, sequence: SequenceStep, layer: int | None = None) -> None:
        """KV of all layers, or of one."""
        start, table = sequence.start, np.asarray(sequence.block_table, dtype=np.int64)
        before = self._tags.read_state(table, start - 1) if start else self._seed
        states = _advance(before, sequence.token_ids)
        self._tags.write(table, start, _tags(states, self._tags.num_tags), layer)

    def _run(self, sequence: SequenceStep) -> Drawn | None:
        self._write(sequence)
        if sequence.sample is None:
            return None
        end = sequence.start + len(sequence.token_ids)
        table = np.asarray(sequence.block_table, dtype=np.int64)
        return _draw(self.spec, _fold(self._tags.read(table, end)), sequence.sample)


class _TagMemory:
    """KV memory as one tag for each (position, layer, K or V)."""

    def __init__(self, kv: KvMemory) -> None:
        layout, block_size = kv.layout, kv.layout.block_size
        self.num_tags = 2 * len(layout.layers)
        self._block_size = block_size
        self._words = np.frombuffer(kv.bytes, dtype=np.uint64).reshape(kv.num_blocks, -1)
        firsts, columns, owners = [], [], []
        for index, layer in enumerate(layout.layers):
            offset = layout.layer_offset_bytes(index)
            for part, head_dim in enumerate((layer.k_head_dim, layer.v_head_dim)):
                slot_bytes = layer.num_kv_heads * head_dim * layout.item_bytes
                if slot_bytes % _WORD_BYTES:
                    raise LocalFault("the timed engine needs K and V of whole 8-byte words a token")
                num_words = slot_bytes // _WORD_BYTES
                starts = offset // _WORD_BYTES + np.arange(block_size) * num_words
                firsts.append(starts)
                columns.append(starts[:, None] + np.arange(num_words))
                owners.append(np.full(num_words, 2 * index + part))
                offset += slot_bytes * block_size
        self._first_columns = np.stack(firsts, axis=1)  # [block_size, num_tags]
        self._columns = np.concatenate(columns, axis=1)  # [block_size, words of one position]
        self._owners = np.concatenate(owners)  # which tag fills each of those words

    def close(self) -> None:
        self._words = np.zeros((0, 0), dtype=np.uint64)

    def _slots(
        self, table: npt.NDArray[np.int64], start: int, end: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        blocks, offsets = np.divmod(np.arange(start, end), self._block_size)
        return table[blocks][:, None], offsets

    def write(
        self, table: npt.NDArray[np.int64], start: int, tags: Words, layer: int | None = None
    ) -> None:
        """`tags`: [positions, num_tags], from position `start`; those of one layer, or all."""
        blocks, offsets = self._slots(table, start, start + len(tags))
        own = slice(None) if layer is None else self._owners // 2 == layer
        self._words[blocks, self._columns[offsets][:, own]] = tags[:, self._owners[own]]

    def read(self, table: npt.NDArray[np.int64], end: int) -> Words:
        """Tags of positions 0 to `end` - 1: [positions, num_tags]."""
        blocks, offsets = self._slots(table, 0, end)
        return self._words[blocks, self._first_columns[offsets]]

    def read_state(self, table: npt.NDArray[np.int64], position: int) -> int:
        block, offset = divmod(position, self._block_size)
        return int(self._words[table[block], self._first_columns[offset, 0]])


def _seed(spec: EngineSpec) -> int:
    return int.from_bytes(spec.model_hash[:8], "little")


def _advance(state: int, token_ids: Sequence[int]) -> Words:
    """States after each token; the recurrence solved as powers[p] * (state + prefix sums)."""
    num_tokens = len(token_ids)
    inverse = np.uint64(pow(_FACTOR, -1, 2**64))
    powers = np.cumprod(np.full(num_tokens, _FACTOR, dtype=np.uint64), dtype=np.uint64)
    inverses = np.cumprod(np.full(num_tokens, inverse, dtype=np.uint64), dtype=np.uint64)
    hashes = mix(np.asarray(token_ids, dtype=np.uint64) + np.uint64(1))
    sums = np.cumsum(hashes * inverses, dtype=np.uint64)
    states: Words = powers * (np.uint64(state) + sums)
    return states


def _tags(states: Words, num_tags: int) -> Words:
    steps = np.arange(num_tags, dtype=np.uint64) * np.uint64(GOLDEN)
    tags = mix(states[:, None] + steps)
    tags[:, 0] = states
    return tags


def _fold(tags: Words) -> int:
    """Weights differ by place, so that neither blocks nor layers can be swapped unseen."""
    positions, kinds = (np.arange(size, dtype=np.uint64) for size in tags.shape)
    weights = (np.uint64(2) * positions + np.uint64(1))[:, None] * (
        np.uint64(2) * kinds + np.uint64(3)
    )
    return int(np.sum(tags * weights, dtype=np.uint64))


def _draw(spec: EngineSpec, content: int, sample: SampleStep) -> Drawn:
    """End tokens are never drawn: an answer's length is what the request asked for."""
    params, index = sample.params, sample.token_index
    banned = set(spec.eos_token_ids)
    if index < params.min_tokens:
        banned |= set(params.stop_token_ids)
    num_allowed = spec.vocab_size - len(banned)
    if num_allowed < 1:
        message = "end tokens and stop tokens leave no token to draw"
        return Failed(reason=Reason.UNUSABLE_LOGITS, message=message)
    seed = 0 if params.is_greedy else params.seed
    drawn: list[int] = []
    attempt = 0
    while len(drawn) < min(1 + (params.logprobs or 0), num_allowed):
        token_id = mix_ints(content, index, seed, attempt) % spec.vocab_size
        attempt += 1
        if token_id not in banned:
            drawn.append(token_id)
            banned.add(token_id)
    if params.logprobs is None:
        return SampledToken(drawn[0])
    ranked = tuple((token_id, -1.0 - rank) for rank, token_id in enumerate(drawn))
    return SampledToken(drawn[0], ranked[0][1], ranked[: params.logprobs])
