"""PackedKVCache: keys and values of the frames so far, for attention of new frames over old ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sora_fast.packing._bundle import TensorBundle, may_read
from sora_fast.packing._filling import filled
from sora_fast.packing.coordinates import MAX_GRID
from sora_fast.packing.layout import PackedLayout
from sora_fast.packing.order import cut_tiles

# Before all frames.
_FAR = -(1 << 20)


@dataclass(frozen=True, eq=False)
class PackedKVCache(TensorBundle):
    """Keys and values of every layer for the frames that each segment has had so far, in memory of a static size.

        cache = PackedKVCache.empty(layers, heads, head_dim, capacity=..., new_capacity=new.capacity, max_segments=...)
        for new in layouts:  # of the frames that come next, with their places in the whole video: see `frame_tokens`
            cache.append_(new, window=8)
            schedule = TileSchedule.build(new, mask, kv_layout=cache.layout)
            ...  # in every layer, and as often as the new frames change (steps of a sampler):
                k, v = cache.write_(layer, k, v)
                out = packed_attention(q, k, v, new, schedule, kv_layout=cache.layout)

    All shapes are static and everything is changed in place, so that one graph serves all steps. Without gradients.

    layout: of what is held, N tokens, the newest of a segment last. Its tiles follow from the order of the tokens.
    memory [2, L, N+1, Hk, D]: keys, then values; the last row is for padding.
    places [Nn] int64: where the tokens appended last lie; N for padding.
    """

    layout: PackedLayout
    memory: Tensor
    places: Tensor

    @staticmethod
    def empty(
        layers: int,
        heads: int,
        head_dim: int,
        *,
        capacity: int,
        new_capacity: int,
        max_segments: int,
        tile_size: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> "PackedKVCache":
        """heads: of keys and values. capacity: most tokens that are held at a time, those of the new frames included;
        new_capacity: of the layouts that are appended.
        """
        sizes = {"capacity": capacity, "max_segments": max_segments, "tile_size": tile_size}
        layout = PackedLayout.from_grids([], order="tiled", device=device, **sizes)
        memory = torch.zeros(2, layers, capacity + 1, heads, head_dim, dtype=dtype, device=device)
        return PackedKVCache(layout, memory, torch.full((new_capacity,), capacity, device=device))

    def append_(self, new: PackedLayout, *, window: int | None = None, ended: Tensor | None = None) -> "PackedKVCache":
        """Make room for the tokens of `new` behind those of their segments. `write_` then fills it: until then,
        whatever stands there. Never waits for the device. Returns itself.

        window: how many frames before its first new one a segment keeps, as many as the mask looks back; what is older
            is dropped, and a mask that looks further back does not see it. None: all of them.
        ended [S] bool: segments of which nothing is kept, because another video begins.

        Raises ValueError if `new` does not suit the sizes, or is a joint layout, or the window is negative; on a CPU
        also if there is no room, for which elsewhere the device itself stops.
        """
        _check(self, new)
        if window is not None and window < 0:
            raise ValueError(f"window: {window}; it must be a number of frames ≥ 0, or None")
        old, size, segments = self.layout, self.layout.capacity, self.layout.segment_ids.clamp(min=0)
        kept = old.segment_ids >= 0
        if window is not None:
            kept &= old.coords[:, 0] >= (_first_frames(new) - min(window, MAX_GRID[0]))[segments]
        if ended is not None:
            kept &= ~ended[segments]
        before = torch.cat([segments.new_zeros(1), kept.cumsum(0, dtype=torch.int32)])
        remaining = before[old.cu_seqlens.clamp(max=size)]
        _check_room(remaining[-1] + new.cu_seqlens[-1], size)
        old_places = torch.where(kept, before[:-1] + new.cu_seqlens[segments], size).clamp(max=size).long()
        places = torch.arange(new.capacity, device=new.device) + remaining[new.segment_ids + 1]
        self.places.copy_(torch.where(new.segment_ids >= 0, places, size).clamp(max=size))
        self._move(old_places)
        self._describe(old_places, new, (remaining + new.cu_seqlens).clamp(max=size))
        return self

    def write_(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [Nn, Hk, D] of the newest tokens of a layer in their places; once, or again and again.

        Returns all keys and all values of the layer, [N, Hk, D]: views, with whatever in the padding.
        Raises ValueError for what has a gradient, which would get lost.
        """
        for name, x in (("k", k), ("v", v)):
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name}: it has a gradient, which a cache does not carry; it is for torch.no_grad()")
        for memory, rows in zip(self.memory[:, layer], (k, v), strict=True):
            memory.index_copy_(0, self.places, rows)
        keys, values = self.memory[:, layer, :-1]
        return keys, values

    def _move(self, places: Tensor) -> None:
        """Rows to their places, those at N nowhere. A layer at a time, of which there is a copy for that moment."""
        size = self.layout.capacity
        source = places.new_full((size + 1,), size)
        source.index_copy_(0, places, torch.arange(size, device=places.device))
        for rows in self.memory.flatten(0, 1):
            rows.copy_(rows.index_select(0, source))

    def _describe(self, old_places: Tensor, new: PackedLayout, cu_seqlens: Tensor) -> None:
        old, size = self.layout, self.layout.capacity

        def both(name: str, fill: int) -> Tensor:
            parts = (old_places, getattr(old, name)), (self.places, getattr(new, name))
            return filled(size, fill, *parts)

        used = (new.cu_seqlens.diff() > 0)[:, None]
        layout = PackedLayout(
            cu_seqlens=cu_seqlens,
            grids=torch.where(used, new.grids, old.grids),
            segment_ids=both("segment_ids", -1),
            coords=both("coords", 0),
            raster_index=both("raster_index", 0),
            tile_offsets=cut_tiles(cu_seqlens, capacity=size, tile_size=old.tile_size),
            tile_size=old.tile_size,
        )
        old.copy_(layout)


def _first_frames(layout: PackedLayout) -> Tensor:
    """[S] int32: of every segment; before all, of one without tokens."""
    count = layout.max_segments
    segments = torch.where(layout.segment_ids >= 0, layout.segment_ids, count).long()
    far = layout.coords.new_full((count + 1,), _FAR)
    return far.scatter_reduce(0, segments, layout.coords[:, 0], "amin", include_self=False)[:-1]


def _check(cache: PackedKVCache, new: PackedLayout) -> None:
    if new.is_joint:
        raise ValueError("new: a joint layout; a cache is for videos, whose frames have places")
    for name, given, right in (
        ("capacity", new.capacity, cache.places.shape[0]),
        ("max_segments", new.max_segments, cache.layout.max_segments),
        ("device", new.device, cache.layout.device),
    ):
        if given != right:
            raise ValueError(f"new: {name} {given}; the cache was made for {right}")


def _check_room(needed: Tensor, size: int) -> None:
    if may_read(needed) and int(needed) > size:
        raise ValueError(f"new: with it {int(needed)} tokens are held, but the cache has room for {size}")
    if not may_read(needed) and not needed.is_meta:
        torch._assert_async(needed <= size, f"a PackedKVCache has room for {size} tokens, and more are to be held")
