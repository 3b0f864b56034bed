import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.integrations.flash_attn import flash_attn_varlen_func
from tests.integrations.test_lines import offsets

LENGTHS, KEY_LENGTHS = [5, 0, 17, 1], [3, 2, 0, 140]
QUERIES, KEYS = offsets(LENGTHS), offsets(KEY_LENGTHS)


def expected(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool = False) -> Tensor:
    """SDPA of each segment; zeros for what has no key."""
    group = q.shape[1] // k.shape[1]
    parts = []
    key_lengths = LENGTHS if len(k) == len(q) else KEY_LENGTHS
    for a, b, c in zip(q.split(LENGTHS), k.split(key_lengths), v.split(key_lengths), strict=True):
        heads = [x.transpose(0, 1) for x in (a, b.repeat_interleave(group, 1), c.repeat_interleave(group, 1))]
        parts.append(F.scaled_dot_product_attention(*heads, is_causal=causal, scale=scale).transpose(0, 1))
    return torch.cat(parts).nan_to_num(0)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(causal: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(23, heads, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    results = [
        flash_attn_varlen_func(q, k, v, QUERIES, QUERIES, 17, 17, softmax_scale=0.2, causal=causal),
        expected(q, k, v, 0.2, causal),
    ]
    gradient = torch.randn(23, 4, 8)
    for a, b in zip(*((out, *torch.autograd.grad(out, (q, k, v), gradient)) for out in results), strict=True):
        torch.testing.assert_close(a, b)


def test_cross_attention_and_its_logsumexp() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(23, 4, 8), torch.randn(145, 4, 8), torch.randn(145, 4, 8)
    out, lse, probabilities = flash_attn_varlen_func(
        q, k, v, QUERIES, KEYS, 17, 140, deterministic=True, return_attn_probs=True
    )
    torch.testing.assert_close(out, expected(q, k, v, None))
    assert lse.shape == (4, 23) and probabilities is None
    torch.testing.assert_close(lse[:, :5], torch.einsum("qhd,khd->hqk", q[:5], k[:3]).mul(8**-0.5).logsumexp(-1))
    assert (lse[:, 5:22] == float("-inf")).all(), "the third segment has no key"


def test_tokens_past_the_end_are_padding() -> None:
    x = torch.randn(30, 2, 8)
    x[23:] = float("nan")
    out = flash_attn_varlen_func(x, x, x, QUERIES, QUERIES, 17, 17)
    assert not out[23:].any()
    assert torch.equal(out[:23], flash_attn_varlen_func(x[:23], x[:23], x[:23], QUERIES, QUERIES, 17, 17))


X, TEXT = torch.zeros(23, 2, 8), torch.zeros(145, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, X, X, QUERIES, QUERIES, 17, 17, 0.1), {}, ValueError, "dropout_p: 0.1; there is none here"),
        (
            (X, X, X, QUERIES, QUERIES, 17, 17),
            {"window_size": (4, 0)},
            ValueError,
            "window_size: (4, 0); there is none",
        ),
        ((X, X, X, QUERIES, QUERIES, 17, 17), {"softcap": 30.0}, ValueError, "softcap: 30.0; there is none here"),
        ((X, X, X, QUERIES, QUERIES, 17, 17), {"block_table": 1}, ValueError, "block_table: 1; there is none here"),
        ((X, X, X, QUERIES, QUERIES, 16, 17), {}, ValueError, "max_seqlen_q: 16, but there is a segment of 17 tokens"),
        ((X, TEXT, TEXT, QUERIES, KEYS, 17, 9), {}, ValueError, "max_seqlen_k: 9, but there is a segment of 140"),
        ((X, X, X, QUERIES.flip(0), QUERIES, 17, 17), {}, ValueError, "cu_seqlens_q: it starts at 23"),
        ((X, X, X, QUERIES, QUERIES + 1, 17, 17), {}, ValueError, "cu_seqlens_k: it starts at 1"),
        ((X, X, X, QUERIES.long(), QUERIES, 17, 17), {}, TypeError, "cu_seqlens_q: int64; it must be int32"),
        ((X, X, X, QUERIES.to("meta"), QUERIES, 17, 17), {}, ValueError, "on meta"),
        (
            (X, TEXT, TEXT, QUERIES, KEYS, 17, 140),
            {"causal": True},
            ValueError,
            "causal: True, but cu_seqlens_k is not",
        ),
        ((X, TEXT, TEXT, QUERIES, KEYS[:-1], 17, 9), {}, ValueError, "kv_layout: 3 segments, but the layout has 4"),
        ((X, X.half(), X, QUERIES, QUERIES, 17, 17), {}, TypeError, "k: float16; it must be float32"),
        ((X, X[:, :, :4], X, QUERIES, QUERIES, 17, 17), {}, ValueError, "k: shape (23, 2, 4)"),
        ((X[0], X, X, QUERIES, QUERIES, 17, 17), {}, ValueError, "q: shape (2, 8); it must be [total_q, H, D]"),
    ],
)
def test_bad_input_is_named(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        flash_attn_varlen_func(*arguments, **options)
