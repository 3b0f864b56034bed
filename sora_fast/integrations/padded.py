"""Padded batches [B, L, …] with a mask of their real tokens, packed and put back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sora_fast.integrations.lines import layout_from_cu_seqlens
from sora_fast.masks import SpacetimeMask
from sora_fast.ops._checks import check_device, check_dtype, check_shape
from sora_fast.ops.packed_attention import packed_attention
from sora_fast.packing import PackedLayout


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Where the tokens of a padded batch lie in a pack: the real ones first, sample after sample, then all padding.

    layout: of the pack, B · L tokens, a segment a sample, with the tokens in line.
    order [B · L] int64: which token of the batch stands at each place of the pack; places: the inverse.
    """

    layout: PackedLayout
    order: Tensor
    places: Tensor
    shape: tuple[int, int]

    @staticmethod
    def of(mask: Tensor) -> "PaddedBatch":
        """mask: [B, L] bool, True for real tokens, wherever they stand. Never waits for the device."""
        check_shape("mask", mask, ["B", "L"])
        check_dtype("mask", mask, [torch.bool])
        if not mask.shape[0]:
            raise ValueError(f"mask: shape {tuple(mask.shape)}; it must have one sample at least")
        lengths = mask.sum(dim=1, dtype=torch.int32)
        cu_seqlens = torch.cat([torch.zeros_like(lengths[:1]), lengths.cumsum(0, dtype=torch.int32)])
        order = torch.argsort((~mask).flatten().to(torch.uint8), stable=True)
        layout = layout_from_cu_seqlens(cu_seqlens, capacity=mask.numel())
        return PaddedBatch(layout, order, torch.argsort(order), tuple(mask.shape))

    def pack(self, x: Tensor) -> Tensor:
        """[B, L, …] → [B · L, …]: the real tokens, then the padding as it is."""
        return x.flatten(0, 1)[self.order]

    def unpack(self, x: Tensor) -> Tensor:
        """[B · L, …] → [B, L, …]."""
        return x[self.places].unflatten(0, self.shape)


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor,
    *,
    query_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention inside every sample of a padded batch, whose padding costs nothing and may hold anything, NaN too.

    q: [B, L, H, D]; k, v: [B, Lk, Hk, D] → [B, L, H, D], zeros for padding and where a sample has no key.
    key_padding_mask: [B, Lk] bool, True for real tokens; query_padding_mask: [B, L]; None: self-attention, the same.
    causal: keys that do not come after the query; self-attention only.
    The pack is made at every call: a model that packs once, by `PaddedBatch`, spares its other layers the padding too.
    """
    cross = query_padding_mask is not None
    if cross and causal:
        raise ValueError("causal: True with query_padding_mask; cross-attention takes the full mask only")
    query_mask = query_padding_mask if cross else key_padding_mask
    check_shape("key_padding_mask", key_padding_mask, [q.shape[0], "Lk"])
    for name, mask, (side, x) in (
        ("query_padding_mask" if cross else "key_padding_mask", query_mask, ("q", q)),
        ("key_padding_mask", key_padding_mask, ("k", k)),
        ("key_padding_mask", key_padding_mask, ("v", v)),
    ):
        check_shape(side, x, [*mask.shape, "H", "D"])
        check_device(name, mask, side, x.device)
    keys = PaddedBatch.of(key_padding_mask)
    queries = PaddedBatch.of(query_mask) if cross else keys
    out = packed_attention(
        *(queries.pack(q), keys.pack(k), keys.pack(v), queries.layout),
        SpacetimeMask.token_causal() if causal else None,
        kv_layout=keys.layout if cross else None,
        scale=scale,
        backend=backend,
    )
    return queries.unpack(out)
