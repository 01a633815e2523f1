"""End tokens that only the tokenizer's files name."""

import json
from pathlib import Path
from typing import Any

import pytest

from pdserve.domain.errors import LocalFault
from pdserve.engine.end_tokens import named_end_tokens

IDS = {"<s>": 10, "</s>": 11, "<|im_end|>": 12, "<|end|>": 13, "<|return|>": 14, "<pad>": 15}
CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def write(model_dir: Path, name: str, content: Any) -> None:
    path = model_dir / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    added = [{"id": token_id, "content": text, "special": True} for text, token_id in IDS.items()]
    vocab = {"a": 0, "<|eot_id|>": 1, "stop": 2}
    write(
        tmp_path,
        "tokenizer.json",
        {"added_tokens": added, "model": {"type": "BPE", "vocab": vocab}},
    )
    return tmp_path


def test_a_model_whose_files_name_nothing_more_has_nothing_more(model_dir: Path) -> None:
    assert named_end_tokens(model_dir, []) == ()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("token", ["</s>", {"__type": "AddedToken", "content": "</s>"}])
def test_eos_token_is_an_end_token_however_it_is_written(
    model_dir: Path, file: str, token: Any
) -> None:
    write(model_dir, file, {"eos_token": token, "bos_token": "<s>"})
    assert named_end_tokens(model_dir, []) == (11,)


def test_eos_token_may_be_a_word_of_the_vocabulary(model_dir: Path) -> None:
    write(model_dir, "tokenizer_config.json", {"eos_token": "stop"})
    assert named_end_tokens(model_dir, []) == (2,)
    pieces = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["stop", -1.0]]}
    write(model_dir, "tokenizer.json", {"added_tokens": [], "model": pieces})
    assert named_end_tokens(model_dir, []) == (1,)


@pytest.mark.parametrize("token", [None, "unknown", 7, {"content": 7}, ["</s>"]])
def test_eos_token_that_names_no_token_is_none(model_dir: Path, token: Any) -> None:
    write(model_dir, "tokenizer_config.json", {"eos_token": token})
    assert named_end_tokens(model_dir, []) == ()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"chat_template": CHATML}),
        ("tokenizer_config.json", {"chat_template": [{"name": "tool", "template": CHATML}]}),
        ("chat_template.json", {"chat_template": CHATML}),
        ("chat_template.jinja", CHATML),
        ("additional_chat_templates/tool.jinja", CHATML),
    ],
)
def test_the_end_of_a_turn_in_a_chat_template_is_an_end_token(
    model_dir: Path, file: str, content: Any
) -> None:
    write(model_dir, file, content)
    assert named_end_tokens(model_dir, []) == (12,)


@pytest.mark.parametrize(
    ("text", "is_end"),
    [
        *((text, True) for text in ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")),
        *((text, True) for text in ("<|end|>", "[|endofturn|]", "<|END_OF_TURN_TOKEN|>")),
        *((text, True) for text in ("<|eot|>", "<turn|>", "<end_of_utterance>", "<|call|>")),
        *((text, False) for text in ("<|im_start|>", "<|endofthought|>", "<|image_end|>")),
        *((text, False) for text in ("</think>", "<|tool_call_end|>", "<|user|>", "friend")),
    ],
)
def test_only_ends_of_a_turn_count_among_a_templates_tokens(
    tmp_path: Path, text: str, is_end: bool
) -> None:
    write(tmp_path, "tokenizer.json", {"added_tokens": [{"id": 5, "content": text}]})
    write(tmp_path, "chat_template.jinja", f"{{{{ m.content }}}}{text}")
    assert named_end_tokens(tmp_path, []) == ((5,) if is_end else ())


def test_a_marker_that_is_no_token_of_its_own_ends_nothing(model_dir: Path) -> None:
    write(model_dir, "chat_template.jinja", "{{ m.content }}<|eot_id|>")  # two letters or one word
    assert named_end_tokens(model_dir, []) == ()


def test_the_end_of_a_message_is_none_if_a_turn_ends_otherwise(model_dir: Path) -> None:
    write(model_dir, "chat_template.jinja", "{{ m.thinking }}<|end|>{{ m.content }}<|return|>")
    assert named_end_tokens(model_dir, []) == (14,)


def test_ids_of_the_config_count_if_they_are_added_tokens(model_dir: Path) -> None:
    assert named_end_tokens(model_dir, [2, 15, None, "11", 99]) == (15,)


@pytest.mark.parametrize(
    "content",
    [{}, {"added_tokens": 3, "model": 3}, {"added_tokens": [3, {"id": "x"}], "model": {}}],
)
def test_a_tokenizer_that_makes_no_sense_is_told_elsewhere(tmp_path: Path, content: Any) -> None:
    write(tmp_path, "tokenizer.json", content)
    write(tmp_path, "tokenizer_config.json", {"eos_token": "</s>"})
    assert named_end_tokens(tmp_path, [2]) == ()


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.json"]
)
def test_a_file_that_is_not_json_is_named(model_dir: Path, file: str) -> None:
    write(model_dir, file, "{")
    with pytest.raises(LocalFault, match=rf"{file} is not valid JSON"):
        named_end_tokens(model_dir, [])
