"""Packed attention with the arguments of flash-attn's function of that name; flash-attn need not be installed."""

from typing import Any

import torch
from torch import Tensor

from sora_fast.integrations.lines import ending_together, layout_from_cu_seqlens
from sora_fast.masks import SpacetimeMask
from sora_fast.ops._checks import check_shape, may_read
from sora_fast.ops.packed_attention import packed_attention
from sora_fast.packing.coordinates import MAX_GRID


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: None = None,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention inside every segment, as flash-attn 2 defines it (flash_attn/flash_attn_interface.py).

    q: [total_q, H, D]; k, v: [total_k, Hk, D]; cu_seqlens_q, cu_seqlens_k: [S+1] int32, first token of every segment.
    max_seqlen_q, max_seqlen_k: that no segment is longer is checked on a CPU.
    causal, window_size: from the last token of a segment on both sides, which stand opposite each other: of Lq queries
        and Lk keys, query i stands at key i + Lk − Lq. window_size: (left, right), tokens that a query sees before and
        after that, both counted in; −1: all. causal makes right 0. Where a window is narrower than the longest segment,
        that may have 1,022 tokens at most, since coordinates reach no further. Of two tensors of offsets that nobody
        may read (on a GPU), with as many tokens and the same longest segment on both sides, it is presumed, and the
        device asserts, that they are equal: self-attention, which takes less time.
    return_attn_probs: also the logsumexp [H, total_q], differentiable here, and None in place of the probabilities.

    What flash-attn leaves as it was, tokens past the last segment, is zero here. A layout is made from the offsets at
    every call: where layers share them, `layout_from_cu_seqlens` makes it once for `packed_attention`.
    Raises ValueError for dropout, softcap, ALiBi and paged keys, which there are none of here.
    """
    _check_absent({"dropout_p": dropout_p, "softcap": softcap}, {"dropout_p": 0.0, "softcap": 0.0})
    _check_absent({"alibi_slopes": alibi_slopes, "block_table": block_table}, {})
    check_shape("q", q, ["total_q", "H", "D"])
    check_shape("k", k, ["total_k", "Hk", "D"])
    layout = layout_from_cu_seqlens(cu_seqlens_q, capacity=q.shape[0], name="cu_seqlens_q")
    cross = cu_seqlens_k is not cu_seqlens_q
    keys = layout_from_cu_seqlens(cu_seqlens_k, capacity=k.shape[0], name="cu_seqlens_k") if cross else None
    _check_longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    _check_longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    mask = _mask(causal, window_size, _longest((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)))
    if keys is not None and not mask.is_full:
        alike = q.shape[0] == k.shape[0] and max_seqlen_q == max_seqlen_k
        if alike and _are_same(cu_seqlens_q, cu_seqlens_k):
            keys = None
        else:
            layout, keys = ending_together(layout, keys)
    result = packed_attention(
        *(q, k, v, layout, mask),
        kv_layout=keys,
        scale=softmax_scale,
        return_lse=return_attn_probs,
        # What PyTorch is told of determinism holds as well.
        deterministic=deterministic or None,
        backend=backend,
    )
    return (result[0], result[1].transpose(0, 1), None) if return_attn_probs else result


def _longest(*sides: tuple[Tensor, int]) -> int:
    """Tokens of the longest segment: as the offsets say, or the caller where nobody may read those."""
    return max(int(offsets.diff().max()) if may_read(offsets) else told for offsets, told in sides)


def _mask(causal: bool, window_size: tuple[int, int], longest: int) -> SpacetimeMask:
    """What flash-attn makes of the two: a side that reaches past the longest segment is no bound."""
    if len(window_size) != 2 or not all(isinstance(side, int) for side in window_size):
        raise ValueError(f"window_size: {window_size}; it must be two whole numbers, (left, right)")
    left, right = (None if side < 0 or side >= longest - 1 else side for side in window_size)
    right = 0 if causal else right
    if left is None and right in (None, 0):
        return SpacetimeMask.full() if right is None else SpacetimeMask.token_causal()
    if longest > MAX_GRID[0]:
        raise ValueError(
            f"window_size: {tuple(window_size)} with segments of up to {longest} tokens; coordinates end at "
            f"{MAX_GRID[0]}, so a window narrower than the longest segment needs segments no longer than that"
        )
    return SpacetimeMask(t=(None if left is None else -left, right))


def _are_same(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> bool:
    """Of offsets that may not be read, the device makes sure by itself: nobody waits for it."""
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        return False
    if may_read(cu_seqlens_q):
        return torch.equal(cu_seqlens_q, cu_seqlens_k)
    message = (
        "cu_seqlens_k differs from cu_seqlens_q, with as many tokens and the same max_seqlen; under a causal mask or a "
        "window they then must be equal on a GPU: give k and v a token of padding, or a larger max_seqlen_k"
    )
    torch._assert_async((cu_seqlens_q == cu_seqlens_k).all(), message)
    return True


def _check_absent(given: dict[str, Any], absent: dict[str, Any]) -> None:
    for name, value in given.items():
        if value != absent.get(name):
            raise ValueError(f"{name}: {value}; there is none here, so it must be {absent.get(name)}")


def _check_longest(name: str, longest: int, cu_seqlens: Tensor) -> None:
    if may_read(cu_seqlens) and longest < (length := int(cu_seqlens.diff().max())):
        raise ValueError(f"{name}: {longest}, but there is a segment of {length} tokens")
