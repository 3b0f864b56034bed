"""Packed attention in plain PyTorch: the torch backend on a CPU.

The pack is cut into blocks: queries that lie together, and the keys that they meet. Every block is one call of dense
attention; no matrix over the pack is ever built. The layout's numbers are read on the host, which on a GPU would wait
for the device: there PyTorch's own kernels do the work (_attention_device.py), but in fp64.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from sora_fast.packing.coordinates import fields, inside

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# A call costs about as much as so many more pairs of tokens in a block would (0.1 ms at 8 heads of 64 on one core).
_CALL_PAIRS = 4096
# Most pairs in a block that holds a number for each of them: 16 MB in fp32 for a bias, or for one head's scores.
_MOST_PAIRS = 1 << 22


class Block(NamedTuple):
    """`count` pieces of equal length side by side: the queries of a piece may attend the keys of the same piece.

    allowed [queries, keys]: which pairs of the one piece; None: all.
    """

    queries: slice
    keys: slice | Tensor
    count: int = 1
    allowed: Tensor | None = None


class Masking(NamedTuple):
    """What pairs are tested with: packed boxes of the queries, places of the keys; raster places of both if causal."""

    low: Tensor
    high: Tensor
    place: Tensor
    raster: Tensor | None
    key_raster: Tensor | None


def segment_blocks(query_offsets: Tensor, key_offsets: Tensor, *, join: bool) -> Iterator[Block]:
    """The full mask: every segment meets all of its own keys. join: neighbours of equal length make one block."""
    starts, key_starts = query_offsets.tolist(), key_offsets.tolist()
    # Segments without queries or keys stay among the others here: whoever stands beside one of them is no neighbour.
    pieces = [
        (start, stop - start, key_start, key_stop - key_start)
        for start, stop, key_start, key_stop in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False)
    ]
    for _, group in groupby(pieces, key=lambda piece: (piece[1], piece[3]) if join else piece):
        run = list(group)
        start, length, key_start, key_length = run[0]
        if length and key_length:
            queries = slice(start, start + len(run) * length)
            yield Block(queries, slice(key_start, key_start + len(run) * key_length), len(run))


def past_blocks(offsets: Tensor, tiles: Tensor, masking: Masking) -> Iterator[Block]:
    """The past in raster order: some queries, and all keys from their segment's first to the last of them.

    By frames, those of a frame may attend all of these keys; by tokens, those of a tile are tested. Neighbours share a
    block, tested, if that is cheaper than a call for each. offsets, tiles: bounds of segments and of tiles.
    """
    segments, by_tokens = set(offsets.tolist()), masking.raster is not None
    bounds = tiles.unique().tolist() if by_tokens else frame_bounds(offsets, masking.high).tolist()
    first = start = 0
    tested = by_tokens
    for stop, following in zip_longest(bounds[1:], bounds[2:]):  # a pack without tokens has one bound
        more = following and stop not in segments and (stop - start) * (following - stop) <= _CALL_PAIRS
        if more and (following - start) * (following - first) <= _MOST_PAIRS:
            tested = True
            continue
        queries, keys = slice(start, stop), slice(first, stop)
        yield Block(queries, keys, allowed=_allowed(masking, queries, keys) if tested else None)
        start, tested = stop, by_tokens
        first = stop if stop in segments else first


def frame_bounds(offsets: Tensor, high: Tensor) -> Tensor:
    """Where frames and segments begin, and the last one ends. high: of the boxes, whose upper bits are frames."""
    frames = high[: offsets[-1]] >> 20
    changes = (frames[1:] != frames[:-1]).nonzero().squeeze(1) + 1
    return torch.cat([changes, offsets]).unique()


def tile_blocks(
    query_tiles: Tensor,
    key_tiles: Tensor,
    begin: Tensor,
    full_end: Tensor,
    end: Tensor,
    tiles: Tensor,
    masking: Masking,
) -> Iterator[Block]:
    """Any other mask, from tile boundaries and a `TileLists`: runs of query tiles and the key tiles that they meet."""
    bounds, key_bounds = query_tiles.tolist(), key_tiles.tolist()
    begins, full_ends, ends = begin.tolist(), full_end.tolist(), end.tolist()
    met = tiles[: max(ends, default=0)].tolist()
    singles = (
        _Run.of_tile(bounds[tile], bounds[tile + 1], frozenset(met[first:last]), key_bounds, partial=whole < last)
        for tile, (first, whole, last) in enumerate(zip(begins, full_ends, ends, strict=True))
        if first < last
    )
    for run in _joined(singles, key_bounds):
        queries = slice(run.start, run.stop)
        keys = _tokens([(key_bounds[tile], key_bounds[tile + 1]) for tile in sorted(run.keys)], tiles.device)
        if not run.partial:
            yield Block(queries, keys)
            continue
        keys = _reached(masking, queries, keys)
        if isinstance(keys, slice) or len(keys):
            yield Block(queries, keys, allowed=_allowed(masking, queries, keys))


class _Run(NamedTuple):
    """Queries start … stop, the key tiles that some of them meet, and how many tokens those have.

    partial: not every query may attend every key.
    """

    start: int
    stop: int
    keys: frozenset[int]
    columns: int
    partial: bool

    @staticmethod
    def of_tile(start: int, stop: int, keys: frozenset[int], key_bounds: list[int], *, partial: bool) -> "_Run":
        return _Run(start, stop, keys, sum(key_bounds[key + 1] - key_bounds[key] for key in keys), partial)

    @property
    def pairs(self) -> int:
        return (self.stop - self.start) * self.columns

    def joined(self, other: "_Run", key_bounds: list[int]) -> "_Run | None":
        """Both as one run, if that is cheaper than two calls."""
        # Who shares a key tile is of one segment: the box test, which knows nothing of segments, then suffices.
        if other.start != self.stop or self.keys.isdisjoint(other.keys):
            return None
        partial = self.partial or other.partial or self.keys != other.keys
        both = _Run.of_tile(self.start, other.stop, self.keys | other.keys, key_bounds, partial=partial)
        return both if both.pairs <= min(self.pairs + other.pairs + _CALL_PAIRS, _MOST_PAIRS) else None


def _joined(singles: Iterable[_Run], key_bounds: list[int]) -> Iterator[_Run]:
    run: _Run | None = None
    for single in singles:
        both = run and run.joined(single, key_bounds)
        if run and not both:
            yield run
        run = both or single
    if run:
        yield run


def _tokens(ranges: list[tuple[int, int]], device: torch.device) -> slice | Tensor:
    """The tokens of ascending ranges: a slice if no other lies between them, else their indices."""
    if all(stop == start for (_, stop), (start, _) in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in ranges])


def _reached(masking: Masking, queries: slice, keys: slice | Tensor) -> slice | Tensor:
    """Those of the keys that lie in the smallest box around the boxes of all queries.

    A tile that is met has a token in it, no more; for a small window they are one in five.
    """
    low = sum(field.amin() << shift for field, shift in fields(masking.low[queries]))
    high = sum(field.amax() << shift for field, shift in fields(masking.high[queries]))
    reached = inside(masking.place[keys], low, high)
    if reached.all():
        return keys
    places = reached.nonzero().squeeze(1)
    return places + keys.start if isinstance(keys, slice) else keys[places]


def _allowed(masking: Masking, queries: slice, keys: slice | Tensor) -> Tensor:
    allowed = inside(masking.place[keys], masking.low[queries, None], masking.high[queries, None])
    if masking.raster is not None:
        allowed &= masking.key_raster[keys] <= masking.raster[queries, None]
    return allowed


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: Iterable[Block], scale: float) -> tuple[Tensor, Tensor]:
    """Output [N, H, D] and natural logsumexp [H, N]; zeros and −inf for queries that meet no key."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=_wide(q), device=q.device)
    k, v = (_spread(x, q) for x in (k, v))
    flash = has_flash(q)
    for block in blocks if flash else _bounded(blocks, q.shape[1]):
        queries, keys, values = (_pieces(x, place, block) for x, place in _paired((q, k, v), block))
        attend = _attend_flash if flash else _attend
        result, sums = attend(queries, keys, values, block.allowed, scale)
        _pieces(out, block.queries, block).copy_(result)
        _row_pieces(lse, block).copy_(sums)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Iterable[Block],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. grad_lse: [H, N], or None for zero."""
    heads = [x.shape[1] for x in (q, k, v)]
    k, v = (_spread(x, q) for x in (k, v))
    grads = [torch.zeros(x.shape, dtype=_wide(x), device=x.device) for x in (q, k, v)]
    flash = has_flash(q, grad_lse)
    for block in blocks if flash else _bounded(blocks, q.shape[1]):
        inputs = [_pieces(x, place, block) for x, place in _paired((q, k, v), block)]
        grad_result, result = (_pieces(x, block.queries, block) for x in (grad_out, out))
        sums = _row_pieces(lse, block)
        if flash:
            parts = _attend_flash_backward(grad_result, *inputs, result, sums, block.allowed, scale)
        else:
            delta = (grad_result.to(lse.dtype) * result.to(lse.dtype)).sum(-1)
            if grad_lse is not None:
                delta -= _row_pieces(grad_lse, block)
            parts = _attend_backward(grad_result, delta, *inputs, sums, block.allowed, scale)
        # A key meets the queries of several blocks, but a block names no key twice: the sum has one order.
        for (grad, place), part in zip(_paired(grads, block), parts, strict=True):
            if isinstance(place, slice):
                _pieces(grad, place, block).add_(part)
            else:
                grad.index_add_(0, place, part.squeeze(0).transpose(0, 1).to(grad.dtype))
    return tuple(_gathered(grad, count).to(q.dtype) for grad, count in zip(grads, heads, strict=True))


def _spread(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [Nk, Hk, D] with a copy of each head for every query head of its group: [Nk, H, D]."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _gathered(grad: Tensor, heads: int) -> Tensor:
    """The sums over every group of heads, so that `heads` are left."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)


