"""How output tokens are drawn, and the limits of each field."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from pdserve.domain.errors import BadRequest, FieldViolation

MAX_TEMPERATURE = 2.0
GREEDY_BELOW_TEMPERATURE = 1e-5
"""Smaller temperatures are greedy: logits are not exact enough to tell the difference."""
MAX_NUM_STOP_STRINGS = 8
MAX_STOP_STRING_CHARS = 64
MAX_NUM_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1
DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Temperature 0 is greedy, and so is one below 1e-5.

    `logprobs` counts the alternatives reported; None reports none.

    A stop id or stop string ends the answer once `min_tokens` tokens are out; stop tokens and
    stop strings are part of the text only with `include_stop_str_in_output`. Stop strings are
    looked for with special tokens shown, even if `skip_special_tokens` leaves those out of the
    text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    @property
    def is_greedy(self) -> bool:
        """Each token is the likeliest one; of equally likely ones the one of the lowest id."""
        return self.temperature < GREEDY_BELOW_TEMPERATURE


def check_sampling(
    params: SamplingParams, *, vocab_size: int, eos_token_ids: Collection[int] = ()
) -> None:
    """Raise `BadRequest` with every field that is out of its limits.

    `eos_token_ids` are the model's end tokens, at a process that knows them.
    """
    violations: list[FieldViolation] = []

    def limit(ok: bool, field: str, rule: str, value: object) -> None:
        if not ok:
            violations.append(
                FieldViolation(field=f"sampling.{field}", description=f"{rule}; got {value}")
            )

    temperature, top_p = params.temperature, params.top_p
    limit(
        math.isfinite(temperature) and 0 <= temperature <= MAX_TEMPERATURE,
        "temperature",
        f"must be a number from 0 to {MAX_TEMPERATURE:g}",
        temperature,
    )
    limit(math.isfinite(top_p) and 0 < top_p <= 1, "top_p", "must be above 0, at most 1", top_p)
    limit(params.top_k >= 0, "top_k", "must be 0 (all) or more", params.top_k)
    limit(0 <= params.seed <= MAX_SEED, "seed", "must fit 64 bits without sign", params.seed)
    limit(params.max_tokens >= 1, "max_tokens", "must be at least 1", params.max_tokens)
    limit(
        0 <= params.min_tokens <= params.max_tokens,
        "min_tokens",
        f"must be from 0 to max_tokens ({params.max_tokens})",
        params.min_tokens,
    )
    limit(
        len(params.stop) <= MAX_NUM_STOP_STRINGS,
        "stop",
        f"must hold at most {MAX_NUM_STOP_STRINGS} strings",
        len(params.stop),
    )
    limit(
        all(0 < len(text) <= MAX_STOP_STRING_CHARS for text in params.stop),
        "stop",
        f"each string must have 1 to {MAX_STOP_STRING_CHARS} characters",
        sorted(len(text) for text in params.stop),
    )
    limit(
        len(params.stop_token_ids) <= MAX_NUM_STOP_TOKEN_IDS,
        "stop_token_ids",
        f"must hold at most {MAX_NUM_STOP_TOKEN_IDS} ids",
        len(params.stop_token_ids),
    )
    limit(
        all(0 <= token_id < vocab_size for token_id in params.stop_token_ids),
        "stop_token_ids",
        f"each must be below the vocabulary size ({vocab_size})",
        max(params.stop_token_ids, default=0),
    )
    num_ends = len({*eos_token_ids, *params.stop_token_ids})
    limit(
        params.min_tokens == 0 or num_ends < vocab_size,
        "min_tokens",
        f"must be 0 if end and stop tokens are the whole vocabulary ({vocab_size})",
        params.min_tokens,
    )
    limit(
        params.logprobs is None or 0 <= params.logprobs <= MAX_LOGPROBS,
        "logprobs",
        f"must be from 0 to {MAX_LOGPROBS}",
        params.logprobs,
    )
    if violations:
        raise BadRequest.of(violations)
