from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from sora_fast.ops.gated_residual import _gated_residual, _gated_residual_backward, gated_residual
from sora_fast.packing import RowIndex
from tests.helpers import examples
from tests.modulated import (
    DTYPES,
    PATTERNS,
    WIDTHS,
    Case,
    cases,
    check_against_oracle,
    check_compiles_once,
    check_far_apart,
)
from tests.tracing import check_unasked

BACKENDS = ("torch", "triton")
SHAPE = {"tokens": 2, "tables": 1}


def formula(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return residual + gate * branch


@pytest.mark.parametrize("backend", BACKENDS)
@examples(10)
@given(case=cases())
def test_random_cases_match_the_oracle(case: Case, backend: str, device: torch.device) -> None:
    check_against_oracle(gated_residual, formula, case, **SHAPE, device=device, backend=backend)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_patterns_match_the_oracle(pattern: str, backend: str, device: torch.device) -> None:
    case = Case(pattern=pattern)
    check_against_oracle(gated_residual, formula, case, **SHAPE, device=device, backend=backend, csr=False)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_match_the_oracle(width: int, device: torch.device) -> None:
    case = Case(tokens=9, width=width, rows=2, dtypes=DTYPES[-1])
    check_against_oracle(gated_residual, formula, case, **SHAPE, device=device, backend="triton")


def test_rows_of_more_columns_than_a_program_has(device: torch.device) -> None:
    case = Case(tokens=9, width=1030, rows=2)
    check_against_oracle(gated_residual, formula, case, **SHAPE, device=device, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_product_does_not_overflow_fp16(backend: str, device: torch.device) -> None:
    full = torch.full((2, 4), 300.0, dtype=torch.float16, device=device)
    out = gated_residual(-200 * full, full, full[:1], torch.zeros(2, dtype=torch.int32, device=device), backend=backend)
    assert (out == 30000).all()


def test_strides_past_32_bits(device: torch.device) -> None:
    check_far_apart(gated_residual, **SHAPE, device=device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_to_the_bit(backend: str, device: torch.device) -> None:
    residual, branch, gate, index = arguments(Case(tokens=40), device)
    runs = []
    for rows in (index, index, RowIndex.from_index(index, len(gate))):
        out = gated_residual(residual, branch, gate, rows, backend=backend)
        runs.append([out, *torch.autograd.grad(out, (residual, branch, gate), torch.ones_like(out))])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_tables_that_want_no_gradient_cost_nothing(device: torch.device) -> None:
    *tensors, index = arguments(Case(tokens=40), device)
    check_unasked(partial(gated_residual, index=index, backend="triton"), tensors, asked=2, spared="fold_rows_kernel")


def test_gradcheck() -> None:
    _, _, _, index = arguments(Case(tokens=6, width=4, rows=3), torch.device("cpu"))
    inputs = tuple(torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 6, 3))
    assert torch.autograd.gradcheck(lambda *t: gated_residual(*t, index), inputs)


def test_opcheck(device: torch.device) -> None:
    residual, branch, gate, index = arguments(Case(tokens=9, width=8, layout="permuted"), device)
    rows = RowIndex.from_index(index, len(gate))
    torch.library.opcheck(_gated_residual.registered, (residual, branch, gate, index, rows.offsets, rows.tokens))
    torch.library.opcheck(_gated_residual.registered, (residual, branch, gate, index, None, None))
    given = (residual.detach(), branch.detach(), gate.detach())
    for tables in (True, False):
        torch.library.opcheck(_gated_residual_backward.registered, (*given, index, rows.offsets, rows.tokens, tables))


@pytest.mark.parametrize(("backend", "compiler"), [("torch", "inductor"), ("triton", "aot_eager")])
def test_compiles_once_for_ragged_batches(backend: str, compiler: str, device: torch.device) -> None:
    check_compiles_once(gated_residual, **SHAPE, device=device, backend=backend, compiler=compiler)


X, TABLE, INDEX = torch.zeros(5, 8), torch.zeros(3, 8), torch.zeros(5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], X, TABLE, INDEX), ValueError, r"residual: shape \(8,\); it must be \[N, C\]"),
        ((X, X[:4], TABLE, INDEX), ValueError, r"branch: shape \(4, 8\); it must be \[5, 8\]"),
        ((X, X.half(), TABLE, INDEX), TypeError, "branch: float16; it must be float32"),
        ((X, X, TABLE[:, :4], INDEX), ValueError, r"gate: shape \(3, 4\); it must be \[M, 8\]"),
        ((X, X, TABLE, INDEX[:4]), ValueError, r"index: shape \(4,\); it must be \[5\]"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gated_residual(*arguments)


def arguments(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = case.index().to(device)
    residual, branch = case.tensors(case.tokens, 2, torch.float32)
    (gate,) = case.tensors(case.rows, 1, torch.float32)
    residual, branch, gate = (tensor.to(device).requires_grad_() for tensor in (residual, branch, gate))
    return residual, branch, gate, index
