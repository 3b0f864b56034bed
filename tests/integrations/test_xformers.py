import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_fast.integrations.xformers import memory_efficient_attention
from tests.integrations.test_flash_attn import KEY_LENGTHS, LENGTHS, expected
from tests.integrations.test_lines import offsets


@dataclass
class SeqLenInfo:
    """The attributes of xformers' _SeqLenInfo."""

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @staticmethod
    def of(lengths: list[int]) -> "SeqLenInfo":
        starts = offsets(lengths)
        return SeqLenInfo(starts, max(lengths), min(lengths), starts.tolist())


@dataclass
class BlockDiagonalMask:
    """The attributes of xformers' class of that name."""

    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo
    _batch_sizes: list[int] | None = None


class BlockDiagonalCausalMask(BlockDiagonalMask):
    pass


class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    pass


ROWS, COLUMNS = SeqLenInfo.of(LENGTHS), SeqLenInfo.of(KEY_LENGTHS)


@pytest.mark.parametrize("kind", [BlockDiagonalMask, BlockDiagonalCausalMask])
def test_self_attention(kind: type[BlockDiagonalMask]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 23, 2, 8)
    out = memory_efficient_attention(q, k, v, kind(ROWS, SeqLenInfo.of(LENGTHS)), scale=0.2)
    causal = kind is BlockDiagonalCausalMask
    torch.testing.assert_close(out, expected(q[0], k[0], v[0], 0.2, causal)[None])


def test_cross_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 23, 2, 8), torch.randn(1, 145, 2, 8), torch.randn(1, 145, 2, 8)
    out = memory_efficient_attention(q, k, v, BlockDiagonalMask(ROWS, COLUMNS))
    torch.testing.assert_close(out, expected(q[0], k[0], v[0], None)[None])


X = torch.zeros(1, 23, 2, 8)
SAME = BlockDiagonalMask(ROWS, ROWS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X, X, None), TypeError, "attn_bias: NoneType; it must be one of xformers' BlockDiagonalMask"),
        (
            (X, X, X, BlockDiagonalCausalLocalAttentionMask(ROWS, ROWS)),
            TypeError,
            "attn_bias: BlockDiagonalCausalLocal",
        ),
        ((X, X, X, SAME, 0.1), ValueError, "p: 0.1; there is no dropout here"),
        ((X[0], X, X, SAME), ValueError, "query: shape (23, 2, 8); it must be [1, 23, H, D]"),
        ((X, X[:, 1:], X, SAME), ValueError, "key: shape (1, 22, 2, 8); it must be [1, 23, H, D]"),
        (
            (X, torch.zeros(1, 145, 2, 8), torch.zeros(1, 145, 2, 8), BlockDiagonalCausalMask(ROWS, COLUMNS)),
            ValueError,
            "attn_bias: BlockDiagonalCausalMask with other lengths of keys",
        ),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        memory_efficient_attention(*arguments)
