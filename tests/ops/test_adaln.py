from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sora_fast.ops.adaln import _adaln, _adaln_backward, adaln
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
SHAPE = {"tokens": 1, "tables": 2}
LAYER, AFFINE_RMS = Norm(), Norm("rms", weight=True, bias=True)


ABSENT = (("shift",), ("scale",), ("shift", "scale"))


def partial_form(op: Op, absent: tuple[str, ...]) -> Op:
    return without(op, absent, tokens=1, names=("shift", "scale"))


def check(
    case: Case, norm: Norm, device: torch.device, backend: str, *, csr: bool = True, absent: tuple[str, ...] = ()
) -> None:
    def formula(x: Tensor, shift: Tensor | None, scale: Tensor | None, *vectors: Tensor) -> Tensor:
        return norm(x, *vectors) * (1 if scale is None else 1 + scale) + (0 if shift is None else shift)

    options = {"tokens": 1, "tables": 2 - len(absent), "vectors": len(norm.vectors)}
    options |= {"device": device, "backend": backend, "csr": csr}
    op = norm.bound_to(partial_form(adaln, absent))
    check_against_oracle(op, partial_form(formula, absent), case, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@examples(15)
@given(case=cases(), norm=st.sampled_from(NORMS))
def test_random_cases_match_the_oracle(case: Case, norm: Norm, backend: str, device: torch.device) -> None:
    check(case, norm, device, backend)


@pytest.mark.parametrize(("norm", "place"), [(LAYER, 0), (AFFINE_RMS, 1)])
@pytest.mark.parametrize("absent", ABSENT)
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


def test_many_rows_in_groups(device: torch.device) -> None:
    # Rows of a few tokens, whole in a chunk or cut by its end, and of none; a program of the fold looks at two of them.
    check(Case(tokens=600, width=8, rows=300), Norm("layer", weight=True, bias=True), device, "triton")


def test_rows_of_many_chunks(device: torch.device) -> None:
    check(Case(tokens=240, width=3, rows=2), Norm("layer", weight=True, bias=True), device, "triton")


def test_more_rows_need_no_more_scratch(device: torch.device) -> None:
    from sora_fast.kernels._launch import recording
    from sora_fast.kernels._rows import Sums

    parts = set()
    for pattern in ("single row", "row a token"):
        case = Case(pattern=pattern)
        x, *tables = case.tensors(case.tokens, 1, torch.float32) + case.tensors(case.table_rows, 2, torch.float32)
        tensors = [t.to(device).requires_grad_() for t in (x, *tables)]
        y = adaln(*tensors, case.index().to(device), backend="triton")
        with recording((9, 0)) as recorder:
            torch.autograd.grad(y, tensors, torch.ones_like(y))
        parts |= {arg.parts.shape for _, args, _ in recorder.launches for arg in args if isinstance(arg, Sums)}
    assert len(parts) == 1


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.zeros(24), torch.full((24,), 3.0), 6e4 * torch.linspace(-1, 1, 24)])
def test_extreme_rows_in_fp16(value: Tensor, backend: str, norm: str, device: torch.device) -> None:
    # Squares of 6e4 overflow fp16, and a constant row has no spread.
    x = value.half().expand(3, 24).to(device).requires_grad_()
    table = torch.zeros(1, 24, device=device)
    y = adaln(x, table, table, torch.zeros(3, dtype=torch.int32, device=device), norm=norm, backend=backend)
    y.backward(torch.ones_like(y))
    assert x.grad is not None and x.grad.isfinite().all()
    exact = (F.layer_norm if norm == "layer" else F.rms_norm)(x.detach().double(), (24,), eps=1e-6)
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


def test_strides_past_32_bits(device: torch.device) -> None:
    check_far_apart(adaln, **SHAPE, device=device)


