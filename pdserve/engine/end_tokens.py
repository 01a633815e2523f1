"""End tokens that the files beside a model's weights name by their text, not by an id."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pdserve.engine.json_files import read_json, read_json_if_there

_END_OF_TURN = re.compile(
    r"\W*(?:im_end|eot|eot_id|eom_id|end|return|call|(?:end_?of_?(?:turn|utterance)|turn_?end"
    r"|end_?turn|assistant_?end)(?:_token)?)\W*|<turn\|>",
    re.IGNORECASE,
)
"""What the end of a turn is called, as in <|im_end|>, <|eot_id|>, <end_of_turn>, [|endofturn|]."""


def named_end_tokens(model_dir: Path, configured: Iterable[object]) -> tuple[int, ...]:
    """End tokens beside those that the generation config decides on, in ascending order.

    They are the `eos_token` of tokenizer_config.json and special_tokens_map.json, and those of
    `configured` (ids from config.json) and of the chat template's ends of a turn that were added
    to the tokenizer as tokens of their own. So a default of config.json that is an ordinary word,
    or a marker that the tokenizer spells in letters, ends no answer.

    The template is only searched, never run. `LocalFault` for a file that is not valid JSON.
    """
    tokenizer = read_json(model_dir / "tokenizer.json")
    settings = read_json_if_there(model_dir / "tokenizer_config.json")
    added = _added_tokens(tokenizer)
    found = set(added.values()) & {each for each in configured if isinstance(each, int)}
    for source in (settings, read_json_if_there(model_dir / "special_tokens_map.json")):
        token_id = _token_id(tokenizer, added, _text_of(source.get("eos_token")))
        found |= set() if token_id is None else {token_id}
    templates = "\n".join(_templates(model_dir, settings))
    turn_ends = {
        text for text in added if text in templates and _END_OF_TURN.fullmatch(text) is not None
    }
    if "<|return|>" in turn_ends:
        turn_ends.discard("<|end|>")  # there it ends a message, and the answer goes on
    return tuple(sorted(found | {added[text] for text in turn_ends}))


def _added_tokens(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Ids by text; what makes no sense is left for `Tokenizer.load` to tell."""
    entries = tokenizer.get("added_tokens")
    pairs = [
        (entry.get("content"), entry.get("id"))
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
    ]
    return {text: id_ for text, id_ in pairs if isinstance(text, str) and isinstance(id_, int)}


def _token_id(
    tokenizer: Mapping[str, Any], added: Mapping[str, int], text: str | None
) -> int | None:
    """The id of a token by its text, in the added tokens or in the vocabulary of any model."""
    if text is None or text in added:
        return added.get(text or "")
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # a list of [text, score], as unigram models have
        vocab = {entry[0]: id_ for id_, entry in enumerate(vocab) if isinstance(entry, list)}
    token_id = vocab.get(text) if isinstance(vocab, dict) else None
    return token_id if isinstance(token_id, int) else None


def _text_of(token: object) -> str | None:
    """A token is written as its text, or as an object with its `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _templates(model_dir: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """Every chat template of the model, wherever releases of `transformers` have kept them."""
    for source in (settings, read_json_if_there(model_dir / "chat_template.json")):
        given = source.get("chat_template")
        for entry in given if isinstance(given, list) else [given]:
            text = entry.get("template") if isinstance(entry, dict) else entry
            yield text if isinstance(text, str) else ""
    paths = [model_dir / "chat_template.jinja"]
    for path in [*paths, *sorted((model_dir / "additional_chat_templates").glob("*.jinja"))]:
        if path.is_file():
            yield path.read_text(encoding="utf-8", errors="replace")
