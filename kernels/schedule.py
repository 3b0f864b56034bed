"""TileSchedule, filled on the device in two or three launches, with the same numbers as `sora_fast.schedule` gives.

1. By tiles: what every token is tested with, 12 bytes a token written for 12 to 20 read; and the range that the tile
   meets, or its bounding box.
2. Lists only, by tiles of either side: how many of the segment's tiles on the other side each meets; 32 bytes read for
   each of those.
3. By tiles of either side: its place among the longest, and where its list begins, both from the numbers of all tiles;
   and its list, decided once more, which costs less than to keep every decision.

Tiles of a segment lie side by side, so a tile asks those of its own segment alone.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._launch import launch, next_power_of_two
from sora_fast.packing.coordinates import EVERYWHERE, GUARD, H_SHIFT, MAX_GRID, T_SHIFT, packed

_GUARD, _T_SHIFT, _H_SHIFT, _EVERYWHERE = (tl.constexpr(number) for number in (GUARD, T_SHIFT, H_SHIFT, EVERYWHERE))
# The corners of the box around all places.
_FIRST, _LAST = tl.constexpr(packed(1, 1, 1)), tl.constexpr(packed(*MAX_GRID))
_LARGEST_T, _LARGEST_H, _LARGEST_W = (tl.constexpr(size) for size in MAX_GRID)
# Places that a step of a search looks at: three steps find one of 2 million tokens.
_SEARCH = tl.constexpr(128)
# Tiles that a program asks at a time: most segments have no more.
COLUMNS = 256
# Tiles whose numbers a program adds up at a time: all of a pack of 32k tokens.
ROWS = 1024


class Pack(NamedTuple):
    """The tensors of a `PackedLayout`."""

    cu_seqlens: Tensor
    grids: Tensor
    segment_ids: Tensor
    coords: Tensor
    raster: Tensor
    tiles: Tensor


class Ranges(NamedTuple):
    """The tensors of a `TokenRanges`."""

    begin: Tensor
    split: Tensor
    end: Tensor
    order: Tensor


class Lists(NamedTuple):
    """The tensors of a `TileLists`; split: its full_end."""

    begin: Tensor
    split: Tensor
    end: Tensor
    order: Tensor
    tiles: Tensor


class Places(NamedTuple):
    """What is written for every token: as a query low and high, as a key its place (see `TileSchedule`); None: not."""

    low: Tensor | None
    high: Tensor | None
    place: Tensor | None


@dataclass(frozen=True)
class Axis:
    """A mask along one axis; a compile-time constant.

    low, high: the interval, wider than any grid where it is unbounded. stride, clamp: as in `SpacetimeMask`.
    """

    low: int
    high: int
    stride: int
    clamp: bool


class _Boxes(NamedTuple):
    """Of a layout's tiles, between two launches. Packed coordinates count from 1, as in `TileSchedule`.

    corners [10, T]: least and greatest key, first key of any query's box and first that all boxes share, last that they
        share and last of any; least and greatest raster place as keys, and as queries.
    spans [2, S]: the first tile of every segment, and the one past its last; none of a segment without tiles.
    """

    corners: Tensor
    spans: Tensor


class _Side(NamedTuple):
    """Queries, or keys: tiles and segments of their layout, its `_Boxes`; and what its tiles meet of the other side.

    counts [5, T]: tiles met, and those met entirely; the first, the first gap after it, the one past the last.
    """

    tiles: Tensor
    segment_ids: Tensor
    corners: Tensor
    spans: Tensor
    counts: Tensor


def fill(
    queries: Pack,
    keys: Pack | None,
    places: Places,
    by_query: Ranges | Lists,
    by_key: Ranges | Lists,
    overflow: Tensor,
    *,
    axes: tuple[Axis, Axis, Axis],
    full: bool,
    causal: bool,
    joint: tuple[bool, bool],
    tile_sizes: tuple[int, int],
    max_pairs: int,
) -> None:
    """Fill in the numbers of a schedule; all tensors int32 but overflow [] int64.

    keys: None where they share the queries' layout. axes: the mask along t, h, w; causal: it goes by raster place, too;
    full: it forbids nothing. Sides without lists get ranges, of the whole segment or else of the past, by tokens if
    causal, by frames if not. joint, tile_sizes: of the layouts of queries and of keys. The unused places of a list keep
    what they have.
    """
    boxes = key_boxes = None
    if isinstance(by_query, Lists):
        boxes = _boxes(queries, cross=keys is not None)
        key_boxes = boxes if keys is None else _boxes(keys, cross=True)
    mask = {"T_AXIS": axes[0], "H_AXIS": axes[1], "W_AXIS": axes[2], "FULL": full, "CAUSAL": causal}
    if keys is None:
        _launch_tiles(queries, queries, places, by_query, by_key, boxes, tile_sizes[0], {**mask, "JOINT": joint[0]})
    else:
        query_places, key_places = places._replace(place=None), Places(None, None, places.place)
        own, other = ({**mask, "JOINT": is_joint} for is_joint in joint)
        _launch_tiles(queries, keys, query_places, by_query, None, boxes, tile_sizes[0], own)
        _launch_tiles(keys, queries, key_places, None, by_key, key_boxes, tile_sizes[1], other)
    if boxes is None:
        sizes = [side.begin.shape[0] for side in (by_query, by_key)]
        launch(schedule_order_kernel, (max(sizes), 2), by_query, by_key, overflow, *sizes, ROWS=ROWS, num_warps=4)
    else:
        sides = _side(queries, boxes), _side(keys or queries, key_boxes)
        _launch_lists(*sides, by_query, by_key, overflow, max_pairs=max_pairs, causal=causal)


def _boxes(pack: Pack, *, cross: bool) -> _Boxes:
    """cross: the other side is another layout, whose segments may have tiles where this one's have none."""
    new = pack.coords.new_zeros if cross else pack.coords.new_empty
    return _Boxes(pack.coords.new_empty(10, pack.tiles.shape[0] - 1), new(2, pack.grids.shape[0]))


