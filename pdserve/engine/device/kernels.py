"""Paged attention as Triton kernels: store the rows' K and V, attend, combine the splits.

    store    a program for each (row, KV head)
    attend   a program for each (tile of rows, KV head, split): the rows of a tile belong to one
             sequence, and a split is an equal share of the keys that they see
    combine  a program for each (row, head), if there are splits

Grids come from shapes alone, so that a CUDA graph can hold them. What a loaded model fixes is a
`constexpr`: each combination is compiled once, when the model is loaded
(`pdserve.engine.device.variants`). What differs from step to step is never specialised on, because
Triton would compile again for 1 and for multiples of 16, in the middle of serving. Strides of the
cache are constants for another reason too: loads of K and V are wide only if the compiler knows
that they are aligned. Blocks are counted in 64 bits, since the offset of a block can pass 2**31.

This module needs triton and is imported only by what launches kernels. Names in capitals are
constants of a variant; sizes ending in _P are padded to powers of two.
"""

import triton
import triton.language as tl
from triton import knobs

# Triton's interpreter multiplies the bits of bfloat16 as if they were a number (triton#11584).
IS_INTERPRETED: bool = bool(knobs.runtime.interpret)

_STORE_VARYING = ("key_row", "value_row", "row_blocks", "row_offsets")
_ATTEND_VARYING = (
    "query_row",
    "tables",
    "width",
    "firsts",
    "starts",
    "tile_sequence",
    "tile_row",
    "tile_rows",
    "sinks",
    "num_splits",
)


