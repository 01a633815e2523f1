"""Requests of some lengths are computed otherwise: what follows from it for KV and its names.

LongRoPE turns queries and keys by one set of frequencies up to a length, and by another beyond it.
Which set is used must follow from the request alone, never from what is beside it in a step.
"""

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthRule:
    """A request of n tokens is in regime r if n is above r of the `switches`.

    The tokens counted are all that the request has when a token is computed: the whole prompt while
    any part of it is read, and one more with each token of the answer.
    """

    switches: tuple[int, ...] = ()  # ascending; most models have none
    recomputes: bool = False  # an answer that passes a switch computes all its KV again

    def regime(self, num_tokens: int) -> int:
        return bisect_left(self.switches, num_tokens)

    def salt(self, num_prompt_tokens: int) -> bytes:
        """Keeps the KV of a prompt apart from the same tokens in a prompt of another regime."""
        regime = self.regime(num_prompt_tokens)
        return regime.to_bytes(2, "little") if regime else b""

    def is_recomputed(self, num_prompt_tokens: int, num_kv_tokens: int) -> bool:
        """Whether KV of a request that grows to `num_kv_tokens` may be computed again."""
        grows = self.regime(num_prompt_tokens) < self.regime(num_kv_tokens)
        return self.recomputes and grows


ONE_REGIME = LengthRule()