def _side(pack: Pack, boxes: _Boxes) -> _Side:
    return _Side(pack.tiles, pack.segment_ids, *boxes, pack.coords.new_empty(5, pack.tiles.shape[0] - 1))


def _launch_tiles(
    own: Pack,
    other: Pack,
    places: Places,
    by_query: Ranges | Lists | None,
    by_key: Ranges | Lists | None,
    boxes: _Boxes | None,
    tile_size: int,
    mask: dict[str, Any],
) -> None:
    """The first launch, for the tiles of one layout; a side of tiles that it has not is None."""
    sizes = own.segment_ids.shape[0], other.segment_ids.shape[0], own.grids.shape[0]
    launch(
        schedule_tile_kernel,
        (own.tiles.shape[0] - 1,),
        *(own, other.cu_seqlens, places, by_query, by_key, boxes, *sizes),
        **mask,
        TILE=next_power_of_two(tile_size),
        num_warps=1,  # a token or a few for each of 32 threads, and no shared memory for the reductions
    )


def _launch_lists(
    queries: _Side, keys: _Side, by_query: Lists, by_key: Lists, overflow: Tensor, *, max_pairs: int, causal: bool
) -> None:
    sizes = [side.tiles.shape[0] - 1 for side in (queries, keys)]
    room = by_query.tiles.shape[0] - sizes[1]
    shared, grid = (queries, keys), (max(sizes), 2)
    numbers = *sizes, queries.spans.shape[1]
    options = {"CAUSAL": causal, "ROOMY": room >= sizes[0] * sizes[1], "COLUMNS": COLUMNS, "num_warps": 4}
    launch(schedule_count_kernel, grid, *shared, *numbers, **options)
    outputs = by_query, by_key, overflow
    launch(schedule_list_kernel, grid, *shared, *outputs, *numbers, room, max_pairs, **options, ROWS=ROWS)


