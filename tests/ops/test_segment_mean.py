import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given

from sora_fast import explain
from sora_fast.ops import _dispatch
from sora_fast.ops.segment_mean import segment_mean
from sora_fast.packing import PackedLayout
from tests.helpers import assert_within_rule
from tests.layouts import Pack, packs
from tests.modulated import no_recompilation
from tests.ragged import DTYPES

LAYOUT = PackedLayout.from_grids([(1, 2, 2), (0, 3, 3), (1, 1, 3)], capacity=10, max_segments=4)


def run(op, x, layout, d_means):
    x = x.detach().requires_grad_()
    means = op(x, layout)
    return means, torch.autograd.grad(means, x, d_means.to(means))[0]


def formula(x: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    parts = [x[start:end] for start, end in pairwise(layout.cu_seqlens.tolist())]
    return torch.stack([part.mean(dim=0) if len(part) else part.sum(dim=0) for part in parts])


@given(pack=packs())
def test_random_layouts_match_the_oracle(pack: Pack, device: torch.device) -> None:
    torch.manual_seed(0)
    layout = pack.layout
    padding = (layout.segment_ids < 0)[:, None]
    for dtype in DTYPES:
        x, d_means = torch.randn(layout.capacity, 7).to(dtype), torch.randn(layout.max_segments, 7).to(dtype)
        spoiled = x.masked_fill(padding, float("nan")).to(device)
        actual = run(segment_mean, spoiled, layout.to(device), d_means.to(device))
        plain, oracle = run(formula, x, layout, d_means), run(formula, x.double(), layout, d_means.double())
        for a, p, o in zip(actual, plain, oracle, strict=True):
            assert_within_rule(a, p, o)
        assert not actual[1].cpu()[padding[:, 0]].any()


def test_a_segment_with_nan_keeps_it(device: torch.device) -> None:
    x = torch.ones(10, 2, device=device)
    x[1] = float("nan")
    means = segment_mean(x, LAYOUT.to(device))
    assert means[0].isnan().all() and means[2].tolist() == [1, 1] and not means[1].any() and not means[3].any()


@pytest.mark.parametrize("grid", [(1, 1, 31), (1, 4, 8), (1, 3, 11), (1, 100, 200)])
def test_long_segments_lose_no_digits(grid: tuple[int, int, int]) -> None:
    """Added one by one, 20,000 equal numbers are 3e-4 off."""
    layout = PackedLayout.from_grids([grid, (1, 1, 1)], capacity=math.prod(grid) + 70)
    x = torch.full((layout.capacity, 3), 0.1)
    assert_within_rule(segment_mean(x, layout), formula(x, layout), formula(x.double(), layout))


def test_gradcheck() -> None:
    x = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segment_mean(x, LAYOUT), x)


def test_compiles_once_for_ragged_batches(device: torch.device) -> None:
    compiled = torch.compile(segment_mean, fullgraph=True, backend="aot_eager")
    with no_recompilation():
        for grids in ([(1, 2, 2), (1, 3, 2)], [(2, 2, 2)], [(1, 1, 1)] * 3):
            layout = PackedLayout.from_grids(grids, capacity=10, max_segments=3).to(device)
            x, d_means = torch.randn(10, 4, device=device), torch.randn(3, 4, device=device)
            for a, e in zip(run(compiled, x, layout, d_means), run(segment_mean, x, layout, d_means), strict=True):
                assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(9, 3), ValueError, r"x: shape \(9, 3\); it must be \[10, C\]"),
        (torch.zeros(10), ValueError, r"x: shape \(10,\); it must be \[10, C\]"),
        (torch.zeros(10, 3).int(), TypeError, "x: int32"),
        (torch.zeros(10, 0), ValueError, r"x: shape \(10, 0\); it must have at least one column"),
    ],
)
def test_bad_arguments(x: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        segment_mean(x, LAYOUT)


def test_explain_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_calls", {})
    segment_mean(torch.zeros(10, 3), LAYOUT)
    assert "segment_mean: torch, chosen 1×" in explain()
    with pytest.raises(ValueError, match="segment_mean has no triton backend"):
        segment_mean(torch.zeros(10, 3), LAYOUT, backend="triton")
