"""What of a model's config may be overridden, and what is said of the rest."""

import json
from typing import Any

import pytest

from pdserve.config.base import parse_object
from pdserve.config.cluster import ClusterSettings, parse_cluster_settings
from pdserve.config.override import ROPE_TYPES, ModelOverride
from pdserve.config.processes import WorkerSettings
from pdserve.domain.errors import LocalFault

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1, 1.5],
    "long_factor": [2, 3],
    "original_max_position_embeddings": 64,
}


def parse(override: object) -> ModelOverride:
    settings = parse_cluster_settings({"override_config": override}, {}, source="c.yaml")
    assert settings.override_config is not None
    return settings.override_config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"hidden_size": 1}, "override_config.hidden_size: unknown field"),
        ({"rope_parameter": YARN}, "did you mean rope_parameters?"),
        ({"max_context_tokens": 0}, "max_context_tokens: Input should be greater"),
        ({"max_context_tokens": "512"}, "max_context_tokens: Input should be a valid integer"),
        ({"max_context_tokens": True}, "max_context_tokens: Input should be a valid integer"),
        ({"max_position_embeddings": 1.5}, "max_position_embeddings: "),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings: "),
        ({"rope_parameters": []}, "rope_parameters: "),
        ({"rope_parameters": {}}, "rope_type must be one of default, linear"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "got 'ntk'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type must be one of"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn needs factor, original_max_position"),
        ({"rope_parameters": {**YARN, "short_factor": [1]}}, "yarn has no short_factor"),
        ({"rope_parameters": {**YARN, "factor": 0.5}}, "factor must be a number of at least 1"),
        ({"rope_parameters": {**YARN, "factor": "4"}}, "got '4'"),
        ({"rope_parameters": {**YARN, "factor": True}}, "factor must be a number"),
        ({"rope_parameters": {**YARN, "factor": None}}, "factor must be a number"),
        ({"rope_parameters": {**YARN, "factor": float("nan")}}, "factor"),
        ({"rope_parameters": {**YARN, "factor": float("inf")}}, "factor"),
        ({"rope_parameters": {**YARN, "factor": 10**400}}, "factor"),
        ({"rope_parameters": {**YARN, "attention_factor": 0}}, "attention_factor must be a number"),
        ({"rope_parameters": {**YARN, "truncate": 1}}, "truncate must be true or false"),
        ({"rope_parameters": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast must be above"),
        ({"rope_parameters": {**YARN, "type": "yarn"}}, "old name of rope_type"),
        ({"rope_parameters": {**YARN, "partial_rotary_factor": 2}}, "above 0, at most 1"),
        (
            {"rope_parameters": {**YARN, "original_max_position_embeddings": 64.0}},
            "must be a whole number",
        ),
        ({"rope_parameters": {**LONGROPE, "long_factor": [2]}}, "must be of one length"),
        ({"rope_parameters": {**LONGROPE, "long_factor": [2, 0]}}, "list of numbers above 0"),
        ({"rope_parameters": {"full_attention": {"rope_type": "x"}}}, "full_attention: rope_type"),
        ({"rope_parameters": YARN, "rope_scaling": YARN}, "rope_scaling: unknown field"),
    ],
)
def test_what_cannot_be_overridden_is_named(override: object, said: str) -> None:
    with pytest.raises(LocalFault) as caught:
        parse(override)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_old_names_of_configs_are_understood(name: str) -> None:
    given = {**YARN, "type": YARN["rope_type"]}
    del given["rope_type"]
    assert parse({name: given}) == ModelOverride(rope_parameters=YARN)


@pytest.mark.parametrize("rope", [YARN, LONGROPE, {"full_attention": YARN}])
def test_override_reaches_workers_through_their_settings(rope: dict[str, Any]) -> None:
    cluster = ClusterSettings.model_validate({"override_config": {"rope_parameters": rope}})
    workers = cluster.worker_settings("127.0.0.1:1")
    assert len(workers) == 2
    for worker in workers:
        assert worker.engine.override_config == ModelOverride(rope_parameters=rope)
        read = WorkerSettings.model_validate(json.loads(worker.model_dump_json()))
        assert read == worker


def test_each_rope_type_of_the_library_can_be_given() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_TYPES) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("text", ["3", "[1]", "{", "", "max_context_tokens"])
def test_option_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(LocalFault, match=r"--override-config.*expected an object"):
        parse_object("--override-config", text)


def test_option_takes_json_and_yaml() -> None:
    assert parse_object("-o", '{"a": 1}') == parse_object("-o", "a: 1") == {"a": 1}
    assert parse_object("-o", None) is None
