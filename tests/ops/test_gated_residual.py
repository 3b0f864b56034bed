from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from sora_fast.ops._gated_norm import gated_norm, gated_norm_backward
from sora_fast.ops.gated_residual import _gated_residual, _gated_residual_backward, gated_residual
from sora_fast.packing import RowIndex
from tests.helpers import examples
from tests.modulated import (
    DTYPES,
    FEW,
    PATTERNS,
    WIDTHS,
    Case,
    Norm,
    Op,
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


def ungated(residual: Tensor, branch: Tensor) -> Tensor:
    return residual + branch


def without_gate(residual: Tensor, branch: Tensor, index: Any, **options: Any) -> Tensor:
    return gated_residual(residual, branch, None, index, **options)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gate_matches_the_oracle(backend: str, place: int, device: torch.device) -> None:
    options = {"tokens": 2, "tables": 0, "device": device, "backend": backend, "csr": place == 0}
    check_against_oracle(without_gate, ungated, FEW[place], **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gate_keeps_no_tokens(backend: str, device: torch.device) -> None:
    kept: list[Tensor] = []
    residual, branch, _, index = arguments(Case(), device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated_residual(residual, branch, None, index, backend=backend)
    assert not any(x.is_floating_point() for x in kept)


FORMS = [(gate, Norm(kind, weight)) for kind in ("layer", "rms") for weight in (False, True) for gate in (True, False)]


def normed_form(gate: bool, norm: Norm) -> Op:
    """The op that norms its branch; its tensors are residual, branch, the gate and the weight as far as there are any,
    index."""

    def run(residual: Tensor, branch: Tensor, *rest: Any, **options: Any) -> Tensor:
        *tables, index = rest
        vectors = tables[gate:]
        weight = vectors[0] if vectors else None
        options |= {"branch_norm": norm.kind, "branch_weight": weight}
        return gated_residual(residual, branch, tables[0] if gate else None, index, **options)

    return run


def check_normed(
    case: Case, gate: bool, norm: Norm, device: torch.device, backend: str = "triton", *, csr: bool = True
) -> None:
    def formula(residual: Tensor, branch: Tensor, *rest: Tensor) -> Tensor:
        return residual + norm(branch, *rest[gate:]) * (rest[0] if gate else 1)

    options = {"tokens": 2, "tables": int(gate), "vectors": len(norm.vectors)}
    options |= {"device": device, "backend": backend, "csr": csr}
    check_against_oracle(normed_form(gate, norm), formula, case, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_normed_branches_match_the_oracle(backend: str, form: tuple[bool, Norm], device: torch.device) -> None:
    place = int(form[1].weight)
    check_normed(FEW[place], *form, device, backend, csr=place == 0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_a_normed_branch_match_the_oracle(pattern: str, device: torch.device) -> None:
    check_normed(Case(pattern=pattern), True, Norm("rms", weight=True), device, csr=False)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_of_a_normed_branch_match_the_oracle(width: int, device: torch.device) -> None:
    check_normed(Case(tokens=9, width=width, rows=2, dtypes=DTYPES[-1]), True, Norm("rms", weight=True), device)


def test_strides_of_a_normed_branch_past_32_bits(device: torch.device) -> None:
    check_far_apart(normed_form(True, Norm("layer")), **SHAPE, device=device)


def test_a_normed_branch_keeps_itself_and_its_statistics(device: torch.device) -> None:
    case, kept = Case(tokens=45, width=48), []
    *tensors, index = arguments(case, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        normed_form(True, Norm("rms"))(*tensors, index, backend="triton")
    of_tokens = sum(x.nbytes for x in kept if case.tokens in x.shape and x.is_floating_point())
    assert of_tokens == case.tokens * (case.width * 4 + 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_normed_branch_repeats_to_the_bit(backend: str, device: torch.device) -> None:
    *tensors, index = arguments(Case(tokens=40), device)
    runs = []
    for rows in (index, index, RowIndex.from_index(index, Case.rows)):
        out = normed_form(True, Norm("rms"))(*tensors, rows, backend=backend)
        runs.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


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
    assert torch.autograd.gradcheck(lambda *t: without_gate(*t, index), inputs[:2])
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for gate, norm in FORMS:
        given = (*inputs[: 2 + gate], *[weight] * len(norm.vectors))
        assert torch.autograd.gradcheck(lambda *t: normed_form(gate, norm)(*t, index), given)  # noqa: B023


def test_opcheck(device: torch.device) -> None:
    residual, branch, gate, index = arguments(Case(tokens=9, width=8, layout="permuted"), device)
    rows = RowIndex.from_index(index, len(gate))
    torch.library.opcheck(_gated_residual.registered, (residual, branch, gate, index, rows.offsets, rows.tokens))
    torch.library.opcheck(_gated_residual.registered, (residual, branch, gate, index, None, None))
    torch.library.opcheck(_gated_residual.registered, (residual, branch, None, index, None, None))
    weight = torch.randn(8, device=device, requires_grad=True)
    for factors, kind in (((gate, weight), "layer"), ((gate, None), "rms"), ((None, None), "rms")):
        rest = (index, rows.offsets, rows.tokens)
        torch.library.opcheck(gated_norm.registered, (residual, branch, *factors, *rest, kind, 1e-6))
        factors = tuple(None if factor is None else factor.detach() for factor in factors)
        stats = torch.rand(2 if kind == "layer" else 1, 9, device=device)
        saved = (branch.detach(), branch.detach(), *factors, stats, *rest)
        options = (kind, factors[0] is not None, torch.float32)
        torch.library.opcheck(gated_norm_backward.registered, (*saved, *options))
    given = (residual.detach(), branch.detach(), gate.detach())
    for tables in (True, False):
        torch.library.opcheck(_gated_residual_backward.registered, (*given, index, rows.offsets, rows.tokens, tables))


@pytest.mark.parametrize(("backend", "compiler"), [("torch", "inductor"), ("triton", "aot_eager")])
def test_compiles_once_for_ragged_batches(backend: str, compiler: str, device: torch.device) -> None:
    check_compiles_once(gated_residual, **SHAPE, device=device, backend=backend, compiler=compiler)


@pytest.mark.parametrize("op", [without_gate, normed_form(True, Norm("rms"))])
def test_other_forms_compile_once(op: Op, device: torch.device) -> None:
    shape = {"tokens": 2, "tables": int(op is not without_gate)}
    check_compiles_once(op, **shape, device=device, backend="triton", compiler="aot_eager")


def test_empty_pack(device: torch.device) -> None:
    x, index = torch.zeros(0, 8, device=device, requires_grad=True), torch.zeros(0, dtype=torch.int32, device=device)
    gate = torch.zeros(2, 8, device=device, requires_grad=True)
    for options in ({}, {"branch_norm": "rms", "branch_weight": torch.ones(8, device=device)}):
        for table in (gate, None):
            out = gated_residual(x, x, table, index, backend="triton", **options)
            assert torch.autograd.grad(out.sum(), x)[0].shape == (0, 8)


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


WIDE = torch.zeros(5, 8200)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (X, {"branch_norm": "batch"}, ValueError, 'branch_norm: .batch.; it must be "layer" or "rms"'),
        (X, {"branch_weight": X[0]}, ValueError, "branch_weight: given, but branch_norm is None"),
        (X, {"branch_norm": "rms", "branch_weight": X}, ValueError, r"branch_weight: shape \(5, 8\); it must be \[8\]"),
        (X, {"branch_norm": "rms", "eps": 0.0}, ValueError, "eps: 0.0; it must be above 0"),
        (WIDE, {"branch_norm": "rms", "backend": "triton"}, ValueError, "has no triton backend for such tensors"),
    ],
)
def test_a_bad_norm_is_named(x: Tensor, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gated_residual(x, x, None, INDEX, **options)


def arguments(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = case.index().to(device)
    residual, branch = case.tensors(case.tokens, 2, torch.float32)
    (gate,) = case.tensors(case.rows, 1, torch.float32)
    residual, branch, gate = (tensor.to(device).requires_grad_() for tensor in (residual, branch, gate))
    return residual, branch, gate, index