@triton.jit
def schedule_tile_kernel(
    own,
    other_cu_seqlens,
    places,
    by_query,
    by_key,
    boxes,
    num_tokens,
    num_others,
    num_segments,
    T_AXIS: tl.constexpr,
    H_AXIS: tl.constexpr,
    W_AXIS: tl.constexpr,
    FULL: tl.constexpr,
    CAUSAL: tl.constexpr,
    JOINT: tl.constexpr,
    TILE: tl.constexpr,
):
    tile, num_tiles = tl.program_id(0), tl.num_programs(0)
    start, stop = tl.load(own.tiles + tile), tl.load(own.tiles + tile + 1)
    tokens = start + tl.arange(0, TILE)
    segment = tl.load(own.segment_ids + start, mask=start < stop, other=0)
    # A tile's tokens have places, or none of them has: it is a text's.
    placed = True
    if JOINT:
        placed = tl.load(own.raster + start, mask=start < stop, other=0) >= 0
    _write_places(own, places, segment, tokens, tokens < stop, placed, True, JOINT, T_AXIS, H_AXIS, W_AXIS)
    # Every program sees to its share of the padding.
    used = tl.load(own.tiles + num_tiles)
    for first in range(used + tile * TILE, num_tokens, num_tiles * TILE):
        padding = first + tl.arange(0, TILE)
        _write_places(own, places, 0, padding, padding < num_tokens, True, False, JOINT, T_AXIS, H_AXIS, W_AXIS)
    if boxes is not None:
        _write_box(own, boxes, tile, segment, start, stop, placed, num_tiles, num_tokens, num_segments, T_AXIS, H_AXIS,
                   W_AXIS, CAUSAL, JOINT, TILE)  # fmt: skip
    else:
        _write_ranges(own, other_cu_seqlens, by_query, by_key, tile, segment, start, stop, num_others, FULL, CAUSAL)


@triton.jit
def _write_places(
    own,
    places,
    segment,
    tokens,
    exists,
    placed,
    USED: tl.constexpr,
    JOINT: tl.constexpr,
    T_AXIS: tl.constexpr,
    H_AXIS: tl.constexpr,
    W_AXIS: tl.constexpr,
):
    """placed: whether the tokens have places, always true but if JOINT. USED: they are of a segment, no padding."""
    coords = own.coords + 3 * tokens.to(tl.int64)
    t = tl.load(coords, mask=exists, other=0)
    h = tl.load(coords + 1, mask=exists, other=0)
    w = tl.load(coords + 2, mask=exists, other=0)
    if places.place is not None:
        place = _packed(t + 1, h + 1, w + 1) if USED else tl.zeros_like(t)
        if JOINT:
            place = tl.where(placed, place, _EVERYWHERE)
        tl.store(places.place + tokens, place, mask=exists)
    if places.low is not None:
        low, high = _box(own, segment, t, h, w, T_AXIS, H_AXIS, W_AXIS)
        if JOINT:
            low, high = _widened(low, high, placed)
        tl.store(places.low + tokens, low, mask=exists)
        tl.store(places.high + tokens, high, mask=exists)


@triton.jit
def _packed(t, h, w):
    return t << _T_SHIFT | h << _H_SHIFT | w


@triton.jit
def _box(own, segment, t, h, w, T_AXIS: tl.constexpr, H_AXIS: tl.constexpr, W_AXIS: tl.constexpr):
    """First and last key, packed, that queries at (t, h, w) may attend."""
    grid = own.grids + 3 * segment
    t_low, t_high = _interval(t, grid, T_AXIS, _LARGEST_T)
    h_low, h_high = _interval(h, grid + 1, H_AXIS, _LARGEST_H)
    w_low, w_high = _interval(w, grid + 2, W_AXIS, _LARGEST_W)
    return _packed(t_low, h_low, w_low), _packed(t_high, h_high, w_high)


@triton.jit
def _widened(low, high, placed):
    """The box, or around all places."""
    return tl.where(placed, low, _FIRST), tl.where(placed, high, _LAST)


