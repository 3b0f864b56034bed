"""Cases of packed attention for the emulated kernels: what they get, and what must come out."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.packing import PackedLayout
from sora_fast.schedule import TileSchedule
from tests.helpers import assert_within_rule
from tests.hopper.emulated import Emulated, Library

NAN = float("nan")
STRIDES = ("plain", "fused", "heads", "padded")


@dataclass(frozen=True, eq=False)
class Case:
    """Random q, k, v of ordinary size, NaN in the padding.

    heads: of k and v; q has `group` times as many. strides: how they lie in memory (see `random_rows`).
    max_pairs: room of the tile lists; None: enough. scale: None is the usual one.
    """

    layout: PackedLayout
    mask: SpacetimeMask = field(default_factory=SpacetimeMask.full)
    kv_layout: PackedLayout | None = None
    heads: int = 1
    group: int = 1
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    strides: str = "plain"
    scale: float | None = None
    max_pairs: int | None = None

    @property
    def keys(self) -> PackedLayout:
        return self.kv_layout or self.layout

    @property
    def factor(self) -> float:
        """Of the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def schedule(self) -> TileSchedule:
        room = {} if self.max_pairs is None else {"max_pairs": self.max_pairs}
        return TileSchedule.build(self.layout, self.mask, kv_layout=self.kv_layout, **room)

    def allowed(self) -> Tensor:
        """[N, Nk] bool."""
        return self.mask.materialize(self.layout, self.kv_layout)

    def inputs(self) -> list[Tensor]:
        """q, k, v."""
        torch.manual_seed(0)
        sides = [(self.layout, self.heads * self.group), (self.keys, self.heads), (self.keys, self.heads)]
        return [
            random_rows(layout.capacity, heads, self.head_dim, self.dtype, self.strides).masked_fill_(
                (layout.segment_ids < 0)[:, None, None], NAN
            )
            for layout, heads in sides
        ]

    def dense(self, qkv: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output and logsumexp [H, N] by one matrix of scores in `dtype`; 0 and -inf where no key is allowed."""
        q, k, v = (x.nan_to_num(0).to(dtype) for x in qkv)
        if not len(k):
            return torch.zeros_like(q), torch.full(q.shape[1::-1], -torch.inf)
        allowed = self.allowed()
        some = allowed.any(dim=1)
        keys, values = (x.repeat_interleave(self.group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * self.factor
        scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(~some[:, None], 0)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1) * some[:, None], values)
        return out, scores.logsumexp(-1).masked_fill(~some, -torch.inf)

    def check(self, library: Library, **manner: int) -> Emulated:
        """The error rule for output and logsumexp; exact zeros and -inf where no key is allowed, padding too."""
        qkv = self.inputs()
        result = library.attention(*qkv, self.schedule(), scale=self.scale, **manner)
        self.compare(result, qkv)
        return result

    def compare(self, result: Emulated, qkv: list[Tensor]) -> None:
        (plain, plain_lse), (oracle, exact_lse) = (self.dense(qkv, dtype) for dtype in (self.dtype, torch.float64))
        some = self.allowed().any(dim=1)
        assert (result.out[~some] == 0).all() and (result.lse[:, ~some] == -torch.inf).all()
        assert_within_rule(result.out, plain, oracle, name="out")
        lse, plain_lse, exact_lse = (x[:, some] for x in (result.lse, plain_lse, exact_lse))
        assert_within_rule(lse, plain_lse.to(lse.dtype), exact_lse, name="lse")


def random_rows(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, strides: str) -> Tensor:
    """[tokens, heads, head_dim]: contiguous, one of three in a fused projection, heads outermost, or rows with gaps."""
    if strides == "fused":
        return torch.randn(tokens, 3, heads, head_dim).to(dtype)[:, 1]
    if strides == "heads":
        return torch.randn(heads, tokens, head_dim).to(dtype).transpose(0, 1)
    if strides == "padded":
        return torch.randn(tokens, heads, head_dim + 8).to(dtype)[..., :head_dim]
    return torch.randn(tokens, heads, head_dim).to(dtype)


def same_bits(one: Emulated, other: Emulated) -> bool:
    """NaN counts as a number of its own, so that what is poisoned can be told from what is not."""
    integers = (torch.int16, torch.int32)
    pairs = zip((one.out, one.lse), (other.out, other.lse), integers, strict=True)
    return all(torch.equal(a.view(kind), b.view(kind)) for a, b, kind in pairs)
