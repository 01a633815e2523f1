"""A model without weights tells the KV and the length rule that it has with them."""

import pytest

from pdserve.engine.length_probe import find_length_rule
from pdserve.engine.model_probe import discover_layout, use_paged
from pdserve.engine.sharding.hollow import find_shape
from tests.support.tiny_models import ROPES, tiny_model

LIMIT = 256
OTHERS = ("deepseek_v2", "gemma4_text", "gpt2", "gpt_bigcode", "llama4_text", "opt")


@pytest.mark.parametrize("name", sorted([*ROPES, *OTHERS]))
def test_shape_found_without_weights_is_that_of_the_model(name: str) -> None:
    model = tiny_model(name)
    use_paged(model)
    layout = discover_layout(model, block_size=1, dtype="float32")
    rule = find_length_rule(model, LIMIT)
    shape = find_shape(tiny_model(name), LIMIT)
    assert shape.layers == layout.layers
    assert shape.length_rule == rule
