"""`pdserve generate`: text as it comes, then a picture of where the time went."""

import contextlib
import dataclasses
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.cli.plain_json import json_text
from pdserve.client.inference import InferenceClient
from pdserve.client.values import Chunk, Prompt, Sampling
from pdserve.domain.errors import LocalFault, PdserveError
from pdserve.domain.tokens import Finished, SampledToken

BAR_CHARS = 40
PHASE_LABELS = {
    "router_queue_s": "router queue",
    "reserve_s": "reserve blocks",
    "prefill_queue_s": "prefill queue",
    "prefill_s": "prefill",
    "handoff_wait_s": "handoff wait",
    "decode_queue_s": "decode queue",
    "decode_s": "decode",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What to ask and how to show the answer. `prompt` - reads standard input."""

    prompt: str
    sampling: Sampling
    model: str = ""
    slo_class: str = ""
    timeout_s: float | None = None
    is_token_ids: bool = False
    add_special_tokens: bool = True
    as_json: bool = False


async def answer(address: str, question: Question) -> None:
    """Ask, write the answer to stdout and its timeline to stderr. Raises `PdserveError`."""
    prompt = read_prompt(question)
    chunks: list[Chunk] = []
    async with InferenceClient(address) as client:
        stream = client.generate(
            prompt,
            question.sampling,
            model=question.model,
            slo_class=question.slo_class,
            timeout_s=question.timeout_s,
            add_special_tokens=question.add_special_tokens,
        )
        try:
            async with contextlib.aclosing(stream):
                async for chunk in stream:
                    chunks.append(chunk)
                    if not question.as_json:
                        _show(chunk, as_ids=question.is_token_ids)
        except PdserveError:
            if chunks and not question.as_json:
                sys.stdout.write("\n")  # the error starts on its own line
            raise
    finished = chunks[-1].finished
    assert finished is not None  # generate() ends with it, or raises
    tokens = [token for chunk in chunks for token in chunk.tokens]
    if question.as_json:
        print(answer_as_json(chunks, finished))
        return
    print(flush=True)
    if question.sampling.logprobs is not None:
        print(render_logprobs(tokens), file=sys.stderr)
    print(render_timeline(finished), file=sys.stderr)


def read_prompt(question: Question) -> Prompt:
    """The prompt as text or as token ids; raises `LocalFault` for bytes that are not UTF-8."""
    text = question.prompt
    if text == "-":
        if sys.stdin is None:
            raise LocalFault("standard input is closed: there is no prompt to read")
        text = _decode(sys.stdin.buffer.read(), "standard input")
    else:
        text = _decode(_as_bytes(text), "the prompt")
    if not question.is_token_ids:
        return text
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise LocalFault("--token-ids: expected whole numbers such as: 5 17 99") from None


def render_timeline(finished: Finished) -> str:
    """A heading and one bar for each phase that took time, placed where it happened."""
    timeline, usage = finished.timeline, finished.usage
    whole_s = timeline.total_s or sum(getattr(timeline, name) for name in PHASE_LABELS) or 1.0
    lines = [_heading(finished)]
    start_s = 0.0
    for name, label in PHASE_LABELS.items():
        phase_s: float = getattr(timeline, name)
        if phase_s > 0:
            lines.append(f"  {label:<15}{_ms(phase_s)}  {_bar(start_s, phase_s, whole_s)}")
        start_s += phase_s
    if timeline.transfer_s > 0:
        # The transfer ends where the wait for it ends.
        end_s = start_s - timeline.decode_s - timeline.decode_queue_s
        begin_s = max(0.0, end_s - timeline.transfer_s)
        bar = _bar(begin_s, timeline.transfer_s, whole_s, mark="░")
        lines.append(
            f"  {'(KV transfer':<15}{_ms(timeline.transfer_s)}  {bar}"
            f"  {timeline.transferred_bytes:,} bytes)"
        )
    if usage.cached_prompt_tokens:
        lines.append(
            f"  {usage.cached_prompt_tokens} of {usage.prompt_tokens} prompt tokens "
            "were in a prefix cache"
        )
    return "\n".join(lines)


def render_logprobs(tokens: list[SampledToken]) -> str:
    """One line for each token: its id, its log-probability, the likeliest others."""
    lines = ["  index      id  logprob  likeliest (id logprob)"]
    for index, token in enumerate(tokens):
        others = "  ".join(f"{other} {value:.3f}" for other, value in token.top_logprobs)
        logprob = f"{token.logprob:8.3f}" if token.logprob is not None else " " * 8
        lines.append(f"  {index:>5} {token.token_id:>7} {logprob}  {others}")
    return "\n".join(lines)


def _show(chunk: Chunk, *, as_ids: bool) -> None:
    ids = "".join(f"{token.token_id} " for token in chunk.tokens)
    text = ids if as_ids else chunk.text
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def printable(text: str) -> str:
    """`text` without what a terminal would obey: a model can write escape sequences too."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else f"\\x{ord(char):02x}"
        for char in text
    )


def _as_bytes(argument: str) -> bytes:
    try:
        return argument.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise LocalFault(f"the prompt is not Unicode text (character {error.start})") from None


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise LocalFault(f"{source} is not UTF-8 text (byte {error.start})") from None


def _heading(finished: Finished) -> str:
    timeline, usage = finished.timeline, finished.usage
    path = " -> ".join(filter(None, (timeline.prefill_worker, timeline.decode_worker)))
    parts = [
        f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, ended by {finished.reason}",
        f"first token {_ms(timeline.ttft_s).strip()}, all {_ms(timeline.total_s).strip()}",
        f"seed {usage.seed}",
    ]
    if path:
        parts.append(path)
    if timeline.attempts > 1:
        parts.append(f"{timeline.attempts} attempts")
    return "; ".join(parts)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:8.1f} ms"


def _bar(start_s: float, length_s: float, whole_s: float, mark: str = "█") -> str:
    begin = min(BAR_CHARS - 1, round(start_s / whole_s * BAR_CHARS))
    length = min(BAR_CHARS - begin, max(1, round(length_s / whole_s * BAR_CHARS)))
    return (" " * begin + mark * length).ljust(BAR_CHARS)


def answer_as_json(chunks: Sequence[Chunk], finished: Finished) -> str:
    """The whole answer in one line."""
    shown: list[dict[str, object]] = [
        {"id": token.token_id}
        if token.logprob is None
        else {"id": token.token_id, "logprob": token.logprob, "top": list(token.top_logprobs)}
        for chunk in chunks
        for token in chunk.tokens
    ]
    content = {
        "request_id": chunks[0].request_id,
        "text": "".join(chunk.text for chunk in chunks),
        "tokens": shown,
        "finish_reason": finished.reason,
        "usage": dataclasses.asdict(finished.usage),
        "timeline": dataclasses.asdict(finished.timeline),
    }
    return json_text(content)
