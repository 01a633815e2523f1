"""Tokens drawn where the logits lie: the same that `pdserve.engine.sampling` draws on the host.

Noise comes from the same counter, and a nucleus is cut by the same whole numbers, so that the order
in which a device adds them up does not matter. What differs is the last bit of a logarithm, which
decides between two scores that are equal to fifteen digits.

What is rare is left to the host's sampler, which gets the logits of such rows: logprobs, and tokens
that `min_tokens` rules out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pdserve.engine.contract import SampleStep
from pdserve.engine.device.device_digest import mixed, shifted, signed
from pdserve.engine.gumbel import MAX_NOISE_GAP, NUM_BITS
from pdserve.engine.mixing import GOLDEN, mix_ints
from pdserve.engine.nucleus import MASS_BITS

UNUSABLE = -1
"""In place of a token: the row has no usable logit."""

_VALUES_AT_ONCE = 1 << 22  # of float64; there are about a dozen intermediate results as large


def greedy_tokens(logits: Tensor) -> Tensor:
    """The likeliest token of each row, of equals the first, or `UNUSABLE`; int64 [rows]."""
    is_usable = torch.isfinite(logits.amax(1))  # NaN is the largest
    return torch.where(is_usable, logits.argmax(1), UNUSABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawPlan:
    """What a step's draws need on the device, as int64 columns of one length for each group.

    Rows are places among the rows that sample. Greedy ones need nothing.
    """

    plain: npt.NDArray[np.int64]  # [3, rows]: row, state, temperature (bits of float64)
    cut: npt.NDArray[np.int64]  # [5, rows]: the same, top_k, top_p (bits of float64)
    host_rows: tuple[int, ...]  # left to the host's sampler

    @classmethod
    def of(cls, steps: Sequence[SampleStep], vocab_size: int) -> "DrawPlan":
        plain, cut, host_rows = [], [], []
        for row, step in enumerate(steps):
            params = step.params
            if not step.is_drawn_on_device:
                host_rows.append(row)
                continue
            if params.is_greedy:
                continue
            state = signed(mix_ints(params.seed, step.token_index))
            column = (row, state, _bits(params.temperature))
            top_k = params.top_k if 0 < params.top_k < vocab_size else vocab_size
            if top_k < vocab_size or params.top_p < 1:
                cut.append((*column, top_k, _bits(params.top_p)))
            else:
                plain.append(column)
        return cls(
            plain=np.array(plain, dtype=np.int64).reshape(-1, 3).T,
            cut=np.array(cut, dtype=np.int64).reshape(-1, 5).T,
            host_rows=tuple(host_rows),
        )


def _bits(number: float) -> int:
    return int(np.float64(number).view(np.int64))


def draw(logits: Tensor, greedy: Tensor, plain: Tensor, cut: Tensor) -> Tensor:
    """Tokens of all rows, or `UNUSABLE`; int64 [rows].

    logits: [rows, vocabulary]; greedy: what `greedy_tokens` gives; plain, cut: those of a
    `DrawPlan`, on the device.
    """
    tokens = greedy
    at_once = max(1, _VALUES_AT_ONCE // logits.shape[1])
    for group, is_cut in ((plain, False), (cut, True)):
        for columns in torch.split(group, at_once, dim=1) if group.shape[1] else ():
            drawn = _draw_rows(logits.index_select(0, columns[0]), columns, is_cut)
            drawn = torch.where(greedy.index_select(0, columns[0]) == UNUSABLE, UNUSABLE, drawn)
            tokens = tokens.index_copy(0, columns[0], drawn)
    return tokens


def _draw_rows(logits: Tensor, columns: Tensor, is_cut: bool) -> Tensor:
    """The noisiest token of each row, of those that top_k and top_p leave."""
    logits = logits.float()
    temperature = columns[2].contiguous().view(torch.float64)[:, None]
    scores = (logits.double() - logits.amax(1, keepdim=True).double()) / temperature
    scores = scores.masked_fill(~(scores >= -MAX_NOISE_GAP), -torch.inf)
    if is_cut:
        scores = _cut(logits, scores, columns[3][:, None], columns[4].contiguous())
    return (scores + _noise(columns[1][:, None], scores.shape[1])).argmax(1)


def _cut(logits: Tensor, scores: Tensor, top_k: Tensor, top_p_bits: Tensor) -> Tensor:
    """`scores`, those beyond the top_k largest logits and outside the nucleus made -infinity.

    Of equals the lowest tokens come first. See `pdserve.engine.nucleus` for the masses.
    """
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices
    ranks = torch.arange(order.shape[1], device=order.device)
    ranked = scores.gather(1, order).masked_fill(ranks >= top_k, -torch.inf)
    counts = (ranked > -torch.inf).sum(1, keepdim=True)
    masses = torch.round(torch.exp(ranked) * _power_of_two(MASS_BITS - _bit_length(counts)))
    top_p = top_p_bits.view(torch.float64)[:, None]
    limits = torch.ceil(top_p * masses.sum(1, keepdim=True)).clamp(min=1)
    before = masses.cumsum(1) - masses
    is_kept = (before < limits) | (top_p >= 1)
    ranked = ranked.masked_fill(~is_kept, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter(1, order, ranked)


def _noise(states: Tensor, vocab_size: int) -> Tensor:
    """`pdserve.engine.gumbel.gumbel_noise` of all tokens, float64 [rows, vocab_size]."""
    tokens = torch.arange(1, vocab_size + 1, device=states.device)
    words = mixed(states + tokens * signed(GOLDEN))
    uniform = (shifted(words, 64 - NUM_BITS).double() + 0.5) * 2.0**-NUM_BITS
    return -torch.log(-torch.log(uniform))


def _bit_length(counts: Tensor) -> Tensor:
    """Of each positive number, exactly: the exponent of a float64."""
    return shifted(counts.double().view(torch.int64), 52) - 1022


def _power_of_two(exponents: Tensor) -> Tensor:
    """float64, exactly."""
    return ((exponents + 1023) << 52).view(torch.float64)
