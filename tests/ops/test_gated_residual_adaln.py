from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from sora_fast.ops.gated_residual_adaln import (
    _gated_residual_adaln,
    _gated_residual_adaln_backward,
    gated_residual_adaln,
)
from sora_fast.packing import RowIndex
from tests.modulated import DTYPES, PATTERNS, WIDTHS, Case, cases, check_against_oracle, check_compiles_once
from tests.tracing import check_unasked

BACKENDS = ("torch", "triton")
SHAPE = {"tokens": 2, "tables": 3}


def formula(residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    h = (residual + gate * branch).to(residual.dtype)
    return h, F.layer_norm(h, h.shape[1:], eps=1e-6) * (1 + scale) + shift


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(case=cases())
def test_random_cases_match_the_oracle(case: Case, backend: str, device: torch.device) -> None:
    check_against_oracle(gated_residual_adaln, formula, case, **SHAPE, device=device, backend=backend)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_patterns_match_the_oracle(pattern: str, backend: str, device: torch.device) -> None:
    case = Case(pattern=pattern)
    check_against_oracle(gated_residual_adaln, formula, case, **SHAPE, device=device, backend=backend, csr=False)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_match_the_oracle(width: int, device: torch.device) -> None:
    case = Case(tokens=5, width=width, rows=2, dtypes=DTYPES[-1])
    check_against_oracle(gated_residual_adaln, formula, case, **SHAPE, device=device, backend="triton")


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(used: int, device: torch.device) -> None:
    *tensors, index = arguments(Case(), device)
    gradients = []
    for backend in BACKENDS:
        output = gated_residual_adaln(*tensors, index, backend=backend)[used]
        gradients.append(torch.autograd.grad(output.square().sum(), tensors, allow_unused=True, materialize_grads=True))
    for plain, kernel in zip(*gradients, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_to_the_bit(backend: str, device: torch.device) -> None:
    *tensors, index = arguments(Case(tokens=40), device)
    runs = []
    for rows in (index, index, RowIndex.from_index(index, len(tensors[-1]))):
        outputs = gated_residual_adaln(*tensors, rows, backend=backend)
        runs.append([*outputs, *torch.autograd.grad(outputs, tensors, [torch.ones_like(o) for o in outputs])])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_tables_that_want_no_gradient_cost_nothing(device: torch.device) -> None:
    *tensors, index = arguments(Case(tokens=40), device)
    check_unasked(partial(gated_residual_adaln, index=index, backend="triton"), tensors, asked=2, spared="_fold")


def test_gradcheck() -> None:
    index = arguments(Case(tokens=6, width=4, rows=3), torch.device("cpu"))[-1]
    inputs = tuple(torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 6, 3, 3, 3))
    assert torch.autograd.gradcheck(lambda *t: gated_residual_adaln(*t, index), inputs)


def test_opcheck(device: torch.device) -> None:
    *tensors, index = arguments(Case(tokens=9, width=8, layout="permuted"), device)
    rows = RowIndex.from_index(index, len(tensors[-1]))
    torch.library.opcheck(_gated_residual_adaln, (*tensors, index, rows.offsets, rows.tokens, 1e-6))
    torch.library.opcheck(_gated_residual_adaln, (*tensors, index, None, None, 1e-6))
    h, branch, gate, _, scale = (tensor.detach() for tensor in tensors)
    stats = torch.rand(2, 9, device=device)
    for dh, tables in ((h, True), (None, False)):
        saved = (h, branch, gate, scale, stats, index, rows.offsets, rows.tokens)
        torch.library.opcheck(_gated_residual_adaln_backward, (dh, h, *saved, tables))


@pytest.mark.parametrize(("backend", "compiler"), [("torch", "inductor"), ("triton", "aot_eager")])
def test_compiles_once_for_ragged_batches(backend: str, compiler: str, device: torch.device) -> None:
    check_compiles_once(gated_residual_adaln, **SHAPE, device=device, backend=backend, compiler=compiler)


X, TABLE, INDEX = torch.zeros(5, 8), torch.zeros(3, 8), torch.zeros(5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X[:, :4], TABLE, TABLE, TABLE, INDEX), ValueError, r"branch: shape \(5, 4\); it must be \[5, 8\]"),
        ((X, X, TABLE[0], TABLE, TABLE, INDEX), ValueError, r"gate: shape \(8,\); it must be \[M, 8\]"),
        ((X, X, TABLE, TABLE[:2], TABLE, INDEX), ValueError, r"shift: shape \(2, 8\); it must be \[3, 8\]"),
        ((X.half(), X.half(), TABLE, TABLE, TABLE.half(), INDEX), TypeError, "scale: float16; it must be float32"),
        ((X, X, TABLE, TABLE, TABLE, INDEX.long()), TypeError, "index: int64; it must be int32"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gated_residual_adaln(*arguments)


def arguments(case: Case, device: torch.device) -> list[Tensor]:
    """residual, branch, gate, shift, scale, index."""
    index = case.index().to(device)
    tensors = case.tensors(case.tokens, 2, torch.float32) + case.tensors(case.rows, 3, torch.float32)
    return [*(tensor.to(device).requires_grad_() for tensor in tensors), index]
