"""The engine that runs real models: `transformers` code over a paged KV cache, on CPU."""

import contextlib
import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pdserve.domain.engine_spec import EngineSpec
from pdserve.domain.errors import LocalFault
from pdserve.domain.layout import ShardedLayout
from pdserve.engine.contract import Drawn, StepBatch, StepResult
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.model_shape import item_bytes
from pdserve.engine.numba_draws import compile_draws
from pdserve.engine.paged_model import PagedModel, load_model
from pdserve.engine.rank_group import RankGroup
from pdserve.engine.sampling import draw_tokens
from pdserve.engine.sharding import load_rank_model
from pdserve.engine.sharding.shares import RankShare, share_of
from pdserve.engine.threads import run_to_end
from pdserve.engine.tokenizer import Tokenizer

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEPT_BYTES = 256 << 20


class TorchEngine:
    """Satisfies `Engine`. Computes in one thread of its own, with one torch thread.

    Of a rank that does not draw, the tokens are all None.
    """

    def __init__(self, model: PagedModel, spec: EngineSpec, *, draws: bool = True) -> None:
        self.spec = spec
        self._draws = draws
        self.kv = model.kv
        self._model = model
        self._thread = ThreadPoolExecutor(1, "engine", initializer=_use_one_thread)

    @classmethod
    def load(
        cls,
        files: ModelFiles | Path,
        *,
        block_size: int,
        num_blocks: int,
        dtype: str = "float32",
        device: str = "cpu",
        attention: str = "auto",
        group: RankGroup | None = None,
    ) -> "TorchEngine":
        """Load weights, and check that the model can be served; `LocalFault` says why if not.

        With `group` only the part of this rank: the other ranks load and compute theirs beside it.
        `attention`: `numba` or `torch` (gather and SDPA); `auto` takes numba where it can be used.
        """
        if device != "cpu":
            raise LocalFault(f"device must be cpu; got {device}")
        item_bytes(dtype)
        _use_one_thread()
        keep_freed_memory()
        compile_draws()
        if isinstance(files, Path):
            files = ModelFiles.open(files)
        loaded = (
            load_model(files, dtype)
            if group is None
            else load_rank_model(files, dtype, group.place, group, device)
        )
        model = PagedModel(
            loaded,
            block_size=block_size,
            num_blocks=num_blocks,
            dtype=dtype,
            attention=attention,
            max_context_tokens=files.max_context_tokens,
        )
        spec = _spec(files, model, share_of(loaded))
        return cls(model, spec, draws=group is None or group.place.draws)

    async def step(self, batch: StepBatch) -> StepResult:
        """Run the batch in the engine's thread. A cancelled call raises once the step is over."""
        return await run_to_end(lambda is_cancelled: self.compute(batch), self._thread)

    def compute(self, batch: StepBatch) -> StepResult:
        """Run the batch in the calling thread; not while a `step` is running."""
        began_s = time.perf_counter()
        if not batch.sequences:
            return StepResult((), 0.0)
        logits = self._model.forward(batch)
        if not self._draws:
            return StepResult((None,) * len(batch.sequences), time.perf_counter() - began_s)
        steps = [each.sample for each in batch.sequences if each.sample is not None]
        drawn = iter(draw_tokens(logits.float().numpy(), steps, self.spec.eos_token_ids))
        sampled: list[Drawn | None] = [
            None if each.sample is None else next(drawn) for each in batch.sequences
        ]
        return StepResult(tuple(sampled), time.perf_counter() - began_s)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._model.close()


def _use_one_thread() -> None:
    """More threads wait for each other on a busy machine, up to 300 times longer (facts 3.4)."""
    torch.set_num_threads(1)


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of giving them back to the system.

    Otherwise each large intermediate result is mapped and cleared anew: SiLU of 512 x 1408 values
    takes 1.9 ms instead of 0.2. Elsewhere than on glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _spec(files: ModelFiles, model: PagedModel, share: RankShare | None) -> EngineSpec:
    own = model.kv.layout
    sharded = (
        ShardedLayout(whole=own)
        if share is None
        else share.sharded_layout(block_size=own.block_size, dtype=own.dtype)
    )
    return EngineSpec(
        kind="torch",
        model_name=files.name,
        model_hash=files.model_hash,
        tokenizer_hash=Tokenizer.load(files.model_dir).digest,
        vocab_size=files.vocab_size,
        max_context_tokens=files.max_context_tokens,
        eos_token_ids=files.eos_token_ids,
        layout=sharded.whole,
        length_rule=model.length_rule,
        tp=sharded.tp,
        pp=sharded.pp,
    )
