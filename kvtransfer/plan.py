"""Which bytes of a peer's blocks one rank of ours needs, and where in its own blocks they go.

    source ranks (tp 2)              one target rank (tp 1, pp 2, the second stage)
    | L0 L1 L2 L3 | heads 0-1  ──▶   layers 2-3, heads 0-1 ┐
    | L0 L1 L2 L3 | heads 2-3  ──▶   layers 2-3, heads 2-3 ┴ | L2 L3 | heads 0-3

Both sides divide the KV of the same layers; the sizes of their blocks and the order inside them may
differ. Everything here is arithmetic on layouts.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.domain.invariants import check_invariant
from pdserve.domain.layout import BlockOrder, LayerKv, RankLayout, ShardedLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The same KV heads of layers that follow one another, both counted as the model counts."""

    layers: range
    heads: range


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one source rank gives to one target rank."""

    rank: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planes:
    """Where planes lie in a block, each the K, or the V, of the wanted heads of one layer.

    Offsets and steps are in bytes, from one plane, token or head to the next.
    """

    offset: int
    plane_step: int
    token_step: int
    head_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Planes of a source block that go to a target block, for as many tokens as are asked for:
    [num_planes, tokens, num_heads, head_bytes].
    """

    source: Planes
    target: Planes
    num_planes: int
    num_heads: int
    head_bytes: int

    @property
    def token_bytes(self) -> int:
        return self.num_planes * self.num_heads * self.head_bytes


def plan_shares(source: ShardedLayout, target: ShardedLayout, rank: int) -> list[Share]:
    """What `rank` of `target` reads, by source rank: all that it holds, and each byte once.

    A source rank that holds the same heads gives all. Of several that hold a head, target ranks
    take different ones, so that the reads spread; but rather one that they read anyway, since
    whole blocks are read.
    """
    is_same_kv = source.whole.is_same_kv(target.whole)
    check_invariant(is_same_kv, "both divide the KV of one model", source, target)
    mine = target.rank(rank)
    theirs = {each: source.rank(each) for each in range(source.num_ranks)}
    theirs = {each: held for each, held in theirs.items() if held.has_heads_of(mine)} or theirs
    taken: dict[int, list[Piece]] = defaultdict(list)
    for layer, heads in zip(mine.layers, mine.heads, strict=True):
        held_heads = {
            each: held.heads[layer - held.layers.start]
            for each, held in theirs.items()
            if layer in held.layers
        }
        for head in heads:
            owners = [each for each, held in held_heads.items() if head in held]
            known = [each for each in owners if each in taken]
            owner = known[0] if known else owners[rank % len(owners)]
            piece = Piece(layers=range(layer, layer + 1), heads=range(head, head + 1))
            taken[owner].append(piece)
    return [Share(rank=each, pieces=_joined(taken[each])) for each in sorted(taken)]


def copies_of(share: Share, source: RankLayout, target: RankLayout) -> list[Copy]:
    """The share of `source` as copies from its blocks to those of `target`; few, each of much."""
    copies: list[Copy] = []
    for piece in share.pieces:

        def alike(layer: int) -> tuple[object, ...]:
            return (_place(source, layer), _place(target, layer))

        for _, run in itertools.groupby(piece.layers, alike):
            layers = list(run)
            copies += _copies(layers[0], len(layers), piece.heads, source, target)
    return copies


def _copies(
    layer: int, num_layers: int, heads: range, source: RankLayout, target: RankLayout
) -> list[Copy]:
    """Of layers that follow one another and are alike on either side."""
    kv = source.layout.layers[layer - source.layers.start]
    if kv.k_head_dim == kv.v_head_dim:  # K and V are planes of one size, one after the other
        parts = [(kv.k_head_dim, True, 2)]
    else:
        parts = [(kv.k_head_dim, True, 1), (kv.v_head_dim, False, 1)]
    return [
        Copy(
            source=_planes(source, layer, heads, is_k=is_k, num_parts=num_parts),
            target=_planes(target, layer, heads, is_k=is_k, num_parts=num_parts),
            num_planes=num_layers * num_parts,
            num_heads=len(heads),
            head_bytes=head_dim * source.layout.item_bytes,
        )
        for head_dim, is_k, num_parts in parts
        if head_dim > 0
    ]


def _planes(held: RankLayout, layer: int, heads: range, *, is_k: bool, num_parts: int) -> Planes:
    """Of one layer on, in blocks of `held`; `num_parts` planes of a layer are alike."""
    layout, place = held.layout, layer - held.layers.start
    kv = layout.layers[place]
    head_bytes = (kv.k_head_dim if is_k else kv.v_head_dim) * layout.item_bytes
    if layout.order is BlockOrder.TOKENS:
        token_step, head_step = kv.num_kv_heads * head_bytes, head_bytes
    else:
        token_step, head_step = head_bytes, layout.block_size * head_bytes
    k_bytes = 0 if is_k else kv.num_kv_heads * kv.k_head_dim * layout.item_bytes * layout.block_size
    skipped = (heads.start - held.heads[place].start) * head_step
    layer_bytes = kv.num_values_per_token * layout.item_bytes * layout.block_size
    return Planes(
        offset=layout.layer_offset_bytes(place) + k_bytes + skipped,
        plane_step=layer_bytes // num_parts,
        token_step=token_step,
        head_step=head_step,
    )


def _place(held: RankLayout, layer: int) -> tuple[LayerKv, int]:
    """What decides where heads of a layer lie within it."""
    place = layer - held.layers.start
    return held.layout.layers[place], held.heads[place].start


def _joined(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Single heads of single layers, in order, as the fewest pieces: heads first, then layers."""
    rows: list[Piece] = []
    for piece in pieces:
        last = rows[-1] if rows else None
        if last and last.layers == piece.layers and last.heads.stop == piece.heads.start:
            rows[-1] = Piece(layers=last.layers, heads=range(last.heads.start, piece.heads.stop))
        else:
            rows.append(piece)
    joined: dict[range, Piece] = {}  # the last piece of these heads
    done: list[Piece] = []
    for row in rows:
        last = joined.get(row.heads)
        if last and last.layers.stop == row.layers.start:
            row = Piece(layers=range(last.layers.start, row.layers.stop), heads=row.heads)
        elif last:
            done.append(last)
        joined[row.heads] = row
    return (*done, *joined.values())
