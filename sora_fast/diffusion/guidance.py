"""Classifier-free guidance: the unconditional copy is packed beside the conditional one, one call of the model."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sora_fast.diffusion.join import join_conditioning, join_latents, join_layouts, join_rows, join_texts
from sora_fast.diffusion.pixels import pixel_segments
from sora_fast.diffusion.scheduled import scheduled
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents, RowIndex

if TYPE_CHECKING:
    from sora_fast.models.text import PackedText


class Guided:
    """A denoiser for `samplers.sample`: unconditional + scale · (conditional − unconditional).

    model: a SoraDiT, or anything called like one.
    layout: the layout that will be sampled; the model sees it twice, conditional segments 0 … S−1, then S … 2S−1.
    scale: 1 is no guidance; one number, or a tensor [S].
    text, null_text: prompts and what stands for "no prompt", both of S segments. labels, null_labels: [S] each.
    channels: guidance applies to so many first channels of the output, the others are the conditional ones (3 in
        DiT's published samples); None: to all.
    """

    def __init__(
        self,
        model: Callable[..., RaggedLatents],
        layout: PackedLayout,
        *,
        scale: float | Tensor,
        text: "PackedText | None" = None,
        null_text: "PackedText | None" = None,
        labels: Tensor | None = None,
        null_labels: Tensor | None = None,
        channels: int | None = None,
    ) -> None:
        if (text is None) != (null_text is None) or (labels is None) != (null_labels is None):
            raise ValueError("null_text, null_labels: each must be given exactly where text, labels are")
        if text is None and labels is None:
            raise ValueError("text, labels: both None; guidance needs a condition to strengthen")
        if channels is not None and channels < 1:
            raise ValueError(f"channels: {channels}; it must be at least 1, or None for all")
        self.layout, self.channels = layout, channels
        self.scale = torch.as_tensor(scale, dtype=torch.float32, device=layout.device).expand(layout.max_segments)
        self.joined = join_layouts(layout, layout)
        self._rows: tuple[RowIndex, RowIndex] | None = None
        self.inputs: dict[str, object] = {}
        if text is not None:
            self.inputs["text"] = join_texts(text, null_text)
        if labels is not None:
            self.inputs["labels"] = torch.cat([labels, null_labels])
        self.model = scheduled(model, self.joined, self.inputs["text"].layout if text is not None else None)

    def __call__(self, latents: RaggedLatents, layout: PackedLayout, conditioning: Conditioning) -> RaggedLatents:
        """The guided prediction; `layout` must be the one that this was made for."""
        if layout is not self.layout:
            raise ValueError("layout: not the one that this guidance was made for; make a new Guided for it")
        output = self.model(
            join_latents(latents, latents),
            self.joined,
            join_conditioning(conditioning, conditioning, (layout, layout), rows=self._joined_rows(conditioning.rows)),
            **self.inputs,
        )
        segments, size = layout.max_segments, output.flat.shape[0] // 2
        offsets = output.offsets[: segments + 1]
        second = (torch.arange(size, device=offsets.device) + offsets[-1]).clamp(max=2 * size - 1)
        with_condition = RaggedLatents(output.flat[:size], offsets, output.shapes[:segments])
        return with_condition.with_flat(self._guide(with_condition, output.flat[second]))

    def _joined_rows(self, rows: RowIndex) -> RowIndex:
        """Made anew only for other rows: in sampling they are the same at every step."""
        if self._rows is None or self._rows[0] is not rows:
            self._rows = rows, join_rows(rows, rows, (self.layout, self.layout))
        return self._rows[1]

    def _guide(self, output: RaggedLatents, without: Tensor) -> Tensor:
        segment = pixel_segments(output).clamp(max=output.max_segments - 1)
        given, without = (flat.to(torch.promote_types(flat.dtype, torch.float32)) for flat in (output.flat, without))
        strength = self.scale[segment] - 1
        if self.channels is not None:
            place = torch.arange(given.shape[0], device=given.device) - output.offsets[segment]
            frame_pixels = output.shapes[segment, 1:].prod(1).clamp(min=1)
            strength = torch.where(place // frame_pixels < self.channels, strength, 0)
        return strengthened(given, without, strength)


def strengthened(given: Tensor, without: Tensor, strength: Tensor) -> Tensor:
    """The prediction with a condition, moved away from that without it. strength: the scale of guidance − 1; where it
    is 0 the bits of `given` stay."""
    return given + strength * (given - without)