@triton.jit(do_not_specialize=_STORE_VARYING)
def store_kernel(
    key, key_row, value, value_row, k_cache, v_cache, out, row_blocks, row_offsets,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROW_ALIGN: tl.constexpr,
    K_DIM: tl.constexpr, K_DIM_P: tl.constexpr, V_DIM: tl.constexpr, V_DIM_P: tl.constexpr,
    K_BLOCK: tl.constexpr, K_PLACE: tl.constexpr, K_HEAD: tl.constexpr,
    V_BLOCK: tl.constexpr, V_PLACE: tl.constexpr, V_HEAD: tl.constexpr,
    OUT_P: tl.constexpr,
):  # fmt: skip
    """key, value: [rows, KV_HEADS, dim], rows `key_row` and `value_row` values apart.

    A row of block -1 is padding: nothing is stored, and its row of `out` becomes zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    block = tl.load(row_blocks + row).to(tl.int64)
    if block >= 0:
        place = tl.load(row_offsets + row).to(tl.int64)
        k = tl.arange(0, K_DIM_P)
        source = key + row * tl.multiple_of(key_row, ROW_ALIGN) + head * K_DIM + k
        target = k_cache + block * K_BLOCK + place * K_PLACE + head * K_HEAD + k
        tl.store(target, tl.load(source, mask=k < K_DIM), mask=k < K_DIM)
        v = tl.arange(0, V_DIM_P)
        source = value + row * tl.multiple_of(value_row, ROW_ALIGN) + head * V_DIM + v
        target = v_cache + block * V_BLOCK + place * V_PLACE + head * V_HEAD + v
        tl.store(target, tl.load(source, mask=v < V_DIM), mask=v < V_DIM)
    else:
        SHARE: tl.constexpr = GROUP * V_DIM
        n = tl.arange(0, OUT_P)
        zeros = tl.zeros([OUT_P], out.dtype.element_ty)
        tl.store(out + (row * KV_HEADS + head) * SHARE + n, zeros, mask=n < SHARE)


@triton.jit(do_not_specialize=_ATTEND_VARYING)
def attend_kernel(
    query, query_row, k_cache, v_cache, out, part_sums, part_tops,
    tables, width, firsts, starts, tile_sequence, tile_row, tile_rows, sinks,
    factor, cap, num_splits,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, IS_CAPPED: tl.constexpr, HAS_SINKS: tl.constexpr,
    IS_SPLIT: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr,
    ROW_ALIGN: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    K_DIM: tl.constexpr, K_DIM_P: tl.constexpr, V_DIM: tl.constexpr, V_DIM_P: tl.constexpr,
    K_BLOCK: tl.constexpr, K_PLACE: tl.constexpr, K_HEAD: tl.constexpr,
    V_BLOCK: tl.constexpr, V_PLACE: tl.constexpr, V_HEAD: tl.constexpr,
    IS_IEEE: tl.constexpr, IS_UPCAST: tl.constexpr,
):  # fmt: skip
    """query: [rows, heads, K_DIM]; out: [rows, heads, V_DIM], contiguous.

    Scores are in units of log2: `factor` is scaling * log2(e), or with a soft cap scaling by it,
    and `cap` is the soft cap * log2(e). With splits, part_sums [rows, heads, splits, V_DIM] gets
    weighted sums, part_tops [rows, heads, splits, 2] the largest score and the sum of weights.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_rows = tl.load(tile_rows + tile)
    if num_rows > 0:
        sequence = tl.load(tile_sequence + tile).to(tl.int64)
        first_row = tl.load(tile_row + tile)
        start = tl.load(starts + sequence) + first_row - tl.load(firsts + sequence)
        last = start + num_rows - 1
        M: tl.constexpr = TILE * GROUP_P
        member = tl.arange(0, M)
        place = member // GROUP_P
        head = kv_head * GROUP + member % GROUP_P
        is_live = (place < num_rows) & (member % GROUP_P < GROUP)
        row = (first_row + place).to(tl.int64)
        position = start + place
        k_dim = tl.arange(0, K_DIM_P)
        v_dim = tl.arange(0, V_DIM_P)
        query_at = row * tl.multiple_of(query_row, ROW_ALIGN) + head * K_DIM
        q = tl.load(
            query + query_at[:, None] + k_dim[None, :],
            mask=is_live[:, None] & (k_dim[None, :] < K_DIM),
            other=0.0,
        )
        is_finite = tl.abs(q.to(tl.float32)) < float("inf")
        num_bad = tl.sum(tl.where(is_finite, 0, 1), 1)
        if IS_UPCAST:
            q = q.to(tl.float32)
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(begin, start - WINDOW + 1)
        if CHUNK > 0:
            begin = tl.maximum(begin, start - start % CHUNK)
        begin = begin // KEYS * KEYS
        end = last + 1
        if IS_SPLIT:
            share = tl.cdiv(tl.cdiv(end - begin, KEYS), num_splits) * KEYS
            begin += split * share
            end = tl.minimum(end, begin + share)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        sums = tl.zeros([M, V_DIM_P], tl.float32)
        if HAS_SINKS:
            if split == 0:  # in one of the splits alone
                top = tl.load(sinks + head, mask=is_live, other=0.0).to(tl.float32) * 1.44269504089
                total = tl.full([M], 1.0, tl.float32)
        table = tables + sequence * width
        for first_key in range(begin, end, KEYS):
            key_at = first_key + tl.arange(0, KEYS)
            is_held = key_at <= last
            block = tl.load(table + key_at // BLOCK_SIZE, mask=is_held, other=0).to(tl.int64)
            inside = key_at % BLOCK_SIZE
            k = tl.load(
                k_cache
                + (block * K_BLOCK + inside * K_PLACE + kv_head * K_HEAD)[None, :]
                + k_dim[:, None],
                mask=is_held[None, :] & (k_dim[:, None] < K_DIM),
                other=0.0,
            )
            if IS_UPCAST:
                k = k.to(tl.float32)
            if IS_IEEE:
                scores = tl.dot(q, k, input_precision="ieee") * factor
            else:
                scores = tl.dot(q, k) * factor
            if IS_CAPPED:  # tanh(x) = 1 - 2 / (1 + e ** 2x)
                scores = cap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * 2.88539008178)))
            is_seen = is_live[:, None] & (key_at[None, :] <= position[:, None])
            if WINDOW > 0:
                is_seen = is_seen & (key_at[None, :] > position[:, None] - WINDOW)
            if CHUNK > 0:
                is_seen = is_seen & (key_at[None, :] // CHUNK == position[:, None] // CHUNK)
            scores = tl.where(is_seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.exp2(top - base)
            weights = tl.exp2(scores - base[:, None])
            total = total * shrink + tl.sum(weights, 1)
            v = tl.load(
                v_cache
                + (block * V_BLOCK + inside * V_PLACE + kv_head * V_HEAD)[:, None]
                + v_dim[None, :],
                mask=is_held[:, None] & (v_dim[None, :] < V_DIM),
                other=0.0,
            )
            weights = weights.to(v.dtype)
            if IS_UPCAST:
                weights = weights.to(tl.float32)
                v = v.to(tl.float32)
            sums = sums * shrink[:, None]
            if IS_IEEE:
                sums = tl.dot(weights, v, sums, input_precision="ieee")
            else:
                sums = tl.dot(weights, v, sums)
            top = new_top
        # Infinite queries can leave nothing but weights of zero, which would pass for numbers.
        total = tl.where(num_bad > 0, float("nan"), total)
        is_written = is_live[:, None] & (v_dim[None, :] < V_DIM)
        item = row * (KV_HEADS * GROUP) + head
        if IS_SPLIT:
            item = item * num_splits + split
            tl.store(part_sums + item[:, None] * V_DIM + v_dim[None, :], sums, mask=is_written)
            tl.store(part_tops + item * 2, top, mask=is_live)
            tl.store(part_tops + item * 2 + 1, total, mask=is_live)
        else:
            mean = (sums / tl.where(total == 0.0, 1.0, total)[:, None]).to(out.dtype.element_ty)
            tl.store(out + item[:, None] * V_DIM + v_dim[None, :], mean, mask=is_written)


@triton.jit(do_not_specialize=("row_blocks", "num_splits"))
def combine_kernel(
    part_sums, part_tops, out, row_blocks, num_splits,
    HEADS: tl.constexpr, V_DIM: tl.constexpr, V_DIM_P: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Joins what `attend_kernel` left of each split into `out`; skips padded rows."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(row_blocks + row) >= 0:
        item = row * HEADS + tl.program_id(1)
        v_dim = tl.arange(0, V_DIM_P)
        top = float("-inf")
        total = 0.0
        sums = tl.zeros([V_DIM_P], tl.float32)
        for first in range(0, num_splits, AT_ONCE):
            split = first + tl.arange(0, AT_ONCE)
            is_part = split < num_splits
            part = item * num_splits + split
            part_top = tl.load(part_tops + part * 2, mask=is_part, other=float("-inf"))
            part_total = tl.load(part_tops + part * 2 + 1, mask=is_part, other=0.0)
            part_sum = tl.load(
                part_sums + part[:, None] * V_DIM + v_dim[None, :],
                mask=is_part[:, None] & (v_dim[None, :] < V_DIM),
                other=0.0,
            )
            new_top = tl.maximum(top, tl.max(part_top, 0))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.exp2(top - base)
            weights = tl.exp2(part_top - base)
            total = total * shrink + tl.sum(part_total * weights, 0)
            sums = sums * shrink + tl.sum(part_sum * weights[:, None], 0)
            top = new_top
        mean = (sums / tl.where(total == 0.0, 1.0, total)).to(out.dtype.element_ty)
        tl.store(out + item * V_DIM + v_dim, mean, mask=v_dim < V_DIM)
