"""What a person reads of an answer: spaces, special tokens, stop strings; by real processes."""

import json
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.support.scripted_models import save_scripted_model
from tests.support.tiny_tokenizers import tiny_tokenizer
from tests.support.up_runs import Up, pdserve

TINY = tiny_tokenizer("fallback, stripped")
SMILE = [f"<0x{byte:02X}>" for byte in "🙂".encode()]
SPELT = ["▁world", "▁the", ",", *SMILE, "▁of", "<|im_end|>", "▁a", "</s>", "é"]
SCRIPT = [TINY.id_of(each) for each in SPELT]
FILES = {
    "tokenizer_config.json": {
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    }
}
A = TINY.id_of("a")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    model_dir = tmp_path_factory.mktemp("scripted") / "model"
    save_scripted_model(model_dir, SCRIPT, TINY.inner, FILES)
    coefficients = "coefficients={fixed_s: 0.001, prefill_token_s: 0.0001, decode_token_s: 0.001}"
    ports = ("--port", "0", "--internal-port", "0")
    run = Up("--model", str(model_dir), "--num-blocks", "64", "--set", coefficients, *ports)
    try:
        yield run
        code, errors = run.end(signal.SIGTERM)
        assert (code, run.left()) == (0, []), errors
    finally:
        run.kill_all()


def ask(cluster: Up, prompt: str, *options: str) -> dict[str, Any]:
    done = pdserve("generate", prompt, "--json", *options, cluster=cluster)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def from_ids(cluster: Up, *options: str) -> tuple[str, str, int]:
    """Text, reason and number of tokens of the answer that begins with the script."""
    answer = ask(cluster, str(A), "--token-ids", "-n", str(len(SCRIPT)), *options)
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(answer["tokens"])
    assert [token["id"] for token in answer["tokens"]] == SCRIPT[: len(answer["tokens"])]
    return answer["text"], answer["finish_reason"], usage["completion_tokens"]


TO_TURN_END = SPELT.index("<|im_end|>") + 1


def test_answer_ends_with_the_turn_of_the_chat_template(cluster: Up) -> None:
    assert from_ids(cluster) == (" world the,🙂 of", "stop", TO_TURN_END)


def test_answer_ends_with_the_eos_token_of_the_tokenizers_config(cluster: Up) -> None:
    after_turn = " ".join([str(A)] * (TO_TURN_END + 1))
    answer = ask(cluster, after_turn, "--token-ids", "-n", "6")
    assert (answer["text"], answer["finish_reason"]) == (" a", "stop")
    assert answer["usage"]["completion_tokens"] == 2


def test_ignored_end_tokens_are_left_out_of_the_text_and_counted(cluster: Up) -> None:
    answer = from_ids(cluster, "--ignore-eos")
    assert answer == (" world the,🙂 of aé", "length", len(SCRIPT))


def test_special_tokens_are_shown_if_they_are_not_skipped(cluster: Up) -> None:
    text, *_ = from_ids(cluster, "--ignore-eos", "--no-skip-special-tokens")
    assert text == " world the,🙂 of<|im_end|> a</s>é"
    assert from_ids(cluster, "--no-skip-special-tokens")[0] == " world the,🙂 of"


@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [
        ("<|im_end|>", " world the,🙂 of", TO_TURN_END),
        ("of<|im_end|>", " world the,🙂 ", TO_TURN_END),
        ("<|im_end|> a", " world the,🙂 of", TO_TURN_END + 1),
        ("</s>", " world the,🙂 of a", TO_TURN_END + 2),
        ("rld the", " wo", 2),
        (",🙂", " world the", 7),
        ("of a", " world the,🙂 ", TO_TURN_END + 1),
    ],
)
def test_stop_strings_are_found_in_text_and_special_tokens(
    cluster: Up, stop: str, text: str, num_tokens: int
) -> None:
    options = ("--ignore-eos", "--stop", stop)
    assert from_ids(cluster, *options) == (text, "stop", num_tokens)
    included = from_ids(cluster, *options, "--include-stop-str-in-output")
    assert included == (text + stop, "stop", num_tokens)


def test_end_token_is_shown_if_everything_is(cluster: Up) -> None:
    shown = from_ids(cluster, "--include-stop-str-in-output", "--no-skip-special-tokens")
    assert shown == (" world the,🙂 of<|im_end|>", "stop", TO_TURN_END)


def test_text_continues_its_prompt_with_a_space_as_it_streams(cluster: Up) -> None:
    prompt = "a" * (len(SCRIPT) - 1)  # with begin token and space the script begins after it
    answer = ask(cluster, prompt, "-n", "2")
    assert answer["usage"]["prompt_tokens"] == len(SCRIPT) + 1
    assert answer["text"] == " world the"
    streamed = pdserve("generate", prompt, "-n", "2", cluster=cluster)
    assert streamed.stdout.decode() == " world the\n"


@pytest.mark.parametrize(
    ("prompt", "options", "spelt"),
    [
        ("a", (), ["<s>", "▁", "a"]),
        ("a", ("--no-add-special-tokens",), ["▁", "a"]),
        ("<s>a", (), ["<s>", "▁", "a"]),
        ("<s>a", ("--no-add-special-tokens",), ["<s>", "▁", "a"]),
        ("<s><s>a", (), ["<s>", "<s>", "▁", "a"]),
    ],
)
def test_prompt_has_one_begin_token_unless_it_is_left_off(
    cluster: Up, prompt: str, options: Sequence[str], spelt: list[str]
) -> None:
    answer = ask(cluster, prompt, "-n", "1", "--ignore-eos", *options)
    assert answer["usage"]["prompt_tokens"] == len(spelt)
    assert answer["tokens"][0]["id"] == SCRIPT[len(spelt) - 1]
