"""Packed attention with the arguments of flash-attn's function of that name; flash-attn need not be installed."""

from typing import Any

from torch import Tensor

from sora_fast.integrations.lines import layout_from_cu_seqlens
from sora_fast.masks import SpacetimeMask
from sora_fast.ops._checks import check_shape, may_read
from sora_fast.ops.packed_attention import packed_attention


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
    max_seqlen_q, max_seqlen_k: not needed; that no segment is longer is checked on a CPU.
    causal: needs one tensor of offsets for both sides.
    return_attn_probs: also the logsumexp [H, total_q], differentiable here, and None in place of the probabilities.

    What flash-attn leaves as it was, tokens past the last segment, is zero here. A layout is made from the offsets at
    every call: where layers share them, `layout_from_cu_seqlens` makes it once for `packed_attention`.
    Raises ValueError for dropout, windows, softcap, ALiBi and paged keys, which there are none of here.
    """
    given = {"dropout_p": dropout_p, "window_size": tuple(window_size), "softcap": softcap}
    _check_absent(given, {"dropout_p": 0.0, "window_size": (-1, -1), "softcap": 0.0})
    _check_absent({"alibi_slopes": alibi_slopes, "block_table": block_table}, {})
    check_shape("q", q, ["total_q", "H", "D"])
    check_shape("k", k, ["total_k", "Hk", "D"])
    cross = cu_seqlens_k is not cu_seqlens_q
    if causal and cross:
        raise ValueError("causal: True, but cu_seqlens_k is not cu_seqlens_q; cross-attention takes the full mask only")
    layout = layout_from_cu_seqlens(cu_seqlens_q, capacity=q.shape[0], name="cu_seqlens_q")
    keys = layout_from_cu_seqlens(cu_seqlens_k, capacity=k.shape[0], name="cu_seqlens_k") if cross else None
    _check_longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    _check_longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    result = packed_attention(
        *(q, k, v, layout, SpacetimeMask.token_causal() if causal else None),
        kv_layout=keys,
        scale=softmax_scale,
        return_lse=return_attn_probs,
        # What PyTorch is told of determinism holds as well.
        deterministic=deterministic or None,
        backend=backend,
    )
    return (result[0], result[1].transpose(0, 1), None) if return_attn_probs else result


def _check_absent(given: dict[str, Any], absent: dict[str, Any]) -> None:
    for name, value in given.items():
        if value != absent.get(name):
            raise ValueError(f"{name}: {value}; there is none here, so it must be {absent.get(name)}")


def _check_longest(name: str, longest: int, cu_seqlens: Tensor) -> None:
    if may_read(cu_seqlens) and longest < (length := int(cu_seqlens.diff().max())):
        raise ValueError(f"{name}: {longest}, but there is a segment of {length} tokens")
