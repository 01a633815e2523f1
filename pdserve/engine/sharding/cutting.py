"""Which part of each of a model's tensors a shard holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.engine.sharding.local_config import unfit

_PACKED_QKV = ("qkv_proj", "c_attn", "Wqkv", "W_pack")
_PACKED_GATE_UP = ("gate_up_proj", "gate_up", "gate_up_proj_bias")
_INTERLEAVED = ("gpt_oss",)  # gate and up alternate there, so that contiguous parts have both

Shape = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Of dimension `dim`, these ranges after one another."""

    dim: int
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutter:
    """Compares the shapes of a whole model and of a shard of it, both of the library's making."""

    config: Any  # of the whole model
    shard: int
    tp: int

    def cut(self, name: str, full: Shape, local: Shape) -> Cut | None:
        """The shard's part of a tensor; None if that is all of it.

        `LocalFault` if the shapes differ in a way that no rule explains.
        """
        if tuple(full) == tuple(local):
            return None
        strange = unfit(
            self.config, self.tp, f"{name} is {_said(full)} whole and {_said(local)} in a shard"
        )
        if len(full) != len(local):
            raise strange
        dims = [dim for dim in range(len(full)) if full[dim] != local[dim]]
        if len(dims) != 1:
            raise strange
        [dim] = dims
        spans, at = [], 0
        for size, num_parts in self._segments(name, full[dim], local[dim]):
            if num_parts == 0 or size % num_parts or self.tp % num_parts:
                raise strange
            start = at + self.shard * num_parts // self.tp * (size // num_parts)
            spans.append((start, start + size // num_parts))
            at += size
        if sum(end - start for start, end in spans) != local[dim]:
            raise strange
        return Cut(dim=dim, spans=tuple(spans))

    def _segments(self, name: str, full: int, local: int) -> list[tuple[int, int]]:
        """What is packed into one tensor: the size of each, and into how many parts it is cut.

        Parts that are fewer than the ranks (KV heads) are held by several.
        """
        leaf = leaf_of(name)
        if leaf in _PACKED_QKV:
            sizes = self.config.get_text_config()
            heads = int(sizes.num_attention_heads)
            kv_heads = int(getattr(sizes, "num_key_value_heads", None) or heads)
            head_dim = full // (heads + 2 * kv_heads)
            kv = (kv_heads * head_dim, min(self.tp, kv_heads))
            return [(heads * head_dim, self.tp), kv, kv]
        if leaf in _PACKED_GATE_UP and self.config.model_type not in _INTERLEAVED:
            return [(full // 2, self.tp)] * 2
        return [(full, full // local if full % local == 0 else 0)]


def leaf_of(name: str) -> str:
    """The last part of a tensor's name that says what it is for."""
    *owners, last = name.split(".")
    return owners[-1] if last in ("weight", "bias") and owners else last


def _said(sizes: Shape) -> str:
    return " x ".join(str(size) for size in sizes)
