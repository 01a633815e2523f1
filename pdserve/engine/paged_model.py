"""A Hugging Face model whose attention runs over paged KV memory."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdserve.domain.errors import LocalFault
from pdserve.domain.ids import BlockId
from pdserve.domain.layout import KvLayout
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.attention import attending
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch
from pdserve.engine.fused_mlp import fuse_mlps
from pdserve.engine.fused_norm import fuse_norms
from pdserve.engine.fused_rotary import fuse_rotary
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.length_probe import (
    candidate_switches,
    context_limit,
    find_length_rule,
    probe_lengths,
)
from pdserve.engine.library_model import check_loaded, library_config, load_fault
from pdserve.engine.model_faults import check_not_quantised
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

    `LocalFault` if the type is unknown to the library, if weights are quantised, or if the files
    and the model's config do not fit together: the library would fill what is missing with random
    numbers, and leave out what it does not know.
    """
    import transformers

    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    check_not_quantised(files.model_dir, files.config, files.weights)
    loader: Any = transformers.AutoModelForCausalLM
    config = library_config(files)
    try:
        model, loading = loader.from_pretrained(
            files.model_dir,
            config=config,
            dtype=DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are told of, below
            output_loading_info=True,
        )
    except Exception as error:  # the library raises many kinds for a directory that it cannot use
        raise load_fault(files, error) from error
    check_loaded(files, model, loading)
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
        max_context_tokens: int | None = None,
    ) -> None:
        """Take over `model` (in evaluation mode, weights of `dtype`); `LocalFault` if unfit.

        Requests have at most `max_context_tokens`, or what the model's config says.
        """
        compiled = _choose_attention(attention, dtype)
        config = model.config.get_text_config()
        limit = max_context_tokens or context_limit(config)
        tokens = probe_tokens(config.vocab_size, candidate_switches(config, limit))
        plain = {
            length: plain_logits(model, tokens, length)
            for length in probe_lengths(config, limit, len(tokens))
        }
        use_paged(model)
        layout = discover_layout(model, block_size=block_size, dtype=dtype)
        pack_linears(model)
        fuse_norms(model)
        fuse_mlps(model)
        fuse_rotary(model)
        self._model = model
        self._dtype = dtype
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.length_rule = find_length_rule(model, limit)
        self._check_against(plain, tokens, layout, compiled)
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
        """One pass for the sequences of each regime: the library computes a pass by one length."""
        regimes = [self.length_rule.regime(each.length) for each in batch.sequences]
        if len(set(regimes)) == 1:
            return self._pass(batch, regimes[0], cache)
        logits, places = [], []
        sampling = [own for each, own in zip(batch.sequences, regimes, strict=True) if each.sample]
        for regime in sorted(set(regimes)):
            both = zip(batch.sequences, regimes, strict=True)
            alike = StepBatch(tuple(each for each, own in both if own == regime))
            logits.append(self._pass(alike, regime, cache))
            places += [place for place, own in enumerate(sampling) if own == regime]
        return torch.cat(logits)[torch.tensor(places, dtype=torch.long).argsort()]

    def _pass(self, batch: StepBatch, regime: int, cache: PagedCache) -> Tensor:
        packed = pack(batch, cache.block_size)
        token_ids, positions = packed.token_ids, packed.positions
        if regime > self.length_rule.regime(int(positions.max()) + 1):
            # No position in the pass says how long its requests are: a row beside them does.
            last = self.length_rule.switches[regime - 1]
            token_ids, positions = np.append(token_ids, 0), np.append(positions, last)
        rows = torch.from_numpy(packed.sampled_rows)
        kept = {"logits_to_keep": rows if len(rows) else 1} if self._keeps_rows else {}
        with attending(PagedStep(cache, packed)):
            logits = run_packed(
                self._model, torch.from_numpy(token_ids), torch.from_numpy(positions), **kept
            )
        if not self._keeps_rows:
            logits = logits[rows]
        return logits[: len(rows)]

    @torch.inference_mode()
    def _check_against(
        self,
        plain: Mapping[int, Tensor],
        tokens: Tensor,
        layout: KvLayout,
        compiled: CompiledAttention | None,
    ) -> None:
        """In each regime compute the probe's tokens in two chunks, then one by one; then as whole
        requests side by side. All must give the logits of `plain`, which are by length.
        """
        regimes = {self.length_rule.regime(length): length for length in sorted(plain)[::-1]}
        for length, logits in plain.items():
            alike = plain[regimes[self.length_rule.regime(length)]]
            check_same_logits(self._model, logits, alike, layout.dtype)
        num_blocks = layout.num_blocks_for(len(tokens))
        scratch = KvMemory(layout, num_blocks * (len(regimes) + 1))
        cache = PagedCache(scratch, compiled)
        for place, length in enumerate(regimes.values()):
            ends = [end - 1 for _, end in _probe_chunks(len(tokens))]
            table = probe_table(len(tokens), cache.block_size, place)
            rows = [
                self._forward(StepBatch((_part(tokens, (start, end), table, length),)), cache)[-1]
                for start, end in _probe_chunks(len(tokens))
            ]
            check_same_logits(self._model, torch.stack(rows), plain[length][ends], layout.dtype)
        self._check_beside(plain, tokens, list(regimes.values()), cache)
        del cache
        scratch.close()

    def _check_beside(
        self, plain: Mapping[int, Tensor], tokens: Tensor, lengths: list[int], cache: PagedCache
    ) -> None:
        """One step of a request of each length, and of a chunk of half of one."""
        half = len(tokens) // 2
        ends = [half, *[len(tokens)] * len(lengths)]
        lengths = [lengths[0], *lengths]
        parts = [
            _part(tokens, (0, end), probe_table(len(tokens), cache.block_size, place), length)
            for place, (end, length) in enumerate(zip(ends, lengths, strict=True))
        ]
        expected = [plain[length][end - 1] for end, length in zip(ends, lengths, strict=True)]
        logits = self._forward(StepBatch(tuple(parts)), cache)
        check_same_logits(self._model, logits, torch.stack(expected), self._dtype)


def _choose_attention(attention: str, dtype: str) -> CompiledAttention | None:
    if attention not in ("auto", "numba", "torch"):
        raise LocalFault(f"attention must be auto, numba or torch; got {attention}")
    return None if attention == "torch" else compile_attention(dtype)


def _probe_chunks(num_tokens: int) -> list[tuple[int, int]]:
    half = num_tokens // 2
    chunks = [(0, half // 2), (half // 2, half)]
    return chunks + [(start, start + 1) for start in range(half, num_tokens)]


def _part(
    tokens: Tensor, span: tuple[int, int], table: tuple[BlockId, ...], length: int
) -> SequenceStep:
    start, end = span
    return SequenceStep(
        token_ids=tuple(tokens[start:end].tolist()),
        start=start,
        block_table=table,
        sample=SampleStep(params=SamplingParams(), token_index=0),
        num_tokens=length,
    )
