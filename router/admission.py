"""Hard limits, before any work: what is refused here has cost nothing and started nothing."""

from dataclasses import dataclass
from typing import NoReturn

from pdserve.domain.errors import BadRequest, FieldViolation, Reason
from pdserve.domain.sampling import SamplingParams, check_sampling
from router.requests import GenerateCall

MAX_LABEL_CHARS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model behind this router, as its workers describe it."""

    name: str
    max_context_tokens: int  # of one request, prompt and answer together
    max_kv_tokens: int  # what the largest decode worker can hold at all
    vocab_size: int


def check_call(call: GenerateCall, model: ServedModel, *, max_prompt_chars: int) -> None:
    """Raise `BadRequest` for whatever can be known before the prompt is tokenised."""
    _check_model_name(call.model, model)
    check_sampling(call.sampling, vocab_size=model.vocab_size)
    _check_prompt(call, model, max_prompt_chars)


def check_label(label: str) -> None:
    """Raise `BadRequest` unless the request id is safe in logs and headers."""
    if len(label) > MAX_LABEL_CHARS:
        _refuse("request_id", f"must have at most {MAX_LABEL_CHARS} characters; got {len(label)}")
    if not is_safe_label(label):
        _refuse("request_id", "must be printable ASCII without spaces")


def is_safe_label(label: str) -> bool:
    return len(label) <= MAX_LABEL_CHARS and all("!" <= character <= "~" for character in label)


def check_token_ids(
    token_ids: tuple[int, ...], sampling: SamplingParams, model: ServedModel, *, field: str
) -> None:
    """Raise `BadRequest` unless the whole answer fits the context and the KV memory.

    `field` is the one that held the prompt.
    """
    num_prompt, max_tokens = len(token_ids), sampling.max_tokens
    if num_prompt == 0:
        _refuse(field, "must hold at least 1 token; got 0")
    for limit, what in (
        (model.max_context_tokens, "the model's context"),
        (model.max_kv_tokens, "the KV memory of a worker"),
    ):
        total = num_prompt + max_tokens
        if num_prompt >= limit:
            rule = f"must leave room for an answer in {what} of {limit} tokens; got {num_prompt}"
            _refuse(field, rule, Reason.CONTEXT_TOO_LONG)
        if total > limit:
            rule = (
                f"prompt ({num_prompt} tokens) and max_tokens ({max_tokens}) "
                f"must fit {what} of {limit} tokens; got {total}"
            )
            _refuse("sampling.max_tokens", rule, Reason.CONTEXT_TOO_LONG)
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < model.vocab_size:
            rule = f"must be below the vocabulary size ({model.vocab_size}); got {token_id}"
            _refuse(f"{field}[{index}]", rule)


def _check_model_name(name: str, model: ServedModel) -> None:
    if name not in ("", model.name):
        # The name asked for is the client's text: it is not repeated.
        _refuse("model", f"is not served; served: {model.name}", Reason.MODEL_NOT_FOUND)


def _check_prompt(call: GenerateCall, model: ServedModel, max_prompt_chars: int) -> None:
    if not isinstance(call.prompt, str):
        check_token_ids(call.prompt, call.sampling, model, field="token_ids")
    elif not call.prompt:
        _refuse("text", "must hold at least 1 character; got 0")
    elif len(call.prompt) > max_prompt_chars:
        rule = f"must have at most {max_prompt_chars} characters; got {len(call.prompt)}"
        _refuse("text", rule)


def _refuse(field: str, rule: str, reason: Reason | None = None) -> NoReturn:
    raise BadRequest.of([FieldViolation(field=field, description=rule)], reason)
