"""Projections of the same rows are one product on a device; results and memory stay."""

import gc

import pytest
import torch

from pdserve.engine.device.device_backend import bring_to, weight_bytes
from pdserve.engine.device.joined_weights import join_linears
from pdserve.engine.model_probe import plain_logits
from tests.support.sim_device import SIM, SimRuntime
from tests.support.tiny_models import SERVED, tiny_model

NOT_JOINED = {"gpt2", "gpt_bigcode", "gpt_neox", "persimmon", "phi3"}
"""Their files have these projections joined."""
TOKENS = torch.arange(3, 15)


@pytest.mark.parametrize("name", sorted(SERVED))
@torch.inference_mode()
def test_joined_products_give_the_same_logits(name: str) -> None:
    with SimRuntime() as runtime:
        model = bring_to(tiny_model(name), runtime)
        expected = plain_logits(model, TOKENS, len(TOKENS))
        values = {key: each.cpu() for key, each in model.state_dict().items()}
        num_joined = join_linears(model)
        found = plain_logits(model, TOKENS, len(TOKENS))
        error = torch.linalg.vector_norm(found.float() - expected.float())
        assert error <= 1e-5 * torch.linalg.vector_norm(expected.float())
        for key, each in model.state_dict().items():
            assert torch.equal(each.cpu(), values[key]), "each weight holds what it held"
    assert (num_joined == 0) == (name in NOT_JOINED)


@torch.inference_mode()
def test_weights_are_not_held_twice() -> None:
    with SimRuntime() as runtime:
        model = bring_to(tiny_model("llama"), runtime)
        gc.collect()
        before = SIM.memory.most = SIM.memory.used
        num_bytes = weight_bytes(model)
        layer = model.model.layers[0]
        parts = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        largest = 2 * layer.mlp.gate_proj.weight.nbytes
        assert sum(part.weight.nbytes for part in parts) <= largest
        assert join_linears(model) == 2 * len(model.model.layers)
        assert SIM.memory.most <= before + largest
        gc.collect()
        assert SIM.memory.used == before
        assert weight_bytes(model) == num_bytes
        places = [part.weight.held.untyped_storage().data_ptr() for part in parts]
        assert len(set(places)) == 1


def test_a_weight_that_something_else_uses_stays_alone() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    layers[1].self_attn.k_proj.weight = layers[0].self_attn.k_proj.weight
    assert join_linears(model) == 2 * len(layers) - 2
    assert layers[1].self_attn.k_proj.weight is layers[0].self_attn.k_proj.weight
