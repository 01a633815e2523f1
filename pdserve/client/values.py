"""What a client sends and gets: frozen values, no protobuf."""

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.domain.tokens import Finished, SampledToken

Prompt = str | Sequence[int]
"""Text, or token ids of the model's vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw output tokens; None leaves the choice to the server (see types.proto)."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The next part of an answer. `request_id` is set on the first, `finished` on the last."""

    first_index: int
    tokens: tuple[SampledToken, ...] = ()
    text: str = ""
    request_id: str = ""
    finished: Finished | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer."""

    request_id: str
    tokens: tuple[SampledToken, ...]
    text: str
    finished: Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """`max_context_tokens` bounds prompt and output of one request together."""

    name: str
    max_context_tokens: int
    vocab_size: int
