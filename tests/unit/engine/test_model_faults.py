"""Each thing that people have in place of a model that can be served is told as what it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.deployment import deployment_of_cluster
from deploy.preflight import check_deployment
from pdserve.config.cluster import ClusterSettings
from pdserve.domain.errors import LocalFault
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.paged_model import load_model
from pdserve.engine.tokenizer import Tokenizer
from pdserve.models import DEMO_MODEL_DIR

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 6693368\n"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    shutil.copytree(DEMO_MODEL_DIR, tmp_path / "model")
    return tmp_path / "model"


def edit_config(model_dir: Path, **changes: Any) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config.update(changes)
    (model_dir / "config.json").write_text(json.dumps(config))


def edit_weights(model_dir: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def only(model_dir: Path, *names: str, **contents: str) -> None:
    """Leave nothing but files of these names."""
    for path in model_dir.iterdir():
        path.unlink()
    for name, content in {**dict.fromkeys(names, "{}"), **contents}.items():
        (model_dir / name).write_text(content)


def without_weights(model_dir: Path, *names: str) -> None:
    (model_dir / "model.safetensors").unlink()
    for name in names:
        (model_dir / name).write_bytes(b"\x00")


def index_of(model_dir: Path, *shards: str) -> None:
    weight_map = {f"w{number}": shard for number, shard in enumerate(shards)}
    index = json.dumps({"weight_map": weight_map})
    (model_dir / "model.safetensors.index.json").write_text(index)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_git_lfs_pointer_is_told_with_what_to_do(model_dir: Path, name: str) -> None:
    (model_dir / name).write_text(POINTER)
    with pytest.raises(LocalFault, match=f"{name} is a git-lfs pointer.*run `git lfs pull`"):
        ModelFiles.open(model_dir)


def test_pointers_in_place_of_shards_are_counted(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    shards = [f"model-{number}.safetensors" for number in range(5)]
    for shard in shards:
        (model_dir / shard).write_text(POINTER)
    index_of(model_dir, *shards)
    with pytest.raises(LocalFault, match="and 2 more are git-lfs pointers"):
        ModelFiles.open(model_dir)


def test_router_alone_tells_a_pointer_of_a_tokenizer(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").write_text(POINTER)
    with pytest.raises(LocalFault, match=r"tokenizer\.json is a git-lfs pointer"):
        Tokenizer.load(model_dir)


WRONG_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda d: only(d), r"config\.json: .*the directory is empty"),
    "GGUF": (lambda d: only(d, "m.gguf"), "GGUF files, which are llama.cpp's"),
    "GGUF beside a config": (lambda d: without_weights(d, "m.gguf"), "has GGUF files"),
    "diffusers": (lambda d: only(d, "model_index.json"), "diffusers pipeline"),
    "maker's format": (lambda d: only(d, "params.json"), "its maker's own format"),
    "something else": (
        lambda d: only(d, "a.txt", "b", "c", "d"),
        r"it holds a\.txt, b, c and 1 mo",
    ),
    "pickle": (lambda d: without_weights(d, "pytorch_model.bin"), "pickled weights only"),
    "TensorFlow": (lambda d: without_weights(d, "tf_model.h5"), "TensorFlow's weights"),
    "Flax": (lambda d: without_weights(d, "flax_model.msgpack"), "Flax's weights"),
    "ONNX": (lambda d: without_weights(d, "model.onnx"), "ONNX files"),
    "consolidated": (
        lambda d: without_weights(d, "consolidated.safetensors"),
        "the maker's own format",
    ),
    "shards without index": (
        lambda d: (d / "model.safetensors").rename(d / "model-00001-of-00002.safetensors"),
        r"it has model-00001.*but no model\.safetensors\.index\.json",
    ),
    "adapter": (
        lambda d: only(d, **{"adapter_config.json": '{"base_model_name_or_path": "org/base"}'}),
        r"an adapter of org/base \(adapter_config\.json\).*merge it",
    ),
    "adapter beside a model": (
        lambda d: (d / "adapter_config.json").write_text("{}"),
        "holds an adapter .*merge it",
    ),
    "missing shards": (
        lambda d: index_of(d, "model.safetensors", "b.safetensors", "c.safetensors"),
        "cannot read .*b.safetensors: .*names 3 files, of which 2 are missing",
    ),
    "shard elsewhere": (
        lambda d: index_of(d, "../other.safetensors"),
        r"names a file outside its directory: \.\./other",
    ),
    "index of nothing": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": []}'),
        "has no weight_map",
    ),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_wrong_files_are_told_as_what_they_are(model_dir: Path, kind: str) -> None:
    spoil, said = WRONG_FILES[kind]
    spoil(model_dir)
    with pytest.raises(LocalFault, match=said) as caught:
        ModelFiles.open(model_dir)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", "it is a file; give the directory"),
        ("model.gguf", "llama.cpp's format"),
    ],
)
def test_path_of_a_file_is_told(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(LocalFault, match=said):
        ModelFiles.open(tmp_path / name)


def test_name_of_the_hub_is_told_that_nothing_is_downloaded() -> None:
    with pytest.raises(LocalFault, match="nothing is downloaded here"):
        ModelFiles.open("meta-llama/Llama-3.1-8B")


QUANTISED: dict[str, tuple[Callable[[Path], object], str]] = {
    "awq": (
        lambda d: edit_config(d, quantization_config={"quant_method": "awq", "bits": 4}),
        "awq, 4 bits",
    ),
    "gptq": (
        lambda d: edit_config(d, quantization_config={"quant_method": "gptq", "bits": 8}),
        "gptq, 8 bits",
    ),
    "fp8": (lambda d: edit_config(d, quantization_config={"quant_method": "fp8"}), "fp8"),
    "mxfp4": (lambda d: edit_config(d, quantization_config={"quant_method": "mxfp4"}), "mxfp4"),
    "bitsandbytes": (
        lambda d: edit_config(d, quantization_config={"load_in_4bit": True}),
        "bitsandbytes, 4bit",
    ),
    "compressed-tensors": (
        lambda d: edit_config(d, quantization_config={"quant_method": "compressed-tensors"}),
        "compressed-tensors",
    ),
    "a new one": (
        lambda d: edit_config(d, quantization_config={"bits": 3}),
        "a method that its config does not name",
    ),
    "ModelOpt": (
        lambda d: (d / "hf_quant_config.json").write_text(
            '{"quantization": {"quant_algo": "NVFP4"}}'
        ),
        "NVFP4",
    ),
    "AutoGPTQ": (lambda d: (d / "quantize_config.json").write_text('{"bits": 4}'), "quantize_conf"),
    "only in the weights": (
        lambda d: edit_weights(
            d,
            lambda w: w.update(
                {
                    "model.layers.0.mlp.up_proj.weight": w["model.layers.0.mlp.up_proj.weight"].to(
                        torch.float8_e4m3fn
                    )
                }
            ),
        ),
        "up_proj.* is F8_E4M3",
    ),
    "packed weights": (
        lambda d: edit_weights(
            d, lambda w: w.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(2).int()})
        ),
        "qweight.* is I32",
    ),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_checkpoint_is_refused_by_its_method(model_dir: Path, kind: str) -> None:
    spoil, said = QUANTISED[kind]
    spoil(model_dir)
    with pytest.raises(LocalFault, match=rf"is quantised \(.*{said}.*use the checkpoint that it"):
        load_model(ModelFiles.open(model_dir), "float32")
    ports = {"router": {"port": 0, "internal_port": 0}, "model": str(model_dir)}
    with pytest.raises(LocalFault, match="is quantised"):
        check_deployment(deployment_of_cluster(ClusterSettings.model_validate(ports)))
    coefficients = {"fixed_s": 0.01, "prefill_token_s": 0.001, "decode_token_s": 0.001}
    timed = {**ports, "engine": "timed", "coefficients": coefficients}
    check_deployment(deployment_of_cluster(ClusterSettings.model_validate(timed)))


MISFITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown type": (
        lambda d: edit_config(d, model_type="nobodys"),
        r"cannot load .*model type nobodys\): transformers [\d.]+ does not know this type$",
    ),
    "own code": (
        lambda d: edit_config(d, model_type="nobodys", auto_map={"AutoConfig": "a.B"}),
        "code in its directory is never run",
    ),
    "no text alone": (
        lambda d: edit_config(d, model_type="clip", architectures=None),
        "no class that generates text from text alone",
    ),
    "config of another kind": (
        lambda d: edit_config(d, hidden_act=["many"]),
        r"config\.json does not fit this type",
    ),
    "shapes": (
        lambda d: edit_config(d, intermediate_size=100),
        r"mlp\.down_proj\.weight is 256 x 704 in the weights, and 256 x 100 by config\.json",
    ),
    "more layers than weights": (
        lambda d: edit_config(d, num_hidden_layers=6),
        r"lacks weights of the model: model\.layers\.4\..* and \d+ more",
    ),
    "weights of another type": (
        lambda d: edit_weights(
            d, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(256)})
        ),
        r"does not use: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_config_and_weights_that_do_not_fit_are_told_apart(model_dir: Path, kind: str) -> None:
    spoil, said = MISFITS[kind]
    spoil(model_dir)
    with pytest.raises(LocalFault, match=said):
        load_model(ModelFiles.open(model_dir), "float32")


def test_weights_of_parts_that_text_does_not_need_are_left_out(model_dir: Path) -> None:
    edit_weights(
        model_dir,
        lambda w: w.update(
            {
                "vision_tower.layers.0.weight": torch.zeros(2),
                "model.layers.9.mtp.weight": torch.zeros(2),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16),
            }
        ),
    )
    load_model(ModelFiles.open(model_dir), "float32")
