from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from sora_fast.ops.adaln import _adaln, _adaln_backward, adaln
from sora_fast.packing import RowIndex
from tests.modulated import DTYPES, PATTERNS, WIDTHS, Case, cases, check_against_oracle, check_compiles_once
from tests.tracing import check_unasked

BACKENDS = ("torch", "triton")
SHAPE = {"tokens": 1, "tables": 2}


def formula(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], eps=1e-6) * (1 + scale) + shift


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(case=cases())
def test_random_cases_match_the_oracle(case: Case, backend: str, device: torch.device) -> None:
    check_against_oracle(adaln, formula, case, **SHAPE, device=device, backend=backend)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_patterns_match_the_oracle(pattern: str, backend: str, device: torch.device) -> None:
    check_against_oracle(adaln, formula, Case(pattern=pattern), **SHAPE, device=device, backend=backend, csr=False)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_match_the_oracle(width: int, device: torch.device) -> None:
    case = Case(tokens=5, width=width, rows=2, dtypes=DTYPES[-1])
    check_against_oracle(adaln, formula, case, **SHAPE, device=device, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.zeros(24), torch.full((24,), 3.0), 6e4 * torch.linspace(-1, 1, 24)])
def test_extreme_rows_in_fp16(value: Tensor, backend: str, device: torch.device) -> None:
    # Squares of 6e4 overflow fp16, and a constant row has no spread.
    x = value.half().expand(3, 24).to(device).requires_grad_()
    table = torch.zeros(1, 24, device=device)
    y = adaln(x, table, table, torch.zeros(3, dtype=torch.int32, device=device), backend=backend)
    y.backward(torch.ones_like(y))
    assert x.grad is not None and x.grad.isfinite().all()
    exact = F.layer_norm(x.detach().double(), (24,), eps=1e-6)
    assert (y.double() - exact).abs().max() <= torch.finfo(torch.float16).eps * exact.abs().max()


def test_large_mean_loses_no_digits(device: torch.device) -> None:
    # E[x²] − E[x]² in fp32 would leave about one digit here.
    x = 1e4 + torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    table = torch.zeros(1, 96, device=device)
    index = torch.zeros(4, dtype=torch.int32, device=device)
    y = adaln(x.to(device), table, table, index, backend="triton").cpu()
    exact = F.layer_norm(x.double(), (96,), eps=1e-6)
    plain = F.layer_norm(x, (96,), eps=1e-6)
    assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_to_the_bit(backend: str, device: torch.device) -> None:
    x, shift, scale, index = arguments(Case(tokens=40), device)
    runs = []
    for rows in (index, index, RowIndex.from_index(index, len(scale))):
        y = adaln(x, shift, scale, rows, backend=backend)
        runs.append([y, *torch.autograd.grad(y, (x, shift, scale), torch.ones_like(y))])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_tables_that_want_no_gradient_cost_nothing(device: torch.device) -> None:
    *tensors, index = arguments(Case(tokens=40), device)
    check_unasked(partial(adaln, index=index, backend="triton"), tensors, asked=1, spared="_fold")


def test_gradcheck() -> None:
    _, _, _, index = arguments(Case(tokens=6, width=4, rows=3), torch.device("cpu"))
    x, shift, scale = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 3, 3))
    assert torch.autograd.gradcheck(lambda *t: adaln(*t, index), (x, shift, scale))


def test_opcheck(device: torch.device) -> None:
    x, shift, scale, index = arguments(Case(tokens=9, width=8, layout="permuted"), device)
    rows = RowIndex.from_index(index, len(scale))
    torch.library.opcheck(_adaln, (x, shift, scale, index, rows.offsets, rows.tokens, 1e-6))
    torch.library.opcheck(_adaln, (x, shift, scale, index, None, None, 1e-6))
    stats = torch.rand(2, 9, device=device)
    x, scale = x.detach(), scale.detach()
    for tables in (True, False):
        torch.library.opcheck(_adaln_backward, (x, x, scale, stats, index, rows.offsets, rows.tokens, tables))


@pytest.mark.parametrize(("backend", "compiler"), [("torch", "inductor"), ("triton", "aot_eager")])
def test_compiles_once_for_ragged_batches(backend: str, compiler: str, device: torch.device) -> None:
    check_compiles_once(adaln, **SHAPE, device=device, backend=backend, compiler=compiler)


def test_empty_pack(device: torch.device) -> None:
    x = torch.zeros(0, 8, device=device, requires_grad=True)
    table = torch.zeros(2, 8, device=device, requires_grad=True)
    y = adaln(x, table, table, torch.zeros(0, dtype=torch.int32, device=device), backend="triton")
    y.sum().backward()
    assert y.shape == (0, 8) and (table.grad == 0).all()


X, TABLE, INDEX = torch.zeros(5, 8), torch.zeros(3, 8), torch.zeros(5, dtype=torch.int32)
WIDE = torch.zeros(5, 8200)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], TABLE, TABLE, INDEX), {}, ValueError, r"x: shape \(8,\); it must be \[N, C\]"),
        ((X.int(), TABLE, TABLE, INDEX), {}, TypeError, "x: int32; it must be float16 or"),
        (([0.0], TABLE, TABLE, INDEX), {}, TypeError, r"x: list; it must be a tensor \[N, C\]"),
        ((X, TABLE[:, :4], TABLE, INDEX), {}, ValueError, r"shift: shape \(3, 4\); it must be \[M, 8\]"),
        ((X, TABLE, TABLE[:2], INDEX), {}, ValueError, r"scale: shape \(2, 8\); it must be \[3, 8\]"),
        ((X, TABLE.half(), TABLE, INDEX), {}, TypeError, "shift: float16; it must be float32"),
        ((X, TABLE[:0], TABLE[:0], INDEX), {}, ValueError, "shift: .* at least one row"),
        ((X, TABLE, TABLE, INDEX[:4]), {}, ValueError, r"index: shape \(4,\); it must be \[5\]"),
        ((X, TABLE, TABLE, INDEX.long()), {}, TypeError, "index: int64; it must be int32"),
        ((X, TABLE, TABLE, None), {}, TypeError, "index: NoneType; it must be an int32 tensor"),
        ((X, TABLE, TABLE, RowIndex.from_index(INDEX, 2)), {}, ValueError, "index: a RowIndex of 2 rows, .* has 3"),
        ((X, TABLE.to("meta"), TABLE, INDEX), {}, ValueError, "shift: on meta, but x is on cpu"),
        ((X, TABLE, TABLE, INDEX), {"eps": 0}, ValueError, "eps: 0; it must be above 0"),
        ((X, TABLE, TABLE, INDEX), {"backend": "cuda"}, ValueError, "backend: 'cuda' cannot run adaln"),
        ((WIDE, WIDE, WIDE, INDEX), {"backend": "triton"}, ValueError, "adaln has no triton backend for such tensors"),
        ((X.double(), TABLE, TABLE, INDEX), {"backend": "triton"}, ValueError, "backend: 'triton' cannot run adaln"),
    ],
)
def test_bad_input_is_named(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        adaln(*arguments, **options)


def arguments(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = case.index().to(device)
    (x,) = case.tensors(case.tokens, 1, torch.float32)
    shift, scale = case.tensors(case.rows, 2, torch.float32)
    x, shift, scale = (tensor.to(device).requires_grad_() for tensor in (x, shift, scale))
    return x, shift, scale, index
