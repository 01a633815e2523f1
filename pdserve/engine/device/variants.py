"""Which variants of the attention kernels a model needs, and the constants of each.

Needs neither torch nor triton, so what a model will launch can be told before anything is loaded.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdserve.domain.errors import LocalFault

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_LEAST_TILE = 16  # rows of the smallest matrix product of tensor cores
_MAX_TILE = 128
_MAX_SHARED_BYTES = 96 << 10  # leaves room in the 99 KiB that a program has on sm_86 and sm_120
COMBINED_AT_ONCE = 8

Strides = tuple[int, int, int]
Constants = dict[str, int | bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKind:
    """What the attention calls of a layer have in common in every step.

    Strides are in values: from block to block, from place to place in a block, from head to head;
    the values of a head lie together.
    """

    dtype: str  # of queries, K and V: float32, float16 or bfloat16
    heads: int
    kv_heads: int
    k_head_dim: int
    v_head_dim: int
    block_size: int
    k_strides: Strides
    v_strides: Strides
    window: int = 0  # these four as in `AttentionCall`
    chunk: int = 0
    is_capped: bool = False
    has_sinks: bool = False

    @property
    def group(self) -> int:
        """Heads that share a KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A kind of layer, by how many rows a program attends and whether keys are split."""

    kind: AttentionKind
    rows_per_tile: int
    is_split: bool


@dataclass(frozen=True, slots=True)
class TileSize:
    """How a program of the attend kernel works: keys at once, warps, loads in flight."""

    keys: int
    num_warps: int
    num_stages: int


def variants_of(
    kinds: Iterable[AttentionKind], rows_per_tile: Sequence[int], *, is_split: Sequence[bool]
) -> list[Variant]:
    """All that layers of `kinds` can launch with tiles and splits like these, each once."""
    return [
        Variant(kind=kind, rows_per_tile=rows, is_split=split)
        for kind in dict.fromkeys(kinds)
        for rows in dict.fromkeys(rows_per_tile)
        for split in dict.fromkeys(is_split)
    ]


def chunk_rows_per_tile(kinds: Iterable[AttentionKind]) -> int:
    """The tile for steps with chunks: as many rows as the kernels take, for all `kinds` alike.

    Decode steps have one row to a tile. Larger tiles read K and V less often.
    """
    return min(_most_rows(kind) for kind in kinds)


def _most_rows(kind: AttentionKind) -> int:
    dim = max(kind.k_head_dim, kind.v_head_dim)
    most = _MAX_TILE if dim <= 128 else 64 if dim <= 256 else 32
    if kind.dtype == "float32":
        most = 16
    return max(1, most // power_of_two(kind.group))


def check_tile(kind: AttentionKind, rows_per_tile: int) -> None:
    """`LocalFault` for tiles that no kernel is made for."""
    if rows_per_tile < 1 or rows_per_tile & (rows_per_tile - 1):
        raise LocalFault(f"rows_per_tile must be a power of two; got {rows_per_tile}")
    if (size := rows_per_tile * power_of_two(kind.group)) > _MAX_TILE:
        raise LocalFault(
            f"a tile has at most {_MAX_TILE} rows times heads of a KV head; got {size} "
            f"({rows_per_tile} rows, {kind.heads} heads for {kind.kv_heads} KV heads)"
        )


def choose_splits(num_tiles: int, kv_heads: int, num_processors: int, max_num_keys: int) -> int:
    """Into how many parts to split the keys so that all processors of a device have work.

    Depends on shapes alone, so it is the same whenever a recorded step is replayed. A part has 256
    keys or more; two programs to a processor hide each other's waits.
    """
    wanted = -(-2 * num_processors // (num_tiles * kv_heads))
    return max(1, min(wanted, -(-max_num_keys // 256), 64))


def store_constants(kind: AttentionKind) -> Constants:
    return {
        "KV_HEADS": kind.kv_heads,
        "GROUP": kind.group,
        "ROW_ALIGN": row_alignment(kind),
        **_memory_constants(kind, least_dim=1),
        "OUT_P": power_of_two(kind.group * kind.v_head_dim),
    }


def attend_constants(variant: Variant, *, is_interpreted: bool = False) -> Constants:
    kind = variant.kind
    group = max(power_of_two(kind.group), _LEAST_TILE // variant.rows_per_tile)
    is_upcast = is_interpreted and kind.dtype == "bfloat16"
    return {
        "WINDOW": kind.window,
        "CHUNK": kind.chunk,
        "IS_CAPPED": kind.is_capped,
        "HAS_SINKS": kind.has_sinks,
        "IS_SPLIT": variant.is_split,
        "KV_HEADS": kind.kv_heads,
        "GROUP": kind.group,
        "GROUP_P": group,
        "ROW_ALIGN": row_alignment(kind),
        "TILE": variant.rows_per_tile,
        "KEYS": tile_size(variant).keys,
        "BLOCK_SIZE": kind.block_size,
        **_memory_constants(kind, least_dim=16),
        "IS_IEEE": kind.dtype == "float32" or is_upcast,
        "IS_UPCAST": is_upcast,
    }


def combine_constants(kind: AttentionKind) -> Constants:
    return {
        "HEADS": kind.heads,
        "V_DIM": kind.v_head_dim,
        "V_DIM_P": power_of_two(kind.v_head_dim),
        "AT_ONCE": COMBINED_AT_ONCE,
    }


def _memory_constants(kind: AttentionKind, least_dim: int) -> Constants:
    names = ("K_BLOCK", "K_PLACE", "K_HEAD", "V_BLOCK", "V_PLACE", "V_HEAD")
    return {
        "K_DIM": kind.k_head_dim,
        "K_DIM_P": power_of_two(kind.k_head_dim, least_dim),
        "V_DIM": kind.v_head_dim,
        "V_DIM_P": power_of_two(kind.v_head_dim, least_dim),
        **dict(zip(names, (*kind.k_strides, *kind.v_strides), strict=True)),
    }


def tile_size(variant: Variant) -> TileSize:
    """As many keys and loads in flight as fit the memory that the threads of a program share.

    Large tiles take fewer keys at once, or a thread has too few registers on some GPUs.
    """
    kind = variant.kind
    item_bytes = _ITEM_BYTES[kind.dtype]
    k_dim, v_dim = power_of_two(kind.k_head_dim, 16), power_of_two(kind.v_head_dim, 16)
    rows = max(_LEAST_TILE, variant.rows_per_tile * power_of_two(kind.group))
    num_warps = 8 if rows > 64 or rows * max(k_dim, v_dim) > 64 * 128 else 4
    room = _MAX_SHARED_BYTES - rows * k_dim * item_bytes
    choices = [(64, 3), (64, 2), (32, 3), (32, 2), (16, 2)]
    if kind.dtype == "float32":
        choices = [(32, 3), (16, 3)]
        room += min(room, 32 * (k_dim + v_dim) * item_bytes)  # one load is never in flight
    elif rows > _LEAST_TILE and max(k_dim, v_dim) > 128:
        choices = [(16, 2)]
    elif rows >= 64:
        choices = [(32, 2), (16, 2)] if k_dim + v_dim > 128 else [(64, 2), (32, 2)]
    for keys, num_stages in choices:
        if keys * (k_dim + v_dim) * item_bytes * num_stages <= room:
            return TileSize(keys, num_warps, num_stages)
    return TileSize(16, num_warps, 1)


def row_alignment(kind: AttentionKind) -> int:
    """A power of two that divides the distance of rows in queries, keys and values alike."""
    widths = (kind.heads * kind.k_head_dim, kind.kv_heads * kind.k_head_dim)
    return math.gcd(16, *widths, kind.kv_heads * kind.v_head_dim)


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest that is not below `number` and `least`, itself a power of two."""
    return max(least, 1 << (number - 1).bit_length())
