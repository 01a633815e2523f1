"""Sizes of known models, by hand and against published counts."""

import json
from pathlib import Path

import pytest

from pdserve.domain.errors import LocalFault
from placement.model_config import catalogue, load_model, parse_config, with_quantisation
from placement.model_spec import Parallelism

PUBLISHED_BILLIONS = {
    "facebook/opt-13b": 12.85,
    "facebook/opt-66b": 65.7,
    "bigscience/bloom": 176.25,
    "meta-llama/Llama-2-70b-hf": 68.98,
    "meta-llama/Llama-3.1-8B": 8.03,
    "meta-llama/Llama-3.1-70B": 70.55,
    "meta-llama/Llama-3.1-405B": 405.9,
    "mistralai/Mistral-7B-v0.1": 7.24,
    "mistralai/Mixtral-8x7B-v0.1": 46.7,
    "Qwen/Qwen2.5-72B": 72.7,
    "Qwen/Qwen3-32B": 32.76,
    "Qwen/Qwen3-30B-A3B": 30.5,
    "Qwen/Qwen3-235B-A22B": 235.1,
    "deepseek-ai/DeepSeek-V3": 671.0,
    "deepseek-ai/DeepSeek-V2-Lite": 15.7,
    "openai/gpt-oss-120b": 116.8,
    "openai/gpt-oss-20b": 20.9,
}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED_BILLIONS.items())
def test_parameter_counts_agree_with_the_published_within_one_percent(
    name: str, billions: float
) -> None:
    assert load_model(name).num_params == pytest.approx(billions * 1e9, rel=0.01)


def test_every_catalogue_entry_parses_and_states_its_source() -> None:
    for name, listed in catalogue().items():
        assert load_model(name).num_params > 1e8
        assert "alias" in listed or listed["source"]


def test_kv_of_llama_70b_is_320_kib_a_token() -> None:
    llama = load_model("meta-llama/Llama-3.1-70B")
    assert llama.kv_bytes_per_token() == 2 * 8 * 128 * 80 * 2 == 327_680
    assert llama.kv_bytes(4000) == 4000 * 327_680
    assert with_quantisation(llama, weights="fp8", kv="fp8").kv_bytes_per_token() == 163_840


def test_kv_heads_are_split_over_ranks_and_repeated_when_too_few() -> None:
    llama = load_model("meta-llama/Llama-3.1-70B")
    assert llama.kv_bytes_per_gpu_token(Parallelism(tp=8)) == 2 * 128 * 2 * 80
    assert llama.kv_bytes_per_gpu_token(Parallelism(tp=16)) == 2 * 128 * 2 * 80
    assert llama.kv_bytes_per_gpu_token(Parallelism(tp=8, pp=4)) == 2 * 128 * 2 * 20


def test_latent_attention_keeps_576_values_a_token_on_every_rank() -> None:
    deepseek = load_model("deepseek-ai/DeepSeek-R1")
    assert deepseek.kv_bytes_per_token() == 576 * 2 * 61
    assert deepseek.kv_bytes_per_gpu_token(Parallelism(tp=8)) == 576 * 2 * 61


def test_sliding_layers_stop_growing_at_their_window() -> None:
    gpt_oss = load_model("openai/gpt-oss-120b")
    per_layer = 2 * 8 * 64 * 2
    assert gpt_oss.num_sliding_layers == 18
    assert gpt_oss.kv_bytes(100) == per_layer * 36 * 100
    assert gpt_oss.kv_bytes(10_000) == per_layer * (18 * 10_000 + 18 * 128)


def test_linear_attention_layers_hold_a_constant_state() -> None:
    qwen = load_model("Qwen/Qwen3.5-397B-A17B")
    state = 4 * 64 * 128 * 128 * 45
    assert qwen.kv_bytes(1000) == 15 * 2 * 2 * 256 * 2 * 1000 + state


