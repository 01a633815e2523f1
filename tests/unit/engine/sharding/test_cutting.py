"""Which part of a tensor each shard holds."""

from dataclasses import dataclass

import pytest

from pdserve.domain.errors import LocalFault
from pdserve.engine.sharding.cutting import Cut, Cutter
from pdserve.engine.sharding.vocabulary import vocabulary_cut, vocabulary_part


@dataclass
class Config:
    """What of a library's config is read."""

    model_type: str = "llama"
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    num_hidden_layers: int = 3

    def get_text_config(self) -> "Config":
        return self


def cuts(
    name: str, full: tuple[int, ...], local: tuple[int, ...], tp: int, config: Config | None = None
) -> list[Cut | None]:
    return [
        Cutter(config=config or Config(), shard=shard, tp=tp).cut(name, full, local)
        for shard in range(tp)
    ]


def spans(found: list[Cut | None]) -> list[tuple[tuple[int, int], ...]]:
    return [cut.spans for cut in found if cut is not None]


def test_shards_take_even_parts_in_order() -> None:
    found = cuts("layers.0.mlp.down_proj.weight", (64, 96), (64, 24), 4)
    assert [cut.dim for cut in found if cut] == [1] * 4
    assert spans(found) == [((0, 24),), ((24, 48),), ((48, 72),), ((72, 96),)]


def test_a_tensor_of_one_shape_is_held_whole() -> None:
    assert cuts("norm.weight", (64,), (64,), 4) == [None] * 4


def test_fewer_kv_heads_than_ranks_are_held_by_several() -> None:
    found = cuts("layers.0.self_attn.k_proj.weight", (32, 64), (16, 64), 4)
    assert spans(found) == [((0, 16),), ((0, 16),), ((16, 32),), ((16, 32),)]


def test_packed_projections_are_cut_part_by_part() -> None:
    """8 query heads and 2 KV heads of 16: q is at 0, k at 128, v at 160."""
    found = cuts("layers.0.self_attn.qkv_proj.weight", (192, 64), (64, 64), 4)
    assert spans(found) == [
        ((0, 32), (128, 144), (160, 176)),
        ((32, 64), (128, 144), (160, 176)),
        ((64, 96), (144, 160), (176, 192)),
        ((96, 128), (144, 160), (176, 192)),
    ]


def test_gate_and_up_are_cut_each_unless_they_alternate() -> None:
    name, full, local = "layers.0.mlp.experts.gate_up_proj", (4, 64, 32), (4, 64, 16)
    assert spans(cuts(name, full, local, 2)) == [((0, 8), (16, 24)), ((8, 16), (24, 32))]
    alternating = cuts(name, full, local, 2, Config("gpt_oss"))
    assert spans(alternating) == [((0, 16),), ((16, 32),)]


@pytest.mark.parametrize(
    ("full", "local"), [((64, 96), (32, 48)), ((96,), (40,)), ((64, 96), (64,)), ((64,), (128,))]
)
def test_shapes_that_no_rule_explains_are_refused(
    full: tuple[int, ...], local: tuple[int, ...]
) -> None:
    with pytest.raises(LocalFault, match=r"cannot be served with tp 2: some\.weight is .* whole"):
        cuts("some.weight", full, local, 2)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 64, 163])
def test_every_token_is_one_shards(vocab_size: int, tp: int) -> None:
    tokens: list[int] = []
    for shard in range(tp):
        first, end, num_rows = vocabulary_part(vocab_size, shard, tp)
        assert num_rows == -(-vocab_size // tp) >= end - first
        assert vocabulary_cut(vocab_size, shard, tp).spans == ((first, end),)
        tokens += range(first, end)
    assert tokens == list(range(vocab_size))
