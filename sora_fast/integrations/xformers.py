"""Packed attention with the arguments of xformers' function of that name; xformers need not be installed.

Its masks are read by their attributes, as xformers/ops/fmha/attn_bias.py names them: `q_seqinfo` and `k_seqinfo`, each
with `seqstart`, an int32 tensor [S+1], and `seqstart_py`, the same as a list.
"""

from typing import Any

from torch import Tensor

from sora_fast.integrations.lines import layout_from_cu_seqlens
from sora_fast.masks import SpacetimeMask
from sora_fast.ops._checks import check_shape
from sora_fast.ops.packed_attention import packed_attention

# Which masks are causal. The two kinds of causal ones differ only where queries and keys differ in number.
_CAUSAL = {
    "BlockDiagonalMask": False,
    "BlockDiagonalCausalMask": True,
    "BlockDiagonalCausalFromBottomRightMask": True,
}


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any,
    p: float = 0.0,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attention inside every block of an xformers BlockDiagonalMask or BlockDiagonalCausalMask.

    query: [1, M, H, D]; key, value: [1, Mk, Hk, D] → [1, M, H, D]. M and Mk are the sums of the mask's lengths.
    A layout is made from the mask at every call: where layers share it, `layout_from_cu_seqlens` makes it once from
    `attn_bias.q_seqinfo.seqstart` for `packed_attention`.

    Raises TypeError for any other mask, ValueError for dropout (p) and for a causal mask whose queries and keys differ
    in number.
    """
    kind = type(attn_bias).__name__
    if kind not in _CAUSAL:
        raise TypeError(f"attn_bias: {kind}; it must be one of xformers' {', '.join(_CAUSAL)}")
    if p != 0.0:
        raise ValueError(f"p: {p}; there is no dropout here, so it must be 0.0")
    rows, columns = attn_bias.q_seqinfo, attn_bias.k_seqinfo
    for name, tensor, info in (("query", query, rows), ("key", key, columns), ("value", value, columns)):
        check_shape(name, tensor, [1, info.seqstart_py[-1], "H", "D"])
    cross = rows.seqstart_py != columns.seqstart_py
    if cross and _CAUSAL[kind]:
        raise ValueError(
            f"attn_bias: {kind} with other lengths of keys than of queries; only BlockDiagonalMask has them"
        )
    layout, keys = (
        layout_from_cu_seqlens(
            info.seqstart.to(query.device, non_blocking=True), capacity=info.seqstart_py[-1], name="attn_bias"
        )
        for info in (rows, columns)
    )
    mask = SpacetimeMask.token_causal() if _CAUSAL[kind] else None
    qkv = (x.squeeze(0) for x in (query, key, value))
    kv_layout = keys if cross else None
    return packed_attention(*qkv, layout, mask, kv_layout=kv_layout, scale=scale, backend=backend).unsqueeze(0)
