import pytest

from pdserve.domain.errors import LocalFault
from pdserve.domain.layout import LayerKv
from pdserve.engine.model_shape import kv_layout

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "hidden_size": 64,
}


@pytest.mark.parametrize(
    ("changes", "layer"),
    [
        ({}, LayerKv(8, 8, 8)),
        ({"num_key_value_heads": 2}, LayerKv(2, 8, 8)),
        ({"num_key_value_heads": 2, "head_dim": 32}, LayerKv(2, 32, 32)),
        ({"multi_query": True}, LayerKv(1, 8, 8)),
        (
            {"kv_lora_rank": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20},
            LayerKv(8, 24, 20),
        ),
        (
            {"text_config": {**LLAMA, "num_key_value_heads": 4}, "num_attention_heads": None},
            LayerKv(4, 8, 8),
        ),
    ],
)
def test_layout_follows_the_config(changes: dict[str, object], layer: LayerKv) -> None:
    layout = kv_layout({**LLAMA, **changes}, block_size=16, dtype="bfloat16")
    assert layout.layers == (layer, layer)
    assert (layout.block_size, layout.item_bytes) == (16, 2)


def test_sizes_that_are_not_given_are_not_guessed() -> None:
    with pytest.raises(LocalFault, match="does not give layers, heads and hidden size"):
        kv_layout({"model_type": "llama"}, block_size=16, dtype="float32")


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(LocalFault, match=r"dtype must be one of float32, .*; got int8"):
        kv_layout(LLAMA, block_size=16, dtype="int8")
