from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sora_fast.ops.gated_residual_adaln import (
    _gated_residual_adaln,
    _gated_residual_adaln_backward,
    gated_residual_adaln,
)
from sora_fast.packing import RowIndex
from tests.helpers import examples
from tests.modulated import (
    DTYPES,
    FEW,
    NORMS,
    PATTERNS,
    WIDTHS,
    Case,
    Norm,
    Op,
    cases,
    check_against_oracle,
    check_compiles_once,
    check_far_apart,
    without,
)
from tests.tracing import check_unasked

BACKENDS = ("torch", "triton")
SHAPE = {"tokens": 2, "tables": 3}
LAYER, AFFINE_RMS = Norm(), Norm("rms", weight=True, bias=True)


TABLES = ("gate", "shift", "scale")
ABSENT = (("gate",), ("shift",), ("scale",), ("gate", "shift"), TABLES)


def partial_form(op: Op, absent: tuple[str, ...]) -> Op:
    return without(op, absent, tokens=2, names=TABLES)


def check(
    case: Case, norm: Norm, device: torch.device, backend: str, *, csr: bool = True, absent: tuple[str, ...] = ()
) -> None:
    def formula(
        residual: Tensor,
        branch: Tensor,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        *vectors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        h = (residual + branch * (1 if gate is None else gate)).to(residual.dtype)
        return h, norm(h, *vectors) * (1 if scale is None else 1 + scale) + (0 if shift is None else shift)

    options = {"tokens": 2, "tables": 3 - len(absent), "vectors": len(norm.vectors)}
    options |= {"device": device, "backend": backend, "csr": csr}
    op = norm.bound_to(partial_form(gated_residual_adaln, absent))
    check_against_oracle(op, partial_form(formula, absent), case, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@examples(12)
@given(case=cases(), norm=st.sampled_from(NORMS))
def test_random_cases_match_the_oracle(case: Case, norm: Norm, backend: str, device: torch.device) -> None:
    check(case, norm, device, backend)


@pytest.mark.parametrize(
    ("norm", "place", "absent"),
    [*((LAYER, 0, absent) for absent in ABSENT), *((AFFINE_RMS, 1, absent) for absent in (("gate",), TABLES))],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_tables_match_the_oracle(
    backend: str, absent: tuple[str, ...], norm: Norm, place: int, device: torch.device
) -> None:
    check(FEW[place], norm, device, backend, csr=place == 0, absent=absent)


@pytest.mark.parametrize("norm", [LAYER, AFFINE_RMS])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_patterns_match_the_oracle(pattern: str, norm: Norm, backend: str, device: torch.device) -> None:
    check(Case(pattern=pattern), norm, device, backend, csr=False)


@pytest.mark.parametrize("norm", [LAYER, AFFINE_RMS])
@pytest.mark.parametrize("width", WIDTHS)
def test_widths_match_the_oracle(width: int, norm: Norm, device: torch.device) -> None:
    check(Case(tokens=9, width=width, rows=2, dtypes=DTYPES[-1]), norm, device, "triton")


@pytest.mark.parametrize("norm", [LAYER, AFFINE_RMS])
@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(used: int, norm: Norm, device: torch.device) -> None:
    *tensors, index = arguments(Case(), device, norm)
    gradients = []
    for backend in BACKENDS:
        output = norm.bound_to(gated_residual_adaln)(*tensors, index, backend=backend)[used]
        gradients.append(torch.autograd.grad(output.square().sum(), tensors, allow_unused=True, materialize_grads=True))
    for plain, kernel in zip(*gradients, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-4)


def test_strides_past_32_bits(device: torch.device) -> None:
    check_far_apart(gated_residual_adaln, **SHAPE, device=device)


@pytest.mark.parametrize("norm", [LAYER, AFFINE_RMS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_to_the_bit(backend: str, norm: Norm, device: torch.device) -> None:
    *tensors, index = arguments(Case(tokens=40), device, norm)
    runs = []
    for rows in (index, index, RowIndex.from_index(index, Case.rows)):
        outputs = norm.bound_to(gated_residual_adaln)(*tensors, rows, backend=backend)
        runs.append([*outputs, *torch.autograd.grad(outputs, tensors, [torch.ones_like(o) for o in outputs])])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_tables_that_want_no_gradient_cost_nothing(device: torch.device) -> None:
    *tensors, index = arguments(Case(tokens=40), device)
    check_unasked(
        partial(gated_residual_adaln, index=index, backend="triton"), tensors, asked=2, spared="fold_rows_kernel"
    )


def test_a_gate_that_alone_wants_a_gradient(device: torch.device) -> None:
    """Beside a norm with a weight and a bias, which have no part in it."""
    residual, branch, gate, *others, index = arguments(Case(tokens=40), device, AFFINE_RMS)
    op = partial(AFFINE_RMS.bound_to(gated_residual_adaln), backend="triton")
    check_unasked(lambda *t: op(*t, index), [residual, branch, gate, *others], asked=3, spared="fold_kernel")


@pytest.mark.parametrize("norm", [LAYER, AFFINE_RMS])
def test_keeps_two_tensors_and_statistics(norm: Norm, device: torch.device) -> None:
    case, kept = Case(tokens=45, width=48), []
    *tensors, index = arguments(case, device, norm)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        norm.bound_to(gated_residual_adaln)(*tensors, index, backend="triton")
    of_tokens = sum(x.nbytes for x in kept if case.tokens in x.shape and x.is_floating_point())
    assert of_tokens == case.tokens * (2 * case.width * 4 + (8 if norm.kind == "layer" else 4))


def test_without_a_gate_the_branch_is_not_kept(device: torch.device) -> None:
    case, kept = Case(tokens=45, width=48), []
    residual, branch, _, shift, scale, index = arguments(case, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated_residual_adaln(residual, branch, None, shift, scale, index, backend="triton")
    of_tokens = sum(x.nbytes for x in kept if case.tokens in x.shape and x.is_floating_point())
    assert of_tokens == case.tokens * (case.width * 4 + 8)


@pytest.mark.parametrize(
    ("norm", "absent"), [*((norm, ()) for norm in NORMS), *((AFFINE_RMS, absent) for absent in ABSENT)]
)
def test_gradcheck(norm: Norm, absent: tuple[str, ...]) -> None:
    residual, branch, *rest, index = arguments(Case(tokens=6, width=4, rows=3), torch.device("cpu"), norm)
    given = (residual, branch, *rest[len(absent) :])
    op = norm.bound_to(partial_form(gated_residual_adaln, absent))
    assert torch.autograd.gradcheck(lambda *t: op(*t, index), [x.detach().double().requires_grad_() for x in given])


def test_opcheck(device: torch.device) -> None:
    norm = Norm("layer", weight=True, bias=True)
    *tensors, index = arguments(Case(tokens=9, width=8, layout="permuted"), device, norm)
    rows = RowIndex.from_index(index, Case.rows)
    csr = (index, rows.offsets, rows.tokens)
    torch.library.opcheck(_gated_residual_adaln.registered, (*tensors, *csr, "layer", 1e-6))
    torch.library.opcheck(_gated_residual_adaln.registered, (*tensors[:5], None, None, index, None, None, "rms", 1e-6))
    h, branch, gate, _, scale, weight, bias = (tensor.detach() for tensor in tensors)
    stats = torch.rand(2, 9, device=device)
    for dh, tables, affine, kind, asked in (
        (h, (branch, gate, scale), (weight, bias), "layer", (True, True, True)),
        (None, (branch, gate, scale), (weight, None), "rms", (True, False, False)),
        (None, (None, None, None), (None, None), "layer", (False, True, False)),
    ):
        saved = (dh, h, h, *tables, *affine, stats[: 2 if kind == "layer" else 1], *csr, kind)
        torch.library.opcheck(_gated_residual_adaln_backward.registered, (*saved, *asked, torch.float32))


@pytest.mark.parametrize("norm", [LAYER, AFFINE_RMS])
@pytest.mark.parametrize(("backend", "compiler"), [("torch", "inductor"), ("triton", "aot_eager")])
def test_compiles_once_for_ragged_batches(backend: str, compiler: str, norm: Norm, device: torch.device) -> None:
    shape = {**SHAPE, "vectors": len(norm.vectors)}
    op = norm.bound_to(gated_residual_adaln)
    check_compiles_once(op, **shape, device=device, backend=backend, compiler=compiler)


@pytest.mark.parametrize("absent", [("gate",), TABLES])
def test_compiles_without_a_table(absent: tuple[str, ...], device: torch.device) -> None:
    op = partial_form(gated_residual_adaln, absent)
    shape = {"tokens": 2, "tables": 3 - len(absent)}
    check_compiles_once(op, **shape, device=device, backend="triton", compiler="aot_eager")


X, TABLE, INDEX = torch.zeros(5, 8), torch.zeros(3, 8), torch.zeros(5, dtype=torch.int32)


def test_bad_norm_is_named() -> None:
    with pytest.raises(ValueError, match=r"bias: shape \(5, 8\); it must be \[8\]"):
        gated_residual_adaln(X, X, TABLE, TABLE, TABLE, INDEX, bias=X)


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


def arguments(case: Case, device: torch.device, norm: Norm = LAYER) -> list[Tensor]:
    """residual, branch, gate, shift, scale, the norm's weight and bias as far as it has any, index."""
    index = case.index().to(device)
    tensors = case.tensors(case.tokens, 2, torch.float32) + case.tensors(case.rows, 3, torch.float32)
    tensors += torch.randn(len(norm.vectors), case.width)
    return [*(tensor.to(device).requires_grad_() for tensor in tensors), index]