def has_flash(q: Tensor, grad_lse: Tensor | None = None) -> bool:
    """True if PyTorch's kernel for CPUs will do; it knows of no gradient of the logsumexp."""
    return q.device.type == "cpu" and grad_lse is None


def may_join(q: Tensor, grad_lse: Tensor | None = None) -> bool:
    """Whether segments may share a call: without the kernel each one's scores are large enough, and the 16-bit kernel
    chooses how it multiplies by the size of the whole call, so that a segment's bits would depend on its neighbours.
    """
    return has_flash(q, grad_lse) and q.dtype in (torch.float32, torch.float64)


def _bounded(blocks: Iterable[Block], heads: int) -> Iterator[Block]:
    """Cut blocks of one piece to few enough pairs that the scores of all heads may be held."""
    for block in blocks:
        columns = block.keys.stop - block.keys.start if isinstance(block.keys, slice) else len(block.keys)
        step = max(1, _MOST_PAIRS // (heads * columns))
        for start in range(block.queries.start, block.queries.stop, step):
            first = start - block.queries.start
            allowed = None if block.allowed is None else block.allowed[first : first + step]
            yield Block(slice(start, min(start + step, block.queries.stop)), block.keys, allowed=allowed)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _paired(tensors: Sequence[Tensor], block: Block) -> Iterator[tuple[Tensor, slice | Tensor]]:
    """q, k, v, or their gradients, each with its place in the pack."""
    return zip(tensors, (block.queries, block.keys, block.keys), strict=True)


def _pieces(x: Tensor, place: slice | Tensor, block: Block) -> Tensor:
    """Tokens [N, H, D] → [count, H, L, D]; a view where the place is a slice."""
    if isinstance(place, Tensor):
        # Indexing keeps the order of the strides; the kernel takes any but channels that lie apart.
        return x[place].contiguous().transpose(0, 1).unsqueeze(0)
    # One call in place of three: over a pack of short segments these are a tenth of the time.
    length = (place.stop - place.start) // block.count
    token, head, channel = x.stride()
    shape = (block.count, x.shape[1], length, x.shape[2])
    strides = (length * token, head, token, channel)
    pieces = x.as_strided(shape, strides, x.storage_offset() + place.start * token)
    # An expanded gradient has channels that lie apart.
    return pieces if channel == 1 else pieces.contiguous()


def _row_pieces(x: Tensor, block: Block) -> Tensor:
    """A number a query [H, N] → [count, H, L]."""
    return x[:, block.queries].unflatten(1, (block.count, -1)).transpose(0, 1)


def _attend_flash(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, sums = _flash(q, k, v, attn_mask=_bias(allowed, q), scale=scale)
    # The kernel gives 0 to a query without a key.
    return out, sums if allowed is None else sums.masked_fill(~allowed.any(dim=1), -math.inf)


def _attend_flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    allowed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    finite = sums.masked_fill(sums == -math.inf, 0.0)
    return _flash_backward(grad_out, q, k, v, out, finite, 0.0, False, attn_mask=_bias(allowed, q), scale=scale)


def _bias(allowed: Tensor | None, q: Tensor) -> Tensor | None:
    return None if allowed is None else q.new_zeros(()).where(allowed, -math.inf)


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, allowed, scale)
    sums = scores.logsumexp(-1)
    return (_weights(scores, sums) @ v.to(scores.dtype)).to(q.dtype), sums


def _attend_backward(
    grad_out: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    allowed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _weights(_scores(q, k, allowed, scale), sums)
    grad_out, q, k, v = (x.to(weights.dtype) for x in (grad_out, q, k, v))
    slopes = weights * (grad_out @ v.mT - delta.unsqueeze(-1)) * scale
    return slopes @ k, slopes.mT @ q, weights.mT @ grad_out


def _scores(q: Tensor, k: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    scores = q.to(_wide(q)) @ k.to(_wide(k)).mT * scale
    return scores if allowed is None else scores.masked_fill(~allowed, -math.inf)


def _weights(scores: Tensor, sums: Tensor) -> Tensor:
    # A query without a key: −inf − −inf would be NaN.
    return (scores - sums.masked_fill(sums == -math.inf, 0.0).unsqueeze(-1)).exp()
