"""Conditioning: the noise level of every token, through the row of the modulation table that it points to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sora_fast.packing._bundle import TensorBundle
from sora_fast.packing.layout import PackedLayout


@dataclass(frozen=True, eq=False)
class RowIndex(TensorBundle):
    """Tokens → rows, and rows → tokens in CSR form, which makes every reduction over a row's tokens deterministic.

    index [N] int32: row of every token, −1 for padding.
    offsets [M+1] int32: the tokens of row m are tokens[offsets[m]:offsets[m+1]].
    tokens [N] int32: tokens sorted by row, ascending inside a row; padding tokens past offsets[M].
    """

    index: Tensor
    offsets: Tensor
    tokens: Tensor

    @property
    def num_rows(self) -> int:
        """M, the static number of rows."""
        return self.offsets.shape[0] - 1

    @staticmethod
    def from_index(index: Tensor, num_rows: int) -> "RowIndex":
        """Sort `index` [N] (int32, −1: padding) on its device, without waiting for it. TypeError for another dtype."""
        if not isinstance(index, Tensor) or index.dtype != torch.int32:
            raise TypeError(f"index: {getattr(index, 'dtype', type(index).__name__)}; it must be an int32 tensor")
        key = torch.where(index < 0, num_rows, index)
        ordered, tokens = torch.sort(key, stable=True)
        bounds = torch.arange(num_rows + 1, dtype=key.dtype, device=key.device)
        offsets = torch.searchsorted(ordered, bounds, out_int32=True)
        return RowIndex(index, offsets, tokens.to(torch.int32))


@dataclass(frozen=True, eq=False)
class Conditioning(TensorBundle):
    """M rows, each a (segment, sigma) pair, and the row of every token.

    sigma [M] float32: noise level, 0 clean … 1 pure noise.
    segment [M] int32: the segment that the row belongs to.
    rows: which row every token points to.
    sigma_end [M] float32: the lower level that a model of a flow map is to lead to (see diffusion/flow_map.py); None:
        none is asked for, which such a model takes as `sigma` itself.
    """

    sigma: Tensor
    segment: Tensor
    rows: RowIndex
    sigma_end: Tensor | None = None

    @property
    def index(self) -> Tensor:
        """[N] int32: row of every token, −1 for padding."""
        return self.rows.index

    @staticmethod
    def per_segment(sigma: Tensor, layout: PackedLayout) -> "Conditioning":
        """One noise level a segment; M = S. sigma: [S]."""
        _check("sigma", sigma, (layout.max_segments,), layout)
        tokens = torch.arange(layout.capacity, dtype=torch.int32, device=layout.device)
        # A segment's tokens are contiguous, so the layout already is the CSR form.
        rows = RowIndex(layout.segment_ids, layout.cu_seqlens, tokens)
        return Conditioning(sigma.float(), _segments(layout), rows)

    @staticmethod
    def with_clean(
        sigma: Tensor,
        clean: Tensor,
        layout: PackedLayout,
        *,
        rows: RowIndex | None = None,
        sigma_end: Tensor | None = None,
    ) -> "Conditioning":
        """Some tokens kept clean; M = 2S: row s is segment s at sigma[s], row S + s is segment s at 0.

        sigma: [S], and so `sigma_end` if it is given; clean: [N] bool, True where the token is given clean. rows: those
        of an earlier call with the same clean tokens and layout, which spare a sort.
        """
        _check("sigma", sigma, (layout.max_segments,), layout)
        if sigma_end is not None:
            _check("sigma_end", sigma_end, (layout.max_segments,), layout)
        _check("clean", clean, (layout.capacity,), layout)
        if clean.dtype != torch.bool:
            raise TypeError(f"clean: {clean.dtype}; it must be bool")
        segments, ids = layout.max_segments, layout.segment_ids
        if rows is None:
            rows = RowIndex.from_index(torch.where(clean & (ids >= 0), ids + segments, ids), 2 * segments)
        ends = None if sigma_end is None else _and_clean(sigma_end)
        return Conditioning(_and_clean(sigma), _segments(layout).repeat(2), rows, ends)

    @staticmethod
    def per_frame(sigma: Tensor, layout: PackedLayout) -> "Conditioning":
        """One noise level a frame (diffusion forcing); M = S·F: row s·F + t is frame t of segment s.

        sigma: [S, F] with F at least the number of latent frames of every segment; later frames are not checked, since
        that would wait for the device.
        """
        if sigma.ndim != 2:
            raise ValueError(f"sigma: shape {tuple(sigma.shape)}; it must be [{layout.max_segments}, F]")
        frames = sigma.shape[1]
        _check("sigma", sigma, (layout.max_segments, frames), layout)
        ids = layout.segment_ids
        index = torch.where(ids >= 0, ids * frames + layout.coords[:, 0], ids)
        segment = _segments(layout).repeat_interleave(frames)
        return Conditioning(sigma.float().flatten(), segment, RowIndex.from_index(index, segment.shape[0]))


def _and_clean(levels: Tensor) -> Tensor:
    """[S] → [2S]: the same levels, then as many zeros."""
    return torch.cat([levels.float(), torch.zeros_like(levels, dtype=torch.float32)])


def _segments(layout: PackedLayout) -> Tensor:
    return torch.arange(layout.max_segments, dtype=torch.int32, device=layout.device)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], layout: PackedLayout) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; it must be {list(shape)} for this layout")
    if tensor.device != layout.device:
        raise ValueError(f"{name}: on {tensor.device}, but the layout is on {layout.device}")