@triton.jit
def _interval(place, extent, AXIS: tl.constexpr, LARGEST: tl.constexpr):
    """`SpacetimeMask.axis_bounds`, counted from 1; 0 and LARGEST + 1 stand for before and after all (see `TileSchedule`
    for the last key)."""
    anchor = place // AXIS.stride * AXIS.stride + (AXIS.stride - 1) // 2
    if AXIS.clamp:
        anchor = tl.minimum(tl.maximum(anchor, -AXIS.low), tl.load(extent) - 1 - AXIS.high)
    low = tl.minimum(tl.maximum(anchor + AXIS.low + 1, 1), LARGEST + 1)
    high = tl.minimum(tl.maximum(anchor + AXIS.high + 1, 0), LARGEST)
    return low, high


@triton.jit
def _write_ranges(
    own,
    other_cu_seqlens,
    by_query,
    by_key,
    tile,
    segment,
    start,
    stop,
    num_others,
    FULL: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    # No kernel may be led past the capacity by offsets that nobody could check.
    begin = tl.minimum(tl.load(other_cu_seqlens + segment), num_others)
    end = tl.minimum(tl.load(other_cu_seqlens + segment + 1), num_others)
    if start >= stop:
        begin, end = 0, 0
    # A query sees the keys up to `reach`; a key is seen by the queries from `birth` on.
    first_reach, last_reach, first_birth, last_birth = end, end, begin, begin
    if not FULL:  # noqa: SIM102
        if start < stop:
            if CAUSAL:
                first_reach, last_reach, first_birth, last_birth = start + 1, stop, start, stop - 1
            else:
                first = tl.load(own.coords + 3 * start.to(tl.int64))
                last = tl.load(own.coords + 3 * (stop - 1).to(tl.int64))
                first_birth = _frame_start(own, begin, end, first)
                last_birth = _frame_start(own, first_birth, end, last)
                first_reach = _frame_start(own, first_birth, end, first + 1)
                last_reach = _frame_start(own, last_birth, end, last + 1)
    if by_query is not None:
        _write_range(by_query, tile, begin, first_reach, last_reach)
    if by_key is not None:
        _write_range(by_key, tile, first_birth, last_birth, end)


@triton.jit
def _write_range(side, tile, begin, split, end):
    tl.store(side.begin + tile, begin)
    tl.store(side.split + tile, split)
    tl.store(side.end + tile, end)


@triton.jit
def _frame_start(own, first, last, frame):
    """The first of the tokens first … last, in raster order, that is of `frame` or a later one; else last."""
    while first < last:
        step = tl.cdiv(last - first, _SEARCH)
        tokens = first + tl.arange(0, _SEARCH) * step
        t = tl.load(own.coords + 3 * tokens.to(tl.int64), mask=tokens < last, other=1 << 20)
        earlier = tl.sum((t < frame).to(tl.int32), 0)
        last = tl.minimum(first + earlier * step, last)
        first = tl.maximum(first, first + (earlier - 1) * step + 1)
    return first


@triton.jit
def _write_box(
    own,
    boxes,
    tile,
    segment,
    start,
    stop,
    placed,
    num_tiles,
    num_tokens,
    num_segments,
    T_AXIS: tl.constexpr,
    H_AXIS: tl.constexpr,
    W_AXIS: tl.constexpr,
    CAUSAL: tl.constexpr,
    JOINT: tl.constexpr,
    TILE: tl.constexpr,
):
    """What an axis allows never decreases along it: the least and greatest coordinates give all bounds."""
    corner = boxes.corners + tile
    if start < stop:
        tokens = start + tl.arange(0, TILE)
        coords = own.coords + 3 * tokens.to(tl.int64)
        t_min, t_max = _extremes(coords, tokens < stop)
        h_min, h_max = _extremes(coords + 1, tokens < stop)
        w_min, w_max = _extremes(coords + 2, tokens < stop)
        low_min, high_min = _box(own, segment, t_min, h_min, w_min, T_AXIS, H_AXIS, W_AXIS)
        low_max, high_max = _box(own, segment, t_max, h_max, w_max, T_AXIS, H_AXIS, W_AXIS)
        key_min, key_max = _packed(t_min + 1, h_min + 1, w_min + 1), _packed(t_max + 1, h_max + 1, w_max + 1)
        if JOINT:
            key_min, key_max = tl.where(placed, key_min, _EVERYWHERE), tl.where(placed, key_max, _EVERYWHERE)
            low_min, high_max = _widened(low_min, high_max, placed)
            low_max, high_min = _widened(low_max, high_min, placed)
        tl.store(corner, key_min)
        tl.store(corner + num_tiles, key_max)
        tl.store(corner + 2 * num_tiles, low_min)
        tl.store(corner + 3 * num_tiles, low_max)
        tl.store(corner + 4 * num_tiles, high_min)
        tl.store(corner + 5 * num_tiles, high_max)
        if CAUSAL:
            raster_min, raster_max = _extremes(own.raster + tokens, tokens < stop)
            tl.store(corner + 6 * num_tiles, raster_min)
            tl.store(corner + 7 * num_tiles, raster_max)
            if JOINT:  # −1 as keys, behind all as queries
                raster_min, raster_max = raster_min & 0x7FFFFFFF, tl.where(placed, raster_max, 0x7FFFFFFF)
            tl.store(corner + 8 * num_tiles, raster_min)
            tl.store(corner + 9 * num_tiles, raster_max)
        if start == tl.load(own.cu_seqlens + segment):
            tl.store(boxes.spans + segment, tile)
        if stop == tl.minimum(tl.load(own.cu_seqlens + segment + 1), num_tokens):
            tl.store(boxes.spans + num_segments + segment, tile + 1)
    else:
        # A key at 0 lies in no box, and a box that ends at 0 has no key.
        for number in tl.static_range(10 if CAUSAL else 6):
            tl.store(corner + number * num_tiles, 0)


@triton.jit
def _extremes(values, exists):
    least = tl.min(tl.load(values, mask=exists, other=0x7FFFFFFF), 0)
    return least, tl.max(tl.load(values, mask=exists, other=0), 0)


@triton.jit
def _inside(place, low, high):
    return (((place | _GUARD) - low) & ((high | _GUARD) - place) & _GUARD) == _GUARD


@triton.jit
def _decide(own, other, row, columns, valid, num_own, num_other, BY_KEY: tl.constexpr, CAUSAL: tl.constexpr):
    """Which tiles `columns` of the other side the tile `row` meets, and which entirely. BY_KEY: the row is of keys."""
    columns = tl.where(valid, columns, 0)
    if BY_KEY:
        query, num_queries, key, num_keys = other.corners + columns, num_other, own.corners + row, num_own
    else:
        query, num_queries, key, num_keys = own.corners + row, num_own, other.corners + columns, num_other
    key_min, key_max = tl.load(key), tl.load(key + num_keys)
    low_min, low_max = tl.load(query + 2 * num_queries), tl.load(query + 3 * num_queries)
    high_min, high_max = tl.load(query + 4 * num_queries), tl.load(query + 5 * num_queries)
    # Somewhere the greatest key is not before the boxes, and the least not behind; everywhere the other way round.
    meets = valid & _ordered(low_min, key_max) & _ordered(key_min, high_max)
    full = meets & _ordered(low_max, key_min) & _ordered(key_max, high_min)
    if CAUSAL:
        key_min, key_max = tl.load(key + 6 * num_keys), tl.load(key + 7 * num_keys)
        meets = meets & (key_min <= tl.load(query + 9 * num_queries))
        full = full & meets & (key_max <= tl.load(query + 8 * num_queries))
    return meets, full


@triton.jit
def _ordered(low, high):
    """True where on all three axes the packed `low` is not above `high`."""
    return (((high | _GUARD) - low) & _GUARD) == _GUARD


@triton.jit
def _span(own, other, tile, num_segments):
    """The other side's tiles of the tile's segment: the first, and the one past the last; none for an unused tile."""
    start, stop = tl.load(own.tiles + tile), tl.load(own.tiles + tile + 1)
    used = start < stop
    segment = tl.load(own.segment_ids + start, mask=used, other=0)
    first = tl.load(other.spans + segment, mask=used, other=0)
    last = tl.load(other.spans + num_segments + segment, mask=used, other=0)
    return first, last


@triton.jit
def schedule_count_kernel(
    queries,
    keys,
    num_queries,
    num_keys,
    num_segments,
    CAUSAL: tl.constexpr,
    ROOMY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """num_queries, num_keys: of tiles."""
    tile, side = tl.program_id(0), tl.program_id(1)
    if (side == 0) & (tile < num_queries):
        _count(queries, keys, tile, num_queries, num_keys, num_segments, False, CAUSAL, ROOMY, COLUMNS)
    elif (side == 1) & (tile < num_keys):
        _count(keys, queries, tile, num_keys, num_queries, num_segments, True, CAUSAL, ROOMY, COLUMNS)


@triton.jit
def _count(
    own,
    other,
    tile,
    num_own,
    num_other,
    num_segments,
    BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROOMY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first, last = _span(own, other, tile, num_segments)
    met, met_full, lowest, gap, end = 0, 0, num_other, num_other, 0
    for start in range(first, last, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        meets, full = _decide(own, other, tile, columns, columns < last, num_own, num_other, BY_KEY, CAUSAL)
        met += tl.sum(meets.to(tl.int32), 0)
        met_full += tl.sum(full.to(tl.int32), 0)
        if not ROOMY:
            lowest = tl.minimum(lowest, tl.min(tl.where(meets, columns, num_other), 0))
            end = tl.maximum(end, tl.max(tl.where(meets, columns + 1, 0), 0))
            gap = tl.minimum(gap, tl.min(tl.where(full | (columns < lowest), num_other, columns), 0))
    count = own.counts + tile
    tl.store(count, met)
    tl.store(count + num_own, met_full)
    if not ROOMY:
        end = tl.maximum(end, lowest)
        tl.store(count + 2 * num_own, lowest)
        tl.store(count + 3 * num_own, tl.minimum(gap, end))
        tl.store(count + 4 * num_own, end)


@triton.jit
def schedule_list_kernel(
    queries,
    keys,
    by_query,
    by_key,
    overflow,
    num_queries,
    num_keys,
    num_segments,
    room,
    max_pairs,
    CAUSAL: tl.constexpr,
    ROOMY: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """num_queries, num_keys: of tiles."""
    tile, side = tl.program_id(0), tl.program_id(1)
    if (side == 0) & (tile < num_queries):
        # Behind the room all tiles of the other side lie side by side, for rows that do not fit.
        tl.store(by_key.tiles + room + tile, tile)
        begin, rank, taken = _place(queries.counts, tile, num_queries, room, ROOMY, ROWS)
        tl.store(overflow, tl.maximum(taken - max_pairs, 0), mask=tile == 0)
        _write_list(
            by_query, queries, keys, tile, begin, rank, room, num_queries, num_keys, num_segments,
            False, CAUSAL, ROOMY, COLUMNS,
        )  # fmt: skip
    elif (side == 1) & (tile < num_keys):
        tl.store(by_query.tiles + room + tile, tile)
        begin, rank, _ = _place(keys.counts, tile, num_keys, room, ROOMY, ROWS)
        _write_list(
            by_key, keys, queries, tile, begin, rank, room, num_keys, num_queries, num_segments,
            True, CAUSAL, ROOMY, COLUMNS,
        )  # fmt: skip


@triton.jit
def _lengths(counts, rows, before, num_tiles, room, ROOMY: tl.constexpr):
    """Of some rows, the first of which has its list behind `before` others: where each ends, how many tiles it visits;
    and where they all end. A row past the room visits all tiles from the first to the last that it meets.
    """
    exists = rows < num_tiles
    met = tl.load(counts + rows, mask=exists, other=0)
    ends = before + tl.cumsum(met.to(tl.int64), 0)
    lengths = met
    if not ROOMY:
        lowest = tl.load(counts + 2 * num_tiles + rows, mask=exists, other=0)
        end = tl.load(counts + 4 * num_tiles + rows, mask=exists, other=0)
        lengths = tl.where(ends <= room, met, end - lowest)
    return ends, lengths, before + tl.sum(met.to(tl.int64), 0)


@triton.jit
def _place(counts, tile, num_tiles, room, ROOMY: tl.constexpr, ROWS: tl.constexpr):
    """Where the tile's list begins, its place among the longest, and where the last list ends."""
    begin = tl.full([], 0, tl.int64)
    length = tl.full([], 0, tl.int32)
    before = tl.full([], 0, tl.int64)
    for start in range(0, num_tiles, ROWS):
        rows = start + tl.arange(0, ROWS)
        ends, lengths, before = _lengths(counts, rows, before, num_tiles, room, ROOMY)
        begin += tl.sum(tl.where(rows == tile, ends, 0), 0)
        length += tl.sum(tl.where(rows == tile, lengths, 0), 0)
    taken = before
    rank = tl.full([], 0, tl.int32)
    before = tl.full([], 0, tl.int64)
    for start in range(0, num_tiles, ROWS):
        rows = start + tl.arange(0, ROWS)
        _, lengths, before = _lengths(counts, rows, before, num_tiles, room, ROOMY)
        rank += _ahead(lengths, rows, length, tile, num_tiles)
    return begin - tl.load(counts + tile), rank, taken


@triton.jit
def _ahead(lengths, rows, length, tile, num_tiles):
    """How many of the rows come before the tile, longest first and in their order where they are of one length."""
    ahead = (rows < num_tiles) & ((lengths > length) | ((lengths == length) & (rows < tile)))
    return tl.sum(ahead.to(tl.int32), 0)


@triton.jit
def _write_list(
    lists,
    own,
    other,
    tile,
    begin,
    rank,
    room,
    num_own,
    num_other,
    num_segments,
    BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROOMY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tl.store(lists.order + rank, tile)
    count = own.counts + tile
    met, met_full = tl.load(count), tl.load(count + num_own)
    split, end = begin + met_full, begin + met
    if end <= room:
        _write_range(lists, tile, begin.to(tl.int32), split.to(tl.int32), end.to(tl.int32))
        full_place, place = begin.to(tl.int32), split.to(tl.int32)
        first, last = _span(own, other, tile, num_segments)
        for start in range(first, last, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            meets, full = _decide(own, other, tile, columns, columns < last, num_own, num_other, BY_KEY, CAUSAL)
            partial = meets & ~full
            full_places = full_place + tl.cumsum(full.to(tl.int32), 0)
            places = tl.where(full, full_places, place + tl.cumsum(partial.to(tl.int32), 0)) - 1
            tl.store(lists.tiles + places, columns, mask=meets)
            full_place += tl.sum(full.to(tl.int32), 0)
            place += tl.sum(partial.to(tl.int32), 0)
    elif not ROOMY:
        lowest, gap, last = (tl.load(count + 2 * num_own), tl.load(count + 3 * num_own), tl.load(count + 4 * num_own))
        _write_range(lists, tile, room + lowest, room + gap, room + last)


@triton.jit
def schedule_order_kernel(by_query, by_key, overflow, num_queries, num_keys, ROWS: tl.constexpr):
    """Of ranges: which tiles are the longest. num_queries, num_keys: of tiles."""
    tile, side = tl.program_id(0), tl.program_id(1)
    tl.store(overflow, tl.full([], 0, tl.int64), mask=(tile == 0) & (side == 0))
    if side == 0:
        _write_order(by_query, tile, num_queries, ROWS)
    else:
        _write_order(by_key, tile, num_keys, ROWS)


@triton.jit
def _write_order(ranges, tile, num_tiles, ROWS: tl.constexpr):
    if tile < num_tiles:
        length = tl.load(ranges.end + tile) - tl.load(ranges.begin + tile)
        rank = 0
        for start in range(0, num_tiles, ROWS):
            rows = start + tl.arange(0, ROWS)
            ends = tl.load(ranges.end + rows, mask=rows < num_tiles, other=0)
            lengths = ends - tl.load(ranges.begin + rows, mask=rows < num_tiles, other=0)
            rank += _ahead(lengths, rows, length, tile, num_tiles)
        tl.store(ranges.order + rank, tile)
