"""A client's request and its answer, as the router's own values."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import SampledToken


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """What one client asks for; nothing in it is trusted yet."""

    prompt: str | Sequence[int]
    sampling: SamplingParams
    has_seed: bool = False  # False: the router draws the seed
    model: str = ""
    label: str = ""  # the client's name for it, for logs and DUPLICATE_ID
    deadline_s: float | None = None  # budget left when it was received
    slo_class: str = ""  # empty: the router's first
    add_special_tokens: bool = True  # to a prompt that is text


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of the answer; each starts at the token where the last one ended."""

    first_index: int
    tokens: tuple[SampledToken, ...]
    text: str


ChunkSink = Callable[[Chunk], Awaitable[None]]
"""Takes the next piece of an answer; returns once the client's connection has room for more."""
