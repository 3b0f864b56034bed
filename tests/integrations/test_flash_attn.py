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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "window_size", [(0, 0), (3, 0), (3, 2), (0, 3), (-1, 2), (2, -1), (-1, 0), (16, 16), (15, 1), (400, 400), (-1, -1)]
)
def test_windows(window_size: tuple[int, int], causal: bool) -> None:
    """Key j of query i: i − left ≤ j ≤ i + right; the offsets of keys are a tensor of their own."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(30, 2, 8, requires_grad=True) for _ in range(3))
    left, right = (10**6 if side < 0 else side for side in window_size)
    place = torch.cat([torch.arange(length) for length in LENGTHS])
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    ahead = place[None] - place[:, None]
    allowed = (ahead >= -left) & (ahead <= (0 if causal else right)) & (segment[None] == segment[:, None])
    heads = [x[:23].transpose(0, 1) for x in (q, k, v)]
    results = [
        F.scaled_dot_product_attention(*heads, attn_mask=allowed).transpose(0, 1),
        flash_attn_varlen_func(q, k, v, QUERIES, QUERIES.clone(), 17, 17, causal=causal, window_size=window_size)[:23],
    ]
    gradient = torch.randn(23, 2, 8)
    for a, b in zip(*((out, *torch.autograd.grad(out, (q, k, v), gradient)) for out in results), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (3, 0), (2, 4), (130, 2), (0, -1)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_last_query_stands_at_the_last_key(window_size: tuple[int, int], causal: bool, readable: bool) -> None:
    """More queries than keys, fewer, none of either; what has no key is zero."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(size, heads, 8, requires_grad=True) for size, heads in ((25, 4), (145, 2), (145, 2)))
    left, right = (10**6 if side < 0 else side for side in window_size)
    allowed = torch.zeros(25, 145, dtype=torch.bool)
    for length, others, first, start in zip(LENGTHS, KEY_LENGTHS, QUERIES.tolist(), KEYS.tolist(), strict=False):
        ahead = torch.arange(others)[None] - (torch.arange(length)[:, None] + others - length)
        inside = (ahead >= -left) & (ahead <= (0 if causal else right))
        allowed[first : first + length, start : start + others] = inside
    heads = [x.repeat_interleave(4 // x.shape[1], 1).transpose(0, 1) for x in (q, k, v)]
    scores = (heads[0] @ heads[1].mT * 8**-0.5).masked_fill(~allowed, float("-inf"))
    weights = scores.masked_fill(~allowed.any(1)[:, None], 0).softmax(-1) * allowed.any(1)[:, None]
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not readable:
            for module in ("flash_attn", "lines"):
                monkeypatch.setattr(f"sora_fast.integrations.{module}.may_read", lambda tensor: False)
        options = {"causal": causal, "window_size": window_size, "return_attn_probs": True}
        out, lse, _ = flash_attn_varlen_func(q, k, v, QUERIES, KEYS, 17, 140, **options)
    gradient = torch.randn(25, 4, 8)
    results = [out, (weights @ heads[2]).transpose(0, 1)]
    for a, b in zip(*((x, *torch.autograd.grad(x, (q, k, v), gradient)) for x in results), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_long_sides_of_unequal_lengths() -> None:
    """Past the last coordinate a causal mask goes by the raster order alone."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(size, 1, 8) for size in (3, 1400, 1400))
    allowed = torch.ones(3, 1400, dtype=torch.bool).tril(1397)
    heads = [x.transpose(0, 1) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads, attn_mask=allowed).transpose(0, 1)
    out = flash_attn_varlen_func(q, k, v, offsets([3]), offsets([1400]), 3, 1400, causal=True)
    torch.testing.assert_close(out, expected)


def test_offsets_that_may_not_be_read_are_compared_on_the_device() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in ("flash_attn", "lines"):
            monkeypatch.setattr(f"sora_fast.integrations.{module}.may_read", lambda tensor: False)
        flash_attn_varlen_func(X, X, X, QUERIES, QUERIES.clone(), 17, 17, causal=True)
        with pytest.raises(RuntimeError, match="cu_seqlens_k differs from cu_seqlens_q"):
            flash_attn_varlen_func(X, X, X, QUERIES, offsets([5, 1, 16, 1]), 17, 17, causal=True)
        with pytest.raises(ValueError, match="segments of up to 2000"):  # what the caller says is all there is
            flash_attn_varlen_func(X, X, X, QUERIES, QUERIES, 2000, 2000, window_size=(3, 3))


def test_segments_without_queries_between_equal_ones() -> None:
    """Their keys lie between those of neighbours that a filter would take for neighbours in memory."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(tokens, 2, 8, requires_grad=True) for tokens in (4, 9, 9))
    out = flash_attn_varlen_func(q, k, v, offsets([2, 0, 2]), offsets([3, 3, 3]), 2, 3)
    used = torch.tensor([0, 1, 2, 6, 7, 8])
    heads = [x.unflatten(0, (2, -1)).transpose(1, 2) for x in (q, k[used], v[used])]
    results = [out, F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1)]
    for a, b in zip(*((x, *torch.autograd.grad(x, (q, k, v), torch.ones_like(x))) for x in results), strict=True):
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


X, TEXT, LONG = (torch.zeros(tokens, 2, 8) for tokens in (23, 145, 1023))
LINE = offsets([1023])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, X, X, QUERIES, QUERIES, 17, 17, 0.1), {}, ValueError, "dropout_p: 0.1; there is none here"),
        ((X, X, X, QUERIES, QUERIES, 17, 17), {"window_size": (4,)}, ValueError, "window_size: (4,); it must be two"),
        ((LONG, LONG, LONG, LINE, LINE, 1023, 1023), {"window_size": (4, 0)}, ValueError, "segments of up to 1023"),
        ((X, X, X, QUERIES, QUERIES, 17, 17), {"softcap": 30.0}, ValueError, "softcap: 30.0; there is none here"),
        ((X, X, X, QUERIES, QUERIES, 17, 17), {"block_table": 1}, ValueError, "block_table: 1; there is none here"),
        ((X, X, X, QUERIES, QUERIES, 16, 17), {}, ValueError, "max_seqlen_q: 16, but there is a segment of 17 tokens"),
        ((X, TEXT, TEXT, QUERIES, KEYS, 17, 9), {}, ValueError, "max_seqlen_k: 9, but there is a segment of 140"),
        ((X, X, X, QUERIES.flip(0), QUERIES, 17, 17), {}, ValueError, "cu_seqlens_q: it starts at 23"),
        ((X, X, X, QUERIES, QUERIES + 1, 17, 17), {}, ValueError, "cu_seqlens_k: it starts at 1"),
        ((X, X, X, QUERIES.long(), QUERIES, 17, 17), {}, TypeError, "cu_seqlens_q: int64; it must be int32"),
        ((X, X, X, QUERIES.to("meta"), QUERIES, 17, 17), {}, ValueError, "on meta"),
        ((X, TEXT, TEXT, QUERIES, KEYS[:-1], 17, 9), {}, ValueError, "kv_layout: 3 segments, but the layout has 4"),
        ((X, TEXT, TEXT, QUERIES, KEYS[:-1], 17, 9), {"causal": True}, ValueError, "keys: 3 segments; they must be as"),
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