@pytest.mark.parametrize("norm", [LAYER, AFFINE_RMS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_to_the_bit(backend: str, norm: Norm, device: torch.device) -> None:
    *tensors, index = arguments(Case(tokens=40), device, norm)
    runs = []
    for rows in (index, index, RowIndex.from_index(index, Case.rows)):
        y = norm.bound_to(adaln)(*tensors, rows, backend=backend)
        runs.append([y, *torch.autograd.grad(y, tensors, torch.ones_like(y))])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_tables_that_want_no_gradient_cost_nothing(device: torch.device) -> None:
    *tensors, index = arguments(Case(tokens=40), device)
    check_unasked(partial(adaln, index=index, backend="triton"), tensors, asked=1, spared="fold_rows_kernel")


def test_only_affine_costs_a_launch(device: torch.device) -> None:
    from sora_fast.kernels._launch import recording

    for norm in NORMS:
        *tensors, index = arguments(Case(), device, norm)
        y = norm.bound_to(adaln)(*tensors, index, backend="triton")
        with recording((9, 0)) as recorder:
            torch.autograd.grad(y, tensors, torch.ones_like(y))
        assert len(recorder.launches) == 2 + bool(norm.vectors), norm


@pytest.mark.parametrize("absent", ABSENT)
def test_an_absent_table_costs_less_than_zeros(absent: tuple[str, ...], device: torch.device) -> None:
    """No sums for it, and nothing kept; without any the backward pass is one launch, and zeros need two."""
    from sora_fast.kernels._launch import recording
    from sora_fast.kernels._rows import Sums

    x, *tables, index = arguments(Case(tokens=40), device)
    given = dict(zip(("shift", "scale"), tables, strict=True))
    used = {name: None if name in absent else table for name, table in given.items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y = adaln(x, **used, index=index, backend="triton")
    assert not any(x.data_ptr() == given[name].data_ptr() for x in kept for name in absent)
    with recording((9, 0)) as recorder:
        torch.autograd.grad(y, [x, *filter(lambda table: table is not None, used.values())], torch.ones_like(y))
    sums = [arg.tables.shape[0] for arg in recorder.launches[0][1] if isinstance(arg, Sums)]
    assert sums == [2 - len(absent)][: len(absent) == 1] and len(recorder.launches) == 1 + len(sums)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_weight_and_a_bias_of_fp32_beside_fp64(norm: str) -> None:
    x, table, index = torch.randn(5, 8).double(), torch.zeros(1, 8).double(), torch.zeros(5, dtype=torch.int32)
    vectors = torch.randn(2, 8).unbind()
    mixed, wide = (
        adaln(x, table, table, index, norm=norm, weight=weight, bias=bias)
        for weight, bias in (vectors, [vector.double() for vector in vectors])
    )
    assert torch.equal(mixed, wide)


@pytest.mark.parametrize(
    ("norm", "absent"), [*((norm, ()) for norm in NORMS), *((AFFINE_RMS, absent) for absent in ABSENT)]
)
def test_gradcheck(norm: Norm, absent: tuple[str, ...]) -> None:
    x, *rest, index = arguments(Case(tokens=6, width=4, rows=3), torch.device("cpu"), norm)
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, *rest[len(absent) :])]
    op = norm.bound_to(partial_form(adaln, absent))
    assert torch.autograd.gradcheck(lambda *t: op(*t, index), inputs)


def test_opcheck(device: torch.device) -> None:
    norm = Norm("layer", weight=True, bias=True)
    x, shift, scale, weight, bias, index = arguments(Case(tokens=9, width=8, layout="permuted"), device, norm)
    rows = RowIndex.from_index(index, len(scale))
    csr = (index, rows.offsets, rows.tokens)
    torch.library.opcheck(_adaln.registered, (x, shift, scale, weight, bias, *csr, "layer", 1e-6))
    torch.library.opcheck(_adaln.registered, (x, shift, scale, None, None, index, None, None, "rms", 1e-6))
    torch.library.opcheck(_adaln.registered, (x, None, None, weight, None, index, None, None, "rms", 1e-6))
    x, scale, weight, bias = (tensor.detach() for tensor in (x, scale, weight, bias))
    both, neither, one = (True, True), (False, False), (True, False)
    for table, affine, kind, asked in (
        (scale, (weight, bias), "layer", both),
        (scale, (weight, None), "rms", neither),
        (None, (None, None), "layer", one),
    ):
        stats = torch.rand(2 if kind == "layer" else 1, 9, device=device)
        saved = (x, x, table, *affine, stats, *csr, kind)
        torch.library.opcheck(_adaln_backward.registered, (*saved, *asked, torch.float32))


@pytest.mark.parametrize("norm", [LAYER, AFFINE_RMS])
@pytest.mark.parametrize(("backend", "compiler"), [("torch", "inductor"), ("triton", "aot_eager")])
def test_compiles_once_for_ragged_batches(backend: str, compiler: str, norm: Norm, device: torch.device) -> None:
    shape = {**SHAPE, "vectors": len(norm.vectors)}
    check_compiles_once(norm.bound_to(adaln), **shape, device=device, backend=backend, compiler=compiler)


@pytest.mark.parametrize("absent", [("shift",), ("shift", "scale")])
def test_compiles_without_a_table(absent: tuple[str, ...], device: torch.device) -> None:
    shape = {"tokens": 1, "tables": 2 - len(absent), "vectors": 2}
    op = AFFINE_RMS.bound_to(partial_form(adaln, absent))
    check_compiles_once(op, **shape, device=device, backend="triton", compiler="aot_eager")


def test_compiles_with_symbolic_sizes() -> None:
    """And a symbolic eps, which the default becomes."""
    compiled = torch.compile(adaln, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, width in ((5, 8), (70, 12)):
        x, table = torch.randn(tokens, width), torch.randn(2, width)
        index = torch.randint(-1, 2, (tokens,), dtype=torch.int32)
        assert torch.equal(compiled(x, table, table, index), adaln(x, table, table, index))


def test_empty_pack(device: torch.device) -> None:
    x, index = torch.zeros(0, 8, device=device, requires_grad=True), torch.zeros(0, dtype=torch.int32, device=device)
    table = torch.zeros(2, 8, device=device, requires_grad=True)
    y = adaln(x, table, table, index, backend="triton")
    y.sum().backward()
    assert y.shape == (0, 8) and (table.grad == 0).all()
    assert torch.autograd.grad(adaln(x, None, None, index, backend="triton").sum(), x)[0].shape == (0, 8)


X, TABLE, INDEX = torch.zeros(5, 8), torch.zeros(3, 8), torch.zeros(5, dtype=torch.int32)
ROWS = RowIndex.from_index(INDEX, 3)
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
        ((X[:, :0], None, None, INDEX), {}, ValueError, r"x: shape \(5, 0\); it must have at least one column"),
        ((X, None, TABLE[:, :4], INDEX), {}, ValueError, r"scale: shape \(3, 4\); it must be \[M, 8\]"),
        ((X, None, None, INDEX[:4]), {}, ValueError, r"index: shape \(4,\); it must be \[5\]"),
        ((X, TABLE, TABLE, INDEX[:4]), {}, ValueError, r"index: shape \(4,\); it must be \[5\]"),
        ((X, TABLE, TABLE, INDEX.long()), {}, TypeError, "index: int64; it must be int32"),
        ((X, TABLE, TABLE, None), {}, TypeError, "index: NoneType; it must be an int32 tensor"),
        ((X, TABLE, TABLE, RowIndex.from_index(INDEX, 2)), {}, ValueError, "index: a RowIndex of 2 rows, .* has 3"),
        ((X, TABLE, TABLE, ROWS.to("meta")), {}, ValueError, "index.offsets: on meta, but the first argument"),
        ((X, TABLE, TABLE, replace(ROWS, tokens=INDEX.long())), {}, TypeError, "index.tokens: int64; it must be int32"),
        ((X, TABLE.to("meta"), TABLE, INDEX), {}, ValueError, "shift: on meta, but x is on cpu"),
        ((X, TABLE, TABLE, INDEX), {"norm": "batch"}, ValueError, 'norm: .batch.; it must be "layer" or "rms"'),
        ((X, TABLE, TABLE, INDEX), {"weight": X}, ValueError, r"weight: shape \(5, 8\); it must be \[8\]"),
        ((X, TABLE, TABLE, INDEX), {"weight": X[0].half()}, TypeError, "weight: float16; it must be float32"),
        ((X, TABLE, TABLE, INDEX), {"bias": X[0].to("meta")}, ValueError, "bias: on meta, but x is on cpu"),
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


def arguments(case: Case, device: torch.device, norm: Norm = LAYER) -> list[Tensor]:
    """x, shift, scale, the norm's weight and bias as far as it has any, index."""
    index = case.index().to(device)
    tensors = case.tensors(case.tokens, 1, torch.float32) + case.tensors(case.rows, 2, torch.float32)
    tensors += torch.randn(len(norm.vectors), case.width)
    return [*(tensor.to(device).requires_grad_() for tensor in tensors), index]
