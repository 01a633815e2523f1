"""What an override makes of a model's config: its hash, its context, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pdserve.config.override import ModelOverride
from pdserve.domain.errors import LocalFault
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.model_override import with_override
from pdserve.engine.paged_model import load_model
from pdserve.models import DEMO_MODEL_DIR
from tests.support.tiny_models import save_tiny_model

CONTEXT = ModelFiles.open("demo").max_context_tokens
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}


def demo(**override: Any) -> ModelFiles:
    return ModelFiles.open("demo", ModelOverride(**override))


def test_overrides_tell_models_apart() -> None:
    hashes = {
        ModelFiles.open("demo").model_hash,
        demo(max_context_tokens=64).model_hash,
        demo(max_context_tokens=65).model_hash,
        demo(rope_parameters=YARN).model_hash,
        demo(rope_parameters={**YARN, "factor": 2.0}).model_hash,
    }
    assert len(hashes) == 5
    assert demo().model_hash == ModelFiles.open("demo").model_hash


def test_context_is_shortened() -> None:
    assert demo(max_context_tokens=64).max_context_tokens == 64
    assert demo(max_context_tokens=64).config == ModelFiles.open("demo").config
    assert demo(max_position_embeddings=64).max_context_tokens == 64
    assert demo(max_position_embeddings=64, max_context_tokens=32).max_context_tokens == 32


@pytest.mark.parametrize("field", ["max_context_tokens", "max_position_embeddings"])
@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, CONTEXT),
        ({"rope_type": "default"}, CONTEXT),
        ({"rope_type": "dynamic", "factor": 4.0}, CONTEXT),
        ({"rope_type": "linear", "factor": 3.0}, 3 * CONTEXT),
        (YARN, 4 * CONTEXT),
        ({**YARN, "factor": 1.0}, CONTEXT),
        ({**YARN, "original_max_position_embeddings": 8}, CONTEXT),
    ],
)
def test_context_grows_as_far_as_rope_scaling_stretches_it(
    field: str, rope: dict[str, Any] | None, limit: int
) -> None:
    override: dict[str, Any] = {"rope_parameters": rope} if rope else {}
    assert demo(**override, **{field: limit}).max_context_tokens == limit
    with pytest.raises(LocalFault, match=rf"override_config\.{field}: must be at most {limit}: .*"):
        demo(**override, **{field: limit + 1})


def test_scaling_that_the_config_counts_already_is_not_counted_twice() -> None:
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    config = {"max_position_embeddings": 400, "rope_parameters": scaled}
    with pytest.raises(LocalFault, match="at most 400"):
        with_override(config, ModelOverride(max_position_embeddings=401))


def test_what_is_not_given_stays_the_models_own() -> None:
    config = {
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e5,
            "partial_rotary_factor": 0.5,
        },
    }
    changed = with_override(config, ModelOverride(rope_parameters={**YARN, "rope_theta": 7.0}))
    assert changed["rope_parameters"] == {**YARN, "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    assert config["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.5,
    }


def test_old_and_inner_configs_are_changed_where_they_have_it() -> None:
    old = {"max_position_embeddings": 64, "rope_theta": 5e5, "rope_scaling": None}
    changed = with_override({"text_config": old}, ModelOverride(rope_parameters=YARN))
    assert changed["text_config"]["rope_scaling"] == YARN
    assert changed["text_config"]["rope_theta"] == 5e5


def test_layer_types_are_given_as_the_model_has_them() -> None:
    by_type = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {},
    }
    config = {"max_position_embeddings": 64, "rope_parameters": by_type}
    linear = {"rope_type": "linear", "factor": 2.0}
    changed = with_override(
        config, ModelOverride(rope_parameters={"full_attention": linear}, max_context_tokens=128)
    )
    assert changed["rope_parameters"] == {
        "full_attention": {**linear, "rope_theta": 1e6},
        "sliding_attention": {},
    }
    with pytest.raises(LocalFault, match="is by layer type in this model: give it for full_att"):
        with_override(config, ModelOverride(rope_parameters=linear))
    with pytest.raises(LocalFault, match="no layer type other here; there are: full_attention"):
        with_override(config, ModelOverride(rope_parameters={"other": linear}))


def test_learned_positions_cannot_be_stretched(tmp_path: Path) -> None:
    save_tiny_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(LocalFault, match="learned its positions one by one"):
        ModelFiles.open(tmp_path / "gpt2", ModelOverride(max_position_embeddings=16))
    assert ModelFiles.open(tmp_path / "gpt2", ModelOverride(max_context_tokens=16))


def test_model_that_would_ignore_rope_parameters_is_refused(tmp_path: Path) -> None:
    save_tiny_model("opt", tmp_path / "opt")
    files = ModelFiles.open(tmp_path / "opt", ModelOverride(rope_parameters=YARN))
    with pytest.raises(LocalFault, match="model type opt does not use them"):
        load_model(files, "float32")


def test_the_library_is_told_the_override() -> None:
    model = load_model(demo(rope_parameters=YARN, max_position_embeddings=2 * CONTEXT), "float32")
    assert model.config.max_position_embeddings == 2 * CONTEXT
    assert model.model.rotary_emb.rope_type == "yarn"
    assert model.config.rope_parameters["rope_theta"] == 10_000.0


def test_factors_of_a_wrong_number_are_refused(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(DEMO_MODEL_DIR, model_dir)
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0],
        "long_factor": [2.0],
        "original_max_position_embeddings": 64,
    }
    files = ModelFiles.open(model_dir, ModelOverride(rope_parameters=rope))
    with pytest.raises(LocalFault, match="short_factor"):
        load_model(files, "float32")
    assert json.loads((model_dir / "config.json").read_text())