def test_weights_divide_over_ranks_and_stages() -> None:
    llama = load_model("meta-llama/Llama-3.1-70B")
    whole = llama.weight_bytes()
    assert whole == pytest.approx(2 * llama.num_params)
    assert llama.weight_bytes(Parallelism(tp=4)) == pytest.approx(whole / 4, rel=1e-3)
    half = llama.weight_bytes(Parallelism(pp=2))
    assert whole / 2 <= half < 0.51 * whole


def test_opt_13b_weighs_on_one_a100_what_distserve_counts() -> None:
    opt = load_model("facebook/opt-13b")
    hidden, layers = 5120, 40
    counted = 2 * (50272 * hidden + 2048 * hidden + 12 * layers * hidden**2 + 5 * layers * hidden)
    assert opt.weight_bytes() == pytest.approx(counted, rel=2e-3)


def test_fp8_halves_and_int4_quarters_the_matrices() -> None:
    llama = load_model("meta-llama/Llama-3.1-70B")
    matrices = 2 * (llama.num_params - llama.embedding_params - llama.lm_head_params)
    saved = llama.weight_bytes() - with_quantisation(llama, weights="fp8").weight_bytes()
    assert saved == pytest.approx(matrices / 2, rel=0.01)
    saved = llama.weight_bytes() - with_quantisation(llama, weights="int4").weight_bytes()
    assert saved == pytest.approx(matrices * 0.74, rel=0.01)


def test_experts_are_spread_over_all_gpus_of_a_stage() -> None:
    mixtral = load_model("mistralai/Mixtral-8x7B-v0.1")
    alone = mixtral.weight_bytes()
    spread = mixtral.weight_bytes(Parallelism(tp=1, ep=8, attention_dp=8))
    experts = 2 * 8 * mixtral.expert_params * 32
    assert alone - spread == pytest.approx(experts * 7 / 8, rel=1e-6)


def test_attention_of_a_dense_model_is_four_flops_a_dimension() -> None:
    llama = load_model("meta-llama/Llama-3.1-8B")
    assert llama.attention_flops_per_pair() == 4 * 32 * 128 * 32


def test_config_file_or_directory_is_read(tmp_path: Path) -> None:
    config = dict(catalogue()["Qwen/Qwen3-32B"]["config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path).num_params == load_model("qwen3-32b").num_params


def test_missing_fields_are_named() -> None:
    with pytest.raises(
        LocalFault, match=r"here: num_attention_heads \(or n_head, n_heads\) is mis"
    ):
        parse_config({"hidden_size": 64, "num_hidden_layers": 2}, name="x", source="here")
    with pytest.raises(LocalFault, match="hidden_size must be a whole number, got '64'"):
        parse_config({"hidden_size": "64", "num_hidden_layers": 2}, name="x", source="here")


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(LocalFault, match=r"meta-llama/Llama-3\.1-70B"):
        load_model("llama-3.1-71b")


def test_quantisation_configs_are_understood() -> None:
    base = dict(catalogue()["meta-llama/Llama-3.1-8B"]["config"])
    for method, bits, linear in (("awq", 4, 0.52), ("gptq", 8, 1.02), ("fp8", None, 1.0)):
        quant = {"quant_method": method, "bits": bits}
        spec = parse_config({**base, "quantization_config": quant}, name="x", source="x")
        assert spec.precision.linear_bytes == pytest.approx(linear, rel=0.01)
    with pytest.raises(LocalFault, match="'quip'"):
        parse_config(
            {**base, "quantization_config": {"quant_method": "quip"}}, name="x", source="x"
        )


def test_impossible_cuts_say_why() -> None:
    llama = load_model("meta-llama/Llama-3.1-8B")
    assert llama.fits(Parallelism(tp=8)) is None
    assert "TP 3" in (llama.fits(Parallelism(tp=3)) or "")
    assert "experts" in (llama.fits(Parallelism(ep=2)) or "")
