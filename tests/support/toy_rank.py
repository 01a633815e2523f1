"""A worker of ranks that compute next to nothing: what remains are the ranks themselves.

    python -m tests.support.toy_rank --settings -       as `python -m decode_worker`

A rank's KV of a position is the sum over its stage's ranks of what was handed over and the token,
so a rank that misses a step, or takes it twice, changes every later token.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from pdserve.config.processes import EngineSettings
from pdserve.domain.engine_spec import EngineSpec
from pdserve.domain.tokens import SampledToken
from pdserve.engine.contract import Drawn, StepBatch, StepResult
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.model_shape import kv_layout
from pdserve.engine.rank_group import RankGroup
from pdserve.engine.threads import run_to_end
from pdserve.engine.tokenizer import Tokenizer

WEIGHTS = 1_000_003


class ToyPart:
    """Satisfies `Engine`, for one rank."""

    def __init__(self, files: ModelFiles, settings: EngineSettings, group: RankGroup) -> None:
        place = group.place
        whole = kv_layout(files.config, block_size=settings.block_size, dtype="float32")
        self.spec = EngineSpec(
            kind="torch",
            model_name=files.name,
            model_hash=files.model_hash,
            tokenizer_hash=Tokenizer.load(files.model_dir).digest,
            vocab_size=files.vocab_size,
            max_context_tokens=files.max_context_tokens,
            eos_token_ids=files.eos_token_ids,
            layout=whole,
            tp=settings.tp,
            pp=settings.pp,
        )
        layout = self.spec.sharded_layout.rank(place.rank).layout
        self.kv = KvMemory(layout, settings.host_num_blocks)
        self._place = place
        self._group = group
        self._state = torch.zeros(1, dtype=torch.float64)
        self._thread = ThreadPoolExecutor(1)

    async def step(self, batch: StepBatch) -> StepResult:
        return await run_to_end(lambda _: self._compute(batch), self._thread)

    def close(self) -> None:
        self._thread.shutdown()
        self.kv.close()

    def _compute(self, batch: StepBatch) -> StepResult:
        handed = torch.zeros(1, dtype=torch.float64)
        if not self._place.is_first_stage:
            handed = self._group.receive(handed)
        tokens = sum(sum(each.token_ids) + each.start for each in batch.sequences)
        own = (self._state * 31 + handed + tokens + self._place.rank) % WEIGHTS
        self._state = self._group.all_reduce(own)
        if not self._place.is_last_stage:
            self._group.send(self._state)
        if not self._place.draws:
            return StepResult((None,) * len(batch.sequences), 0.0)
        sampled: list[Drawn | None] = [
            SampledToken(int(self._state.item() + row) % self.spec.vocab_size)
            if each.sample
            else None
            for row, each in enumerate(batch.sequences)
        ]
        return StepResult(tuple(sampled), 0.0)
