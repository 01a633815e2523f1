"""A Hugging Face model whose attention runs over paged KV memory."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pdserve.domain.ids import BlockId
from pdserve.domain.layout import KvLayout
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.attention import AttentionTarget, ToldLayers, attending
from pdserve.engine.backend import BatchAttention, HostBackend, ModelBackend
from pdserve.engine.contract import OnLayers, SampleStep, SequenceStep, StepBatch
from pdserve.engine.kv_store import KvStore
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
from pdserve.engine.packing import pack
from pdserve.engine.paged_cache import DTYPES
from pdserve.engine.sharding.shares import dense_logits, share_of


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
    """`forward` runs any mix of prefill chunks and decode tokens over `kv`.

    A module, which may be the part that one rank has of a model, and what carries its KV and its
    attention: see `pdserve.engine.backend`.
    """

    kv: KvStore
    attention: BatchAttention
    is_whole: bool  # and not one rank's part

    def __init__(
        self,
        model: Any,
        *,
        block_size: int,
        num_blocks: int | None,
        dtype: str,
        attention: str = "auto",
        max_context_tokens: int | None = None,
        backend: ModelBackend | None = None,
    ) -> None:
        """Take over `model` (in evaluation mode, weights of `dtype`); `LocalFault` if unfit.

        Of a model that ranks hold together (`load_rank_model`), all of them do this at once, and
        what they do here and in `forward` is the same, step by step.
        Requests have at most `max_context_tokens`, or what the model's config says. Without a
        `backend`, which has its own attention, it computes on the CPU with `attention`. With
        `num_blocks` None it can compute nothing before `open_kv`.
        """
        self._backend = backend or HostBackend(attention, dtype)
        config = model.config.get_text_config()
        limit = max_context_tokens or context_limit(config)
        tokens = probe_tokens(config.vocab_size, candidate_switches(config, limit))
        share = share_of(model)
        logits_of = plain_logits if share is None else dense_logits
        plain = {
            length: logits_of(model, tokens, length)
            for length in probe_lengths(config, limit, len(tokens))
        }
        if share is None:
            use_paged(model)
            layout = discover_layout(model, block_size=block_size, dtype=dtype)
        else:
            layout = share.layout_of(model, block_size=block_size, dtype=dtype)
        layout = replace(layout, order=self._backend.order)
        self._backend.prepare(model)
        self._model = model
        self._dtype = dtype
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.length_rule = find_length_rule(model, limit) if share is None else share.length_rule
        self.is_whole = share is None
        self._gives_logits = share is None or share.place.is_last_stage
        self._check_against(plain, tokens, layout)
        self.layout = layout
        if num_blocks is not None:
            self.open_kv(num_blocks)

    def open_kv(self, num_blocks: int) -> None:
        """Make the KV memory; what there was is closed."""
        self.kv = self._backend.open_kv(self.layout, num_blocks)
        self.attention = self._backend.attention(self.kv)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, on_layers: OnLayers | None = None) -> Tensor:
        """Compute all tokens, write their KV; logits [sequences that sample, vocabulary].

        Ranks of other stages than the last give numbers that mean nothing. `on_layers` is for a
        host whose attention is done when it returns.
        """
        return self.forward_over(self.attention, batch, on_layers)

    def run(self, token_ids: Tensor, positions: Tensor, target: AttentionTarget) -> Tensor:
        """One pass over rows that are all on its device; logits [rows, vocabulary] of all."""
        with attending(target):
            return run_packed(self._model, token_ids, positions)

    def close_kv(self) -> None:
        """Drop the KV memory, if there is any."""
        if hasattr(self, "kv"):
            del self.attention
            self.kv.close()
            del self.kv

    def close(self) -> None:
        """Drop weights and KV memory."""
        del self._model
        self.close_kv()

    @torch.inference_mode()
    def forward_over(
        self, attention: BatchAttention, batch: StepBatch, on_layers: OnLayers | None = None
    ) -> Tensor:
        """One pass for the sequences of each regime: the library computes a pass by one length.

        Of several passes none is told of layer by layer.
        """
        regimes = [self.length_rule.regime(each.length) for each in batch.sequences]
        if len(set(regimes)) == 1:
            return self._pass(batch, regimes[0], attention, on_layers)
        logits, places = [], []
        sampling = [own for each, own in zip(batch.sequences, regimes, strict=True) if each.sample]
        for regime in sorted(set(regimes)):
            both = zip(batch.sequences, regimes, strict=True)
            alike = StepBatch(tuple(each for each, own in both if own == regime))
            logits.append(self._pass(alike, regime, attention))
            places += [place for place, own in enumerate(sampling) if own == regime]
        order = torch.tensor(places, dtype=torch.long).argsort()
        return torch.cat(logits).index_select(0, order.to(logits[0].device))

    def _pass(
        self,
        batch: StepBatch,
        regime: int,
        attention: BatchAttention,
        on_layers: OnLayers | None = None,
    ) -> Tensor:
        packed = pack(batch, attention.block_size)
        spare_position = None
        if regime > self.length_rule.regime(int(packed.positions.max()) + 1):
            # No position in the pass says how long its requests are: a row beside them does.
            spare_position = self.length_rule.switches[regime - 1]
        inputs = attention.inputs(packed, spare_position)
        rows = inputs.sampled_rows
        kept = {"logits_to_keep": rows if len(rows) else 1} if self._keeps_rows else {}
        target = inputs.target if on_layers is None else ToldLayers(inputs.target, on_layers)
        with attending(target):
            logits = run_packed(self._model, inputs.token_ids, inputs.positions, **kept)
        if not self._keeps_rows:
            logits = logits.index_select(0, rows)
        return logits[: len(rows)]

    @torch.inference_mode()
    def _check_against(
        self,
        plain: Mapping[int, Tensor],
        tokens: Tensor,
        layout: KvLayout,
    ) -> None:
        """In each regime compute the probe's tokens in two chunks, then one by one; then as whole
        requests side by side. All must give the logits of `plain`, which are by length.
        """
        regimes = {self.length_rule.regime(length): length for length in sorted(plain)[::-1]}
        for length, logits in plain.items():
            alike = plain[regimes[self.length_rule.regime(length)]]
            self._check_same(logits, alike)
        num_blocks = layout.num_blocks_for(len(tokens))
        scratch = self._backend.open_kv(layout, num_blocks * (len(regimes) + 1))
        attention = self._backend.attention(scratch)
        for place, length in enumerate(regimes.values()):
            ends = [end - 1 for _, end in _probe_chunks(len(tokens))]
            table = probe_table(len(tokens), attention.block_size, place)
            rows = [
                self._computed(attention, _part(tokens, (start, end), table, length))[-1]
                for start, end in _probe_chunks(len(tokens))
            ]
            self._check_same(torch.stack(rows), plain[length][ends])
        self._check_beside(plain, tokens, list(regimes.values()), attention)
        del attention
        scratch.close()

    def _computed(self, attention: BatchAttention, *steps: SequenceStep) -> Tensor:
        """Logits of the probe, on the host."""
        return self.forward_over(attention, StepBatch(steps)).cpu()

    def _check_beside(
        self,
        plain: Mapping[int, Tensor],
        tokens: Tensor,
        lengths: list[int],
        attention: BatchAttention,
    ) -> None:
        """One step of a request of each length, and of a chunk of half of one."""
        half = len(tokens) // 2
        ends = [half, *[len(tokens)] * len(lengths)]
        lengths = [lengths[0], *lengths]
        parts = [
            _part(tokens, (0, end), probe_table(len(tokens), attention.block_size, place), length)
            for place, (end, length) in enumerate(zip(ends, lengths, strict=True))
        ]
        expected = [plain[length][end - 1] for end, length in zip(ends, lengths, strict=True)]
        logits = self._computed(attention, *parts)
        self._check_same(logits, torch.stack(expected))

    def _check_same(self, paged: Tensor, plain: Tensor) -> None:
        if self._gives_logits:
            check_same_logits(self._model, paged, plain, self._dtype)


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
