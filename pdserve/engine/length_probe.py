"""Finds out, by running it, whether a model computes requests of some lengths otherwise.

The library picks LongRoPE's frequencies (Phi-3, Phi-3.5-MoE) by the largest position in a step. So
the same rows are computed beside a last row that stands at one position or another, and their
queries, keys, values and logits are compared. Rope types are not asked for by name: a model whose
choice is of another kind, unknown here, is refused instead of served wrong.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pdserve.domain.errors import LocalFault
from pdserve.domain.lengths import ONE_REGIME, LengthRule
from pdserve.engine.attention import AttentionCall, attending
from pdserve.engine.model_probe import refusal, run_probe
from pdserve.engine.model_shape import CONTEXT_KEYS, first_int

_NUM_ROWS = 16
_SHORT = 32
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
_WORDS = ("position", "length", "context")  # in names of numbers that a choice may depend on


@dataclass(slots=True)
class _Trace:
    """Answers attention calls with each row's own value, and keeps what the first rows asked."""

    num_rows: int
    parts: list[Tensor] = field(default_factory=list)

    def attend(self, call: AttentionCall) -> Tensor:
        self.parts += [
            each[:, : self.num_rows].clone().cpu() for each in (call.query, call.key, call.value)
        ]
        groups = call.query.shape[0] // call.value.shape[0]
        return call.value.repeat_interleave(groups, dim=0).transpose(0, 1)


def context_limit(config: Any) -> int:
    """Of a loaded model's config; `LocalFault` if it says nothing of it."""
    limit = first_int(config.to_dict(), *CONTEXT_KEYS)
    if limit is None:
        raise LocalFault(f"model type {config.model_type} cannot be served: no context limit")
    return limit


def candidate_switches(config: Any, limit: int) -> tuple[int, ...]:
    """Numbers in a loaded model's config after which it may compute otherwise, ascending."""
    return tuple(sorted({value for value in _numbers(config.to_dict()) if 2 <= value < limit}))


def probe_lengths(config: Any, limit: int, num_tokens: int) -> tuple[int, ...]:
    """Lengths, from `num_tokens` up, on both sides of each candidate below `limit`."""
    after = (switch + 1 for switch in candidate_switches(config, limit))
    return (num_tokens, *(length for length in (*after, limit) if length > num_tokens))


def _numbers(config: Mapping[str, Any], is_named: bool = False) -> Iterator[int]:
    for key, value in config.items():
        fits = is_named or any(word in str(key) for word in _WORDS)
        if isinstance(value, Mapping):
            yield from _numbers(value, fits)
        elif fits and isinstance(value, int | float) and float(value).is_integer():
            yield int(value)


@torch.inference_mode()
def find_length_rule(model: Any, limit: int) -> LengthRule:
    """The lengths up to `limit` after which `model`, which calls our attention, computes otherwise.

    `LocalFault` if the computation depends on the length in any way but a switch after a length
    that the config names.
    """
    config = model.config.get_text_config()
    after = {
        length for switch in candidate_switches(config, limit) for length in (switch, switch + 1)
    }
    lengths = sorted({min(_SHORT, limit), *after, limit})
    switches = [
        _switch(model, shorter, longer)
        for shorter, longer in pairwise(lengths)
        if _differ(model, shorter, longer)
    ]
    if not switches:
        return ONE_REGIME
    habits = {_recomputes(model, switch) for switch in switches}
    if len(habits) > 1:
        raise refusal(model, "it computes KV again after some of its switching lengths only")
    return LengthRule(switches=tuple(switches), recomputes=habits.pop())


def _switch(model: Any, shorter: int, longer: int) -> int:
    if longer > shorter + 1:
        raise refusal(
            model,
            f"what it computes for a token depends on how long the request is, between {shorter} "
            f"and {longer} tokens, and not by a switch that its config names",
        )
    return shorter


def _differ(model: Any, shorter: int, longer: int) -> bool:
    """Whether tokens of a request of `shorter` tokens would be others in one of `longer`."""
    first, other, again = (_trace(model, shorter, last - 1) for last in (shorter, longer, shorter))
    if _are_apart(first, again):
        raise refusal(model, "what it computes depends on what it computed before")
    return _are_apart(first, other)


def _trace(model: Any, length: int, last: int) -> list[Tensor]:
    """What rows spread over `length` positions ask of each layer, and their logits; beside `last`.

    The rows are far apart, so that a change of slow frequencies shows as well.
    """
    positions = torch.linspace(0, length - 2, min(_NUM_ROWS, length - 1)).long()
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocab_size, (len(positions) + 1,), generator=generator)
    trace = _Trace(len(positions))
    with attending(trace):
        logits = run_probe(model, tokens, torch.cat([positions, torch.tensor([last])]))
    return [*trace.parts, logits[: len(positions)]]


def _are_apart(left: list[Tensor], right: list[Tensor]) -> bool:
    """Numbers that are not finite are alike if they are in the same places."""
    for before, after in zip(left, right, strict=True):
        is_finite = before.isfinite()
        if not torch.equal(is_finite, after.isfinite()):
            return True
        one, other = before[is_finite].float(), after[is_finite].float()
        tolerance = _TOLERANCE[before.dtype] * torch.linalg.vector_norm(one) + 1e-6
        if not torch.linalg.vector_norm(one - other) <= tolerance:
            return True
    return False


def _recomputes(model: Any, switch: int) -> bool:
    """Whether the library's `generate` computes a request's KV again when it passes `switch`.

    It is asked what to compute for the first token beyond, with KV of all before in the cache.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(model.config.get_text_config().num_hidden_layers):
        cache.update(torch.zeros(1, 1, switch, 1), torch.zeros(1, 1, switch, 1), layer)
    try:
        inputs = model.prepare_inputs_for_generation(
            torch.zeros(1, switch + 1, dtype=torch.long),
            next_sequence_length=1,
            past_key_values=cache,
            attention_mask=torch.ones(1, switch + 1, dtype=torch.long),
        )
        num_tokens = int(inputs["input_ids"].shape[1])
    except Exception as error:  # any model code may run here
        reason = f"it does not say how it goes on after {switch} tokens, where it switches"
        raise refusal(model, reason) from error
    if num_tokens not in (1, switch + 1):
        raise refusal(model, f"it computes {num_tokens} tokens when it passes {switch}")
    return num_tokens > 1
