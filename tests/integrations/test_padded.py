import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sora_fast.integrations import PaddedBatch, padded_attention


@st.composite
def masks(draw: st.DrawFn, batch: int) -> Tensor:
    """Any tokens may be missing: at the right, at the left, in the middle, all of them."""
    rows, columns = batch, draw(st.integers(1, 9))
    return torch.tensor(draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))).view(rows, -1)


def expected(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, causal: bool) -> Tensor:
    """[B, L, H, D] by dense attention; zeros where there is nothing to attend."""
    q, k, v = (x.masked_fill(~real[:, :, None, None], 0) for x, real in ((q, queries), (k, keys), (v, keys)))
    allowed = queries[:, :, None] & keys[:, None]
    allowed = allowed & torch.ones_like(allowed).tril() if causal else allowed
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5
    weights = scores.masked_fill(~allowed[:, None], -1e30).softmax(-1) * allowed[:, None]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def check(queries: Tensor, keys: Tensor, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(*mask.shape, 2, 4).masked_fill_(~mask[:, :, None, None], float("nan")).requires_grad_()
        for mask in (queries, keys, keys)
    )
    gradient = torch.randn(q.shape)
    results = [
        padded_attention(q, k, v, keys, **options),
        expected(q, k, v, queries, keys, options.get("causal", False)),
    ]
    for a, b in zip(*((out, *torch.autograd.grad(out, (q, k, v), gradient)) for out in results), strict=True):
        torch.testing.assert_close(a, b)


@given(masks(3), st.booleans())
def test_self_attention(mask: Tensor, causal: bool) -> None:
    check(mask, mask, {"causal": causal})


@given(masks(3), masks(3))
def test_cross_attention(queries: Tensor, keys: Tensor) -> None:
    check(queries, keys, {"query_padding_mask": queries})


def test_a_sample_whose_queries_are_all_padding() -> None:
    queries, keys = torch.ones(3, 2, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    queries[1] = False
    check(queries, keys, {"query_padding_mask": queries})


@given(masks(2))
def test_packed_and_back(mask: Tensor) -> None:
    batch, x = PaddedBatch.of(mask), torch.randn(*mask.shape, 3)
    packed = batch.pack(x)
    assert torch.equal(packed[: mask.sum()], x[mask])
    assert torch.equal(batch.layout.cu_seqlens.diff(), mask.sum(1))
    assert torch.equal(batch.unpack(packed), x)


def test_no_value_is_read() -> None:
    with FakeTensorMode(), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sora_fast.integrations.lines.may_read", lambda tensor: False)
        batch = PaddedBatch.of(torch.ones(2, 5, dtype=torch.bool))
        assert batch.unpack(batch.pack(torch.zeros(2, 5, 3))).shape == (2, 5, 3)


X, MASK = torch.zeros(2, 5, 2, 4), torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, X, X, MASK[0]), {}, ValueError, "key_padding_mask: shape (5,); it must be [2, Lk]"),
        ((X, X, X, MASK.int()), {}, TypeError, "mask: int32; it must be bool"),
        ((X[:0], X[:0], X[:0], MASK[:0]), {}, ValueError, "mask: shape (0, 5); it must have one sample at least"),
        ((X, X, X, MASK[:, 1:]), {}, ValueError, "q: shape (2, 5, 2, 4); it must be [2, 4, H, D]"),
        ((X, X, X[:, 1:], MASK), {}, ValueError, "v: shape (2, 4, 2, 4); it must be [2, 5, H, D]"),
        ((X, X, X, MASK.to("meta")), {}, ValueError, "key_padding_mask: on meta, but q is on cpu"),
        ((X, X, X, MASK), {"query_padding_mask": MASK, "causal": True}, ValueError, "causal: True with query_padding"),
    ],
)
def test_bad_input_is_named(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        padded_attention(*arguments, **options)
