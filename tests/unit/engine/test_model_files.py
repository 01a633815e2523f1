import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdserve.domain.errors import LocalFault
from pdserve.engine.model_files import ModelFiles, resolve_model_dir
from pdserve.models import DEMO_DRAFT_MODEL_DIR, DEMO_MODEL_DIR


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    shutil.copytree(DEMO_MODEL_DIR, tmp_path / "model")
    return tmp_path / "model"


def edit_config(model_dir: Path, **changes: Any) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config.update(changes)
    (model_dir / "config.json").write_text(json.dumps(config))


def end_by_config(model_dir: Path, token_id: int) -> None:
    (model_dir / "generation_config.json").write_text("{}")
    edit_config(model_dir, eos_token_id=token_id)


def cut_weights(model_dir: Path) -> None:
    content = (model_dir / "model.safetensors").read_bytes()
    (model_dir / "model.safetensors").write_bytes(content[:-1])


def replace_by_pickle(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")


def test_packaged_model_says_what_it_is() -> None:
    files = ModelFiles.open("demo")
    assert files.name == "demo"
    assert files.model_type == "llama"
    assert files.max_context_tokens == files.config["max_position_embeddings"]
    assert files.vocab_size == files.config["vocab_size"]
    assert files.eos_token_ids == (1,)
    assert len(files.model_hash) == 16


def test_packaged_names_and_paths_resolve(model_dir: Path) -> None:
    assert resolve_model_dir("demo") == DEMO_MODEL_DIR
    assert resolve_model_dir("demo-draft") == DEMO_DRAFT_MODEL_DIR
    assert resolve_model_dir(str(model_dir)) == model_dir
    assert ModelFiles.open(model_dir).name == "model"


def test_hash_tells_weights_and_configs_apart_but_not_copies(model_dir: Path) -> None:
    demo = ModelFiles.open("demo").model_hash
    assert ModelFiles.open(model_dir).model_hash == demo
    content = bytearray((model_dir / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model_dir / "model.safetensors").write_bytes(content)
    assert ModelFiles.open(model_dir).model_hash != demo
    edit_config(model_dir, rms_norm_eps=1e-3)
    assert len({demo, ModelFiles.open(model_dir).model_hash}) == 2


def test_generation_config_decides_the_end_tokens(model_dir: Path) -> None:
    (model_dir / "tokenizer_config.json").unlink()
    edit_config(model_dir, eos_token_id=5)  # an ordinary word
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert ModelFiles.open(model_dir).eos_token_ids == (7, 9)
    (model_dir / "generation_config.json").unlink()
    assert ModelFiles.open(model_dir).eos_token_ids == (5,)


def test_end_tokens_that_only_the_tokenizers_files_name_are_added(model_dir: Path) -> None:
    (model_dir / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert ModelFiles.open(model_dir).eos_token_ids == (7, 1)  # config and tokenizer name 1
    edit_config(model_dir, eos_token_id=None)
    assert ModelFiles.open(model_dir).eos_token_ids == (7, 1)  # the tokenizer does
    (model_dir / "generation_config.json").write_text('{"eos_token_id": 0}')
    edit_config(model_dir, vocab_size=1)
    assert ModelFiles.open(model_dir).eos_token_ids == (0,)  # 1 is no token that the model can draw


def test_index_names_the_weight_files(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "part-1.safetensors")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-1.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in ModelFiles.open(model_dir).weights] == ["part-1.safetensors"]


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"cannot read .*config\.json"),
    "bad JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "not an object": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object"),
    "no type": (lambda d: edit_config(d, model_type=None), "names no model_type"),
    "encoder-decoder": (
        lambda d: edit_config(d, model_type="t5", is_encoder_decoder=True),
        "t5 is an encoder-decoder",
    ),
    "encoder": (
        lambda d: edit_config(d, model_type="bert", architectures=["BertForMaskedLM"]),
        r"bert \(BertForMaskedLM\) does not generate text",
    ),
    "own attention": (lambda d: edit_config(d, model_type="bloom"), "bloom is not supported: "),
    "own state": (lambda d: edit_config(d, model_type="mamba"), "state outside the KV cache"),
    "no context": (lambda d: edit_config(d, max_position_embeddings=None), "no context limit"),
    "no vocabulary": (
        lambda d: edit_config(d, vocab_size=0),
        r"config\.json: vocab_size must be a whole number above 0; got 0",
    ),
    "context as text": (
        lambda d: edit_config(d, max_position_embeddings="512"),
        "max_position_embeddings must be a whole number above 0; got '512'",
    ),
    "negative heads": (
        lambda d: edit_config(d, num_attention_heads=-8),
        "num_attention_heads must be a whole number above 0; got -8",
    ),
    "NaN for eps": (
        lambda d: edit_config(d, rms_norm_eps=float("nan")),
        "rms_norm_eps must be a finite number above 0; got nan",
    ),
    "infinite rope": (
        lambda d: edit_config(d, rope_theta=float("inf")),
        "rope_theta must be a finite number above 0; got inf",
    ),
    "rope factor": (
        lambda d: edit_config(d, rope_scaling={"rope_type": "linear", "factor": 0}),
        r"rope_scaling\.factor must be a finite number above 0; got 0",
    ),
    "one of many rope factors": (
        lambda d: edit_config(d, rope_parameters={"full": {"long_factor": [1.0, -2.0]}}),
        r"rope_parameters\.full\.long_factor must be a finite number above 0; got -2\.0",
    ),
    "soft cap": (
        lambda d: edit_config(d, final_logit_softcapping="30"),
        "final_logit_softcapping must be a finite number; got '30'",
    ),
    "end token beyond": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": [1, 5000000]}'),
        r"generation_config\.json: eos_token_id must be a token id from 0 to \d+; got 5000000",
    ),
    "end token below": (
        lambda d: end_by_config(d, -1),
        r"/config\.json: eos_token_id must be a token id from 0 to \d+; got -1",
    ),
    "end token of no kind": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": "2"}'),
        "eos_token_id must be a token id from 0 to .* got '2'",
    ),
    "end token true": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": true}'),
        "eos_token_id must be a token id .* got True",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"has no model\.safetensors$"),
    "pickle": (replace_by_pickle, "pickled weights only, and those can run code"),
    "cut weights": (cut_weights, "cut short"),
    "not weights": (
        lambda d: (d / "model.safetensors").write_bytes(b"\x08" + bytes(30)),
        "not a safetensors file",
    ),
    "missing part": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}'),
        "cannot read .*b: No such file",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(model_dir: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    spoil(model_dir)
    with pytest.raises(LocalFault, match=message):
        ModelFiles.open(model_dir)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "t5 is an encoder-decoder"),
        ({"model_type": "bert", "is_decoder": False}, "bert is an encoder; it does not generate"),
        ({"model_type": "roberta", "architectures": None}, "roberta is an encoder"),
        ({"model_type": "t5", "architectures": ["T5EncoderModel"]}, "t5 is an encoder-decoder"),
    ],
)
def test_wrong_kind_of_model_is_named_before_files_that_are_missing(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LocalFault, match=message):
        ModelFiles.open(tmp_path)


def test_unknown_directory_lists_the_packaged_models() -> None:
    with pytest.raises(LocalFault, match=r"no model directory at .*\(packaged models: demo"):
        ModelFiles.open("no-such-model")
