"""JointLayout: the text and the video of a segment in one sequence, for models that attend over both at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sora_fast.packing._bundle import TensorBundle, may_read
from sora_fast.packing._filling import filled
from sora_fast.packing.layout import PackedLayout


@dataclass(frozen=True, eq=False)
class JointLayout(TensorBundle):
    """Text and video tokens of each segment side by side, as Flux, SD3, HunyuanVideo and CogVideoX attend over them.

        joint = JointLayout.build(text_layout, video_layout)
        q, k, v = (joint.merge(*pair) for pair in zip(text_qkv, video_qkv))
        text, video = joint.split(packed_attention(q, k, v, joint.layout, mask))

    Text tokens see all of their segment and all of it sees them, under **any** mask: that goes by the places of video
    tokens alone. Shapes follow from the capacities only.

    layout: of the joint sequence, N = Nt + Nv tokens, with the grids and places of the videos. Text has the place
        (0, 0, 0), which no rotary position turns, and the raster index −1. It is no layout for the ops on patches.
    text_places [Nt], video_places [Nv] int64: where each token lies there; N for padding.
    text_first: whether a segment's text stands before its video. Static.
    is_plain: the sequence is the other two, one behind the other: a single segment, of which what stands first fills
        its capacity. Static, and found where the layouts are on a CPU: batches of either kind take a graph each.
    """

    layout: PackedLayout
    text_places: Tensor
    video_places: Tensor
    text_first: bool = True
    is_plain: bool = False

    @staticmethod
    def build(text: PackedLayout, video: PackedLayout, *, text_first: bool = True) -> "JointLayout":
        """Segment s is that of both, either of which may be empty; never waits for the device.

        The joint tiles are those of the two: lay the videos out for their mask as if they were alone.
        Raises ValueError if the numbers of segments or the devices differ, or one is a joint layout already.
        """
        _check(text, video)
        sides = (text, video) if text_first else (video, text)
        offsets, size = text.cu_seqlens + video.cu_seqlens, text.capacity + video.capacity
        text_places, video_places = _places(*sides) if text_first else _places(*sides)[::-1]
        unplaced = torch.zeros_like(text.coords), torch.full_like(text.raster_index, -1)
        joint = PackedLayout(
            cu_seqlens=offsets,
            grids=video.grids.clone(),
            segment_ids=filled(size, -1, (text_places, text.segment_ids), (video_places, video.segment_ids)),
            coords=filled(size, 0, (text_places, unplaced[0]), (video_places, video.coords)),
            raster_index=filled(size, 0, (text_places, unplaced[1]), (video_places, video.raster_index)),
            tile_offsets=_tile_offsets(*sides, offsets),
            tile_size=max(text.tile_size, video.tile_size),
            is_joint=True,
        )
        return JointLayout(joint, text_places, video_places, text_first, is_plain=_is_whole(sides[0]))

    def merge(self, text: Tensor, video: Tensor) -> Tensor:
        """[Nt, …] and [Nv, …] of one dtype → [N, …], by one copy. Padding is zero, but if the layout `is_plain`: then
        this is `torch.cat`, and may be left out where both are written to one tensor from the start.
        """
        if self.is_plain:
            return torch.cat([text, video] if self.text_first else [video, text])
        return filled(self.layout.capacity, 0, (self.text_places, text), (self.video_places, video))

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """[N, …] → text [Nt, …], video [Nv, …], with zeros for padding; of a layout that `is_plain`, two views."""
        sizes = self.text_places.shape[0], self.video_places.shape[0]
        if self.is_plain:
            first, second = joint.split(sizes if self.text_first else sizes[::-1])
            return (first, second) if self.text_first else (second, first)
        return self._taken(joint, self.text_places), self._taken(joint, self.video_places)

    def _taken(self, joint: Tensor, places: Tensor) -> Tensor:
        last = self.layout.capacity - 1
        rows = joint.index_select(0, places.clamp(max=last))
        return torch.where((places > last).view(-1, *[1] * (joint.dim() - 1)), 0, rows)


def _check(text: PackedLayout, video: PackedLayout) -> None:
    for name, layout in (("text", text), ("video", video)):
        if layout.is_joint:
            raise ValueError(f"{name}: a joint layout already; it must be that of the {name} alone")
    if text.max_segments != video.max_segments:
        raise ValueError(
            f"text: {text.max_segments} segments, but the video layout has {video.max_segments}; they must agree"
        )
    if text.device != video.device:
        raise ValueError(f"text: on {text.device}, but the video layout is on {video.device}")


def _is_whole(layout: PackedLayout) -> bool:
    """A single segment without padding, as far as looking costs nothing."""
    return layout.max_segments == 1 and may_read(layout.cu_seqlens) and int(layout.cu_seqlens[-1]) == layout.capacity


def _places(first: PackedLayout, second: PackedLayout) -> list[Tensor]:
    """Where the tokens of each go if every segment of `first` stands before that of `second`; past the end: padding."""
    size = first.capacity + second.capacity
    places = []
    for own, other, behind in ((first, second, 0), (second, first, 1)):
        tokens = torch.arange(own.capacity, device=own.device)
        places.append(torch.where(own.segment_ids >= 0, _moved(tokens, own, other, behind), size))
    return places


def _moved(starts: Tensor, own: PackedLayout, other: PackedLayout, behind: int) -> Tensor:
    """Places of tokens: as many further as `other` has tokens before them. behind: 1 if it stands first, else 0."""
    segments = torch.searchsorted(own.cu_seqlens, starts.to(torch.int32), right=True) - 1
    return starts + other.cu_seqlens[segments.clamp(max=own.max_segments - 1) + behind]


def _tile_offsets(first: PackedLayout, second: PackedLayout, offsets: Tensor) -> Tensor:
    """The tiles of both, which stay whole, in the joint order. offsets: of the joint segments."""
    starts = []
    for own, other, behind in ((first, second, 0), (second, first, 1)):
        used = own.tile_offsets.diff() > 0
        starts.append(torch.where(used, _moved(own.tile_offsets[:-1], own, other, behind), offsets[-1]))
    return torch.cat([torch.sort(torch.cat(starts))[0], offsets[-1:]])
