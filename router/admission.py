"""Hard limits, before any work: what is refused here has cost nothing and started nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from pdserve.domain.errors import BadRequest, FieldViolation, Reason
from pdserve.domain.kv_demand import num_answer_kv_tokens
from pdserve.domain.sampling import check_sampling
from router.requests import GenerateCall

MAX_LABEL_CHARS = 128
_NO_VOCABULARY = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model behind this router, as its workers describe it."""

    name: str
    max_context_tokens: int  # of one request, prompt and answer together
    max_kv_tokens: int  # what the largest decode worker can hold at all
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLimits:
    """What bounds a prompt that is text, before it is tokenised."""

    max_prompt_chars: int  # a setting
    max_chars_per_token: int | None = None  # None: a token may stand for any number of them


def check_call(call: GenerateCall, model_name: str, limits: TextLimits) -> None:
    """Raise `BadRequest` for what no worker could change."""
    _check_model_name(call.model, model_name)
    check_sampling(call.sampling, vocab_size=_NO_VOCABULARY)
    if not isinstance(call.prompt, str):
        if len(call.prompt) == 0:
            _refuse("token_ids", "must hold at least 1 token; got 0")
    elif not call.prompt:
        _refuse("text", "must hold at least 1 character; got 0")
    elif len(call.prompt) > limits.max_prompt_chars:
        rule = (
            f"must have at most {limits.max_prompt_chars} characters (the router's "
            f"max_prompt_chars); got {len(call.prompt)}"
        )
        _refuse("text", rule)


def check_fit(call: GenerateCall, model: ServedModel, limits: TextLimits) -> None:
    """Raise `BadRequest` for what the workers could not serve if they were idle.

    A text is refused here only if it has too many tokens however it is tokenised.
    """
    check_sampling(call.sampling, vocab_size=model.vocab_size)
    max_tokens = call.sampling.max_tokens
    if not isinstance(call.prompt, str):
        check_num_tokens(len(call.prompt), max_tokens, model, field="token_ids")
        return
    num_left, what = min(
        (model.max_context_tokens - max_tokens, "the model's context"),
        (model.max_kv_tokens + 1 - max_tokens, "the KV memory of the largest decode worker"),
    )
    if num_left < 1:
        rule = f"must leave room for a prompt in {what} of {num_left + max_tokens} tokens"
        _refuse("sampling.max_tokens", f"{rule}; got {max_tokens}", Reason.CONTEXT_TOO_LONG)
    if limits.max_chars_per_token is None:
        return
    max_chars = num_left * limits.max_chars_per_token
    if len(call.prompt) > max_chars:
        rule = (
            f"must have at most {max_chars} characters: beside max_tokens ({max_tokens}) {what} "
            f"leaves {num_left} tokens for the prompt, and no token stands for more than "
            f"{limits.max_chars_per_token} characters; got {len(call.prompt)}"
        )
        _refuse("text", rule, Reason.CONTEXT_TOO_LONG)


def check_label(label: str) -> None:
    """Raise `BadRequest` unless the request id is safe in logs and headers."""
    if len(label) > MAX_LABEL_CHARS:
        _refuse("request_id", f"must have at most {MAX_LABEL_CHARS} characters; got {len(label)}")
    if not is_safe_label(label):
        _refuse("request_id", "must be printable ASCII without spaces")


def is_safe_label(label: str) -> bool:
    return len(label) <= MAX_LABEL_CHARS and all("!" <= character <= "~" for character in label)


def check_num_tokens(num_prompt: int, max_tokens: int, model: ServedModel, *, field: str) -> None:
    """Raise `BadRequest` unless the whole answer fits the context and the KV memory.

    `field` is the one that held the prompt.
    """
    num_kv = num_answer_kv_tokens(num_prompt, max_tokens)
    for limit, num_tokens, what in (
        (model.max_context_tokens, num_prompt + max_tokens, "the model's context"),
        (model.max_kv_tokens, num_kv, "the KV memory of the largest decode worker"),
    ):
        if num_tokens - max_tokens + 1 > limit:
            rule = f"must leave room for an answer in {what} of {limit} tokens; got {num_prompt}"
            _refuse(field, rule, Reason.CONTEXT_TOO_LONG)
        if num_tokens > limit:
            rule = (
                f"prompt ({num_prompt} tokens) and max_tokens ({max_tokens}) "
                f"must fit {what} of {limit} tokens; got {num_tokens}"
            )
            _refuse("sampling.max_tokens", rule, Reason.CONTEXT_TOO_LONG)


def check_token_values(
    token_ids: Sequence[int], model: ServedModel, *, field: str, first: int = 0
) -> None:
    """Raise `BadRequest` for one beyond the vocabulary; `first` is the place of the first."""
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < model.vocab_size):
        return
    index, token_id = next(
        (index, token_id)
        for index, token_id in enumerate(token_ids, first)
        if not 0 <= token_id < model.vocab_size
    )
    rule = f"must be below the vocabulary size ({model.vocab_size}); got {token_id}"
    _refuse(f"{field}[{index}]", rule)


def _check_model_name(name: str, model_name: str) -> None:
    if name not in ("", model_name):
        # The name asked for is the client's text: it is not repeated.
        _refuse("model", f"is not served; served: {model_name}", Reason.MODEL_NOT_FOUND)


def _refuse(field: str, rule: str, reason: Reason | None = None) -> NoReturn:
    raise BadRequest.of([FieldViolation(field=field, description=rule)], reason)
