"""Values of tokens and segments spread over the elements of ragged latents, with static shapes and no sync."""

import torch
from torch import Tensor

from sora_fast.packing import PackedLayout, RaggedLatents

PatchSize = tuple[int, int, int]


def pixel_segments(latents: RaggedLatents) -> Tensor:
    """The segment of every element of `latents.flat`: [P] int64, S past the last video."""
    places = torch.arange(latents.flat.shape[0], device=latents.flat.device)
    return torch.searchsorted(latents.offsets[1:], places, right=True)


def pixel_tokens(layout: PackedLayout, patch_size: PatchSize, latents: RaggedLatents) -> Tensor:
    """The token whose patch holds each element of `latents.flat`: [P] int64, N where there is none.

    None: the token was dropped, or the element lies past the last video. `layout` must be the one of `latents`, its
    grids the videos' (T, H, W) divided by `patch_size`, rounded up; this is not checked, it would wait for the device.
    """
    size = latents.flat.shape[0]
    segments = pixel_segments(latents)
    inside = segments < latents.max_segments
    segments = segments.clamp(max=latents.max_segments - 1)
    # 32 bits inside a video: integer division is what this costs, and it is twice as fast.
    place = (torch.arange(size, device=segments.device) - latents.offsets[segments]).int()
    frames, height, width = (latents.shapes[:, axis].clamp(min=1)[segments] for axis in (1, 2, 3))
    line = _divide(place, width)
    frame = _divide(line, height)
    t = _divide(frame % frames, patch_size[0])
    h = _divide(line - frame * height, patch_size[1])
    w = _divide(place - line * width, patch_size[2])
    counts = layout.grids.long().prod(1)
    first_patch = counts.cumsum(0) - counts
    rows, columns = (layout.grids[:, axis][segments] for axis in (1, 2))
    patches = torch.where(inside, first_patch[segments] + (t * rows + h) * columns + w, size)
    return _token_of_patch(layout, first_patch, size)[patches]


def _divide(value: Tensor, by: Tensor | int) -> Tensor:
    # Nothing here is negative; rounding towards zero is the cheaper one.
    return torch.div(value, by, rounding_mode="trunc")


def _token_of_patch(layout: PackedLayout, first_patch: Tensor, size: int) -> Tensor:
    """[size + 1]: token of each patch of the full grids, one after the other. A patch has at least one pixel, so the
    pixels' number bounds the patches' even where tokens were dropped; the last place stands for "none"."""
    ids, tokens = layout.segment_ids.long(), layout.capacity
    used = ids >= 0
    patches = torch.where(used, first_patch[ids.clamp(min=0)] + layout.raster_index, size)
    values = torch.where(used, torch.arange(tokens, device=ids.device), tokens)
    return torch.full((size + 1,), tokens, device=ids.device).scatter(0, patches, values)


def spread(values: Tensor, index: Tensor, fill: float = 0) -> Tensor:
    """values[index] for a [K] tensor, where the index K means `fill`: what `pixel_segments` and `pixel_tokens` need."""
    return torch.cat([values, values.new_full((1,), fill)])[index]


def token_to_pixels(
    values: Tensor, layout: PackedLayout, patch_size: PatchSize, latents: RaggedLatents, fill: float = 0
) -> Tensor:
    """A value per token [N] as a value per element of `latents.flat` [P]; `fill` where there is no token."""
    if values.shape != (layout.capacity,):
        raise ValueError(f"values: shape {tuple(values.shape)}; it must be [{layout.capacity}], one a token")
    return spread(values, pixel_tokens(layout, patch_size, latents), fill)


def channel_half(output: RaggedLatents, like: RaggedLatents, half: int) -> Tensor:
    """The first (0) or second (1) half of the channels of `output`, laid out as `like`: [P], `like` having C channels
    where `output` has 2C. What lies past the last video is unspecified."""
    segments = pixel_segments(like).clamp(max=like.max_segments - 1)
    places = torch.arange(like.flat.shape[0], device=segments.device) - like.offsets[segments]
    sizes = like.offsets.diff()[segments]
    source = output.offsets[segments] + half * sizes + places
    return output.flat[source.clamp(max=output.flat.shape[0] - 1)]
