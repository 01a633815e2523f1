"""What a person reads of an answer: spaces, special tokens, stop strings; by real processes."""

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from pdserve.client.inference import InferenceClient
from pdserve.client.values import Answer, Sampling
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


async def ask(
    cluster: Up, prompt: str | Sequence[int], sampling: Sampling, **options: Any
) -> Answer:
    async with InferenceClient(cluster.said["address"]) as client:
        return await client.complete(prompt, sampling, timeout_s=30, **options)


async def from_script(cluster: Up, **sampling: Any) -> tuple[str, str, int]:
    """Text, reason and number of tokens of the answer that begins with the script."""
    answer = await ask(cluster, [A], Sampling(max_tokens=len(SCRIPT), **sampling))
    usage = answer.finished.usage
    assert usage.completion_tokens == len(answer.tokens)
    assert [token.token_id for token in answer.tokens] == SCRIPT[: len(answer.tokens)]
    return answer.text, answer.finished.reason, usage.completion_tokens


TO_TURN_END = SPELT.index("<|im_end|>") + 1


async def test_answer_ends_with_the_turn_of_the_chat_template(cluster: Up) -> None:
    assert await from_script(cluster) == (" world the,🙂 of", "stop", TO_TURN_END)


async def test_answer_ends_with_the_eos_token_of_the_tokenizers_config(cluster: Up) -> None:
    answer = await ask(cluster, [A] * (TO_TURN_END + 1), Sampling(max_tokens=6))
    assert (answer.text, answer.finished.reason) == (" a", "stop")
    assert answer.finished.usage.completion_tokens == 2


async def test_ignored_end_tokens_are_left_out_of_the_text_and_counted(cluster: Up) -> None:
    answer = await from_script(cluster, ignore_eos=True)
    assert answer == (" world the,🙂 of aé", "length", len(SCRIPT))


async def test_special_tokens_are_shown_if_they_are_not_skipped(cluster: Up) -> None:
    text, *_ = await from_script(cluster, ignore_eos=True, skip_special_tokens=False)
    assert text == " world the,🙂 of<|im_end|> a</s>é"
    text, *_ = await from_script(cluster, skip_special_tokens=False)
    assert text == " world the,🙂 of"


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
async def test_stop_strings_are_found_in_text_and_special_tokens(
    cluster: Up, stop: str, text: str, num_tokens: int
) -> None:
    options = {"ignore_eos": True, "stop": (stop,)}
    assert await from_script(cluster, **options) == (text, "stop", num_tokens)
    included = await from_script(cluster, **options, include_stop_str_in_output=True)
    assert included == (text + stop, "stop", num_tokens)


async def test_end_token_is_shown_if_everything_is(cluster: Up) -> None:
    shown = await from_script(cluster, include_stop_str_in_output=True, skip_special_tokens=False)
    assert shown == (" world the,🙂 of<|im_end|>", "stop", TO_TURN_END)


@pytest.mark.parametrize(
    ("prompt", "adds", "spelt"),
    [
        ("a", None, ["<s>", "▁", "a"]),
        ("a", True, ["<s>", "▁", "a"]),
        ("a", False, ["▁", "a"]),
        ("<s>a", None, ["<s>", "▁", "a"]),
        ("<s>a", False, ["<s>", "▁", "a"]),
        ("<s><s>a", None, ["<s>", "<s>", "▁", "a"]),
    ],
)
async def test_prompt_has_one_begin_token_unless_it_is_left_off(
    cluster: Up, prompt: str, adds: bool | None, spelt: list[str]
) -> None:
    sampling = Sampling(max_tokens=1, ignore_eos=True)
    answer = await ask(cluster, prompt, sampling, add_special_tokens=adds)
    assert answer.finished.usage.prompt_tokens == len(spelt)
    assert answer.tokens[0].token_id == SCRIPT[len(spelt) - 1]


@pytest.mark.parametrize(
    ("options", "num_prompt", "text"),
    [
        ((), 3, ","),
        (("--no-add-special-tokens",), 2, " the"),
        (("--no-skip-special-tokens", "--ignore-eos", "-n", "8"), 3, ",🙂 of<|im_end|> a"),
        (("--stop", "<|im_end|>", "--include-stop-str-in-output"), 3, ",🙂 of<|im_end|>"),
    ],
)
def test_command_line_has_every_option(
    cluster: Up, options: Sequence[str], num_prompt: int, text: str
) -> None:
    given = ("-n", "9" if "--stop" in options else "1", *options)
    done = pdserve("generate", "a", *given, cluster=cluster)
    assert (done.returncode, done.stdout.decode()) == (0, f"{text}\n"), done.stderr
    assert f"\n{num_prompt} + " in f"\n{done.stderr.decode()}"
