"""A Hugging Face model whose attention runs over paged KV memory."""

import inspect
from typing import Any

import torch
from torch import Tensor

from pdserve.domain.errors import LocalFault
from pdserve.domain.ids import BlockId
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.attention import attending
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch
from pdserve.engine.fused_mlp import fuse_mlps
from pdserve.engine.fused_norm import fuse_norms
from pdserve.engine.fused_rotary import fuse_rotary
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.model_probe import (
    check_same_logits,
    discover_layout,
    plain_logits,
    probe_table,
    probe_tokens,
    run_packed,
    use_paged,
)
from pdserve.engine.numba_attention import CompiledAttention, compile_attention
from pdserve.engine.packed_linear import pack_linears
from pdserve.engine.packing import pack
from pdserve.engine.paged_cache import DTYPES, PagedCache, PagedStep


def load_model(files: ModelFiles, dtype: str) -> Any:
    """Read the weights into the library's own class for this model type; never runs its code.

    `LocalFault` if the type is unknown to the library or a weight is missing: the library would
    fill it with random numbers.
    """
    import transformers

    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    loader: Any = transformers.AutoModelForCausalLM
    try:
        model, loading = loader.from_pretrained(
            files.model_dir,
            dtype=DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # the library raises many kinds for a directory that it cannot use
        raise LocalFault(
            f"transformers cannot load {files.model_dir} (model type {files.model_type})"
        ) from error
    problems = loading["missing_keys"] or loading["mismatched_keys"]
    if problems:
        raise LocalFault(f"{files.model_dir} lacks weights of the model: {sorted(problems)[0]}")
    return model.eval()


class PagedModel:
    """`forward` runs any mix of prefill chunks and decode tokens over `kv`."""

    def __init__(
        self,
        model: Any,
        *,
        block_size: int,
        num_blocks: int,
        dtype: str,
        attention: str = "auto",
    ) -> None:
        """Take over `model` (in evaluation mode, weights of `dtype`); `LocalFault` if unfit."""
        compiled = _choose_attention(attention, dtype)
        config = model.config.get_text_config()
        tokens = probe_tokens(config.vocab_size)
        plain = plain_logits(model, tokens)
        use_paged(model)
        layout = discover_layout(model, block_size=block_size, dtype=dtype)
        pack_linears(model)
        fuse_norms(model)
        fuse_mlps(model)
        fuse_rotary(model)
        self._model = model
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        scratch = KvMemory(layout, len(tokens))
        self._check_against(plain, tokens, PagedCache(scratch, compiled), dtype)
        scratch.close()
        self.kv = KvMemory(layout, num_blocks)
        self._cache = PagedCache(self.kv, compiled)

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Compute all tokens, write their KV; logits [sequences that sample, vocabulary]."""
        return self._forward(batch, self._cache)

    def close(self) -> None:
        """Drop weights and KV memory."""
        del self._model, self._cache
        self.kv.close()

    def _forward(self, batch: StepBatch, cache: PagedCache) -> Tensor:
        packed = pack(batch, cache.block_size)
        token_ids, positions = (
            torch.from_numpy(packed.token_ids),
            torch.from_numpy(packed.positions),
        )
        rows = torch.from_numpy(packed.sampled_rows)
        kept = {"logits_to_keep": rows if len(rows) else 1} if self._keeps_rows else {}
        with attending(PagedStep(cache, packed)):
            logits = run_packed(self._model, token_ids, positions, **kept)
        if not self._keeps_rows:
            logits = logits[rows]
        return logits[: len(rows)]

    @torch.inference_mode()
    def _check_against(self, plain: Tensor, tokens: Tensor, cache: PagedCache, dtype: str) -> None:
        """Run the probe's tokens in two chunks, then one by one, and compare with `plain`."""
        table = probe_table(len(tokens), cache.block_size)
        rows = [
            self._forward(_one_sequence(tokens, start, end, table), cache)[-1]
            for start, end in _probe_chunks(len(tokens))
        ]
        ends = [end - 1 for _, end in _probe_chunks(len(tokens))]
        check_same_logits(self._model, torch.stack(rows), plain[ends], dtype)


def _choose_attention(attention: str, dtype: str) -> CompiledAttention | None:
    """`numba` reads float32 only; `auto` leaves other dtypes to torch."""
    if attention not in ("auto", "numba", "torch"):
        raise LocalFault(f"attention must be auto, numba or torch; got {attention}")
    if attention == "torch" or (attention == "auto" and dtype != "float32"):
        return None
    if dtype != "float32":
        raise LocalFault(f"numba attention reads float32 only; got {dtype}")
    return compile_attention()


def _probe_chunks(num_tokens: int) -> list[tuple[int, int]]:
    half = num_tokens // 2
    chunks = [(0, half // 2), (half // 2, half)]
    return chunks + [(start, start + 1) for start in range(half, num_tokens)]


def _one_sequence(tokens: Tensor, start: int, end: int, table: tuple[BlockId, ...]) -> StepBatch:
    sample = SampleStep(params=SamplingParams(), token_index=0)
    token_ids = tuple(tokens[start:end].tolist())
    return StepBatch(
        (SequenceStep(token_ids=token_ids, start=start, block_table=table, sample=sample),)
    )
