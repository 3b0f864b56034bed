from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_fast.ops.adaln import adaln
from sora_fast.ops.adaln_pair import _adaln_pair, _adaln_pair_backward, adaln_pair
from sora_fast.packing import RowIndex
from tests.modulated import (
    DTYPES,
    FEW,
    PATTERNS,
    WIDTHS,
    Case,
    Norm,
    Op,
    check_against_oracle,
    check_compiles_once,
    check_far_apart,
    without,
)
from tests.tracing import check_unasked

BACKENDS = ("torch", "triton")
SHAPE = {"tokens": 1, "tables": 4}
NAMES = ("shift", "scale", "shift_second", "scale_second")
LAYER, RMS = Norm(), Norm("rms")
ABSENT = (("shift",), ("scale", "shift_second"), ("shift", "scale"), NAMES)


def flat_form(norm: Norm, absent: tuple[str, ...] = ()) -> Op:
    """The op that takes its four tables one by one, but those of `absent`."""

    def op(x: Tensor, *tables: Any, **options: Any) -> tuple[Tensor, Tensor]:
        *four, index = tables
        return adaln_pair(x, tuple(four[:2]), tuple(four[2:]), index, norm=norm.kind, **options)

    return without(op, absent, tokens=1, names=NAMES)


def check(
    case: Case, norm: Norm, device: torch.device, backend: str, *, csr: bool = True, absent: tuple[str, ...] = ()
) -> None:
    def formula(x: Tensor, *tables: Tensor | None) -> tuple[Tensor, ...]:
        pairs = (tables[:2], tables[2:])
        return tuple(norm(x) * (1 if s is None else 1 + s) + (0 if b is None else b) for b, s in pairs)

    options = {"tokens": 1, "tables": 4 - len(absent), "device": device, "backend": backend, "csr": csr}
    reference = without(formula, absent, tokens=1, names=NAMES)
    check_against_oracle(flat_form(norm, absent), reference, case, **options)


@pytest.mark.parametrize(
    ("norm", "place", "absent"), [(RMS, 1, ()), *((LAYER, number % 2, absent) for number, absent in enumerate(ABSENT))]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_forms_match_the_oracle(
    backend: str, norm: Norm, place: int, absent: tuple[str, ...], device: torch.device
) -> None:
    check(FEW[place], norm, device, backend, csr=place == 0, absent=absent)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_patterns_match_the_oracle(pattern: str, backend: str, device: torch.device) -> None:
    check(Case(pattern=pattern), LAYER, device, backend, csr=False)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_match_the_oracle(width: int, device: torch.device) -> None:
    check(Case(tokens=9, width=width, rows=2, dtypes=DTYPES[-1]), LAYER, device, "triton")


@pytest.mark.parametrize("norm", [LAYER, RMS])
def test_each_output_is_adaln_s(norm: Norm, device: torch.device) -> None:
    x, *tables, index = arguments(Case(), device)
    both = flat_form(norm)(x, *tables, index, backend="triton")
    for y, pair in zip(both, (tables[:2], tables[2:]), strict=True):
        assert torch.equal(y, adaln(x, *pair, index, norm=norm.kind, backend="triton"))


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(used: int, device: torch.device) -> None:
    *tensors, index = arguments(Case(), device)
    gradients = []
    for backend in BACKENDS:
        output = flat_form(LAYER)(*tensors, index, backend=backend)[used]
        gradients.append(torch.autograd.grad(output.square().sum(), tensors, allow_unused=True, materialize_grads=True))
    for plain, kernel in zip(*gradients, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-4)


def test_strides_past_32_bits(device: torch.device) -> None:
    check_far_apart(flat_form(LAYER), **SHAPE, device=device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_to_the_bit(backend: str, device: torch.device) -> None:
    *tensors, index = arguments(Case(tokens=40), device)
    runs = []
    for rows in (index, index, RowIndex.from_index(index, Case.rows)):
        outputs = flat_form(LAYER)(*tensors, rows, backend=backend)
        runs.append([*outputs, *torch.autograd.grad(outputs, tensors, [torch.ones_like(o) for o in outputs])])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_tables_that_want_no_gradient_cost_nothing(device: torch.device) -> None:
    x, *tables, index = arguments(Case(tokens=40), device)
    check_unasked(
        lambda *t: flat_form(LAYER)(*t, index, backend="triton"), [x, *tables], asked=1, spared="fold_rows_kernel"
    )


def test_keeps_one_tensor_and_statistics(device: torch.device) -> None:
    case, kept = Case(tokens=45, width=48), []
    *tensors, index = arguments(case, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        flat_form(LAYER)(*tensors, index, backend="triton")
    of_tokens = sum(x.nbytes for x in kept if case.tokens in x.shape and x.is_floating_point())
    assert of_tokens == case.tokens * (case.width * 4 + 8)


@pytest.mark.parametrize("absent", [(), *ABSENT])
@pytest.mark.parametrize("norm", [LAYER, RMS])
def test_gradcheck(norm: Norm, absent: tuple[str, ...]) -> None:
    x, *tables, index = arguments(Case(tokens=6, width=4, rows=3), torch.device("cpu"))
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, *tables[len(absent) :])]
    assert torch.autograd.gradcheck(lambda *t: flat_form(norm, absent)(*t, index), inputs)


def test_opcheck(device: torch.device) -> None:
    x, *tables, index = arguments(Case(tokens=9, width=8, layout="permuted"), device)
    rows = RowIndex.from_index(index, Case.rows)
    csr = (index, rows.offsets, rows.tokens)
    torch.library.opcheck(_adaln_pair.registered, (x, *tables, *csr, "layer", 1e-6))
    torch.library.opcheck(_adaln_pair.registered, (x, None, *tables[1:], index, None, None, "rms", 1e-6))
    x, scale = x.detach(), tables[1].detach()
    for scales, kind, asked in (((scale, scale), "layer", (True,) * 4), ((scale, None), "rms", (False, True) * 2)):
        saved = (x, x, x, *scales, torch.rand(2 if kind == "layer" else 1, 9, device=device), *csr, kind)
        torch.library.opcheck(_adaln_pair_backward.registered, (*saved, *asked, torch.float32))


@pytest.mark.parametrize(("backend", "compiler"), [("torch", "inductor"), ("triton", "aot_eager")])
def test_compiles_once_for_ragged_batches(backend: str, compiler: str, device: torch.device) -> None:
    check_compiles_once(flat_form(LAYER), **SHAPE, device=device, backend=backend, compiler=compiler)


def test_empty_pack(device: torch.device) -> None:
    x, index = torch.zeros(0, 8, device=device, requires_grad=True), torch.zeros(0, dtype=torch.int32, device=device)
    table = torch.zeros(2, 8, device=device, requires_grad=True)
    for pair, backend in product(((table, table), (None, None)), BACKENDS):
        outputs = adaln_pair(x, pair, pair, index, backend=backend)
        assert torch.autograd.grad(sum(outputs).sum(), x)[0].shape == (0, 8)


X, TABLE, INDEX = torch.zeros(5, 8), torch.zeros(3, 8), torch.zeros(5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("first", "second", "options", "error", "message"),
    [
        (TABLE, (None, None), {}, TypeError, r"first: Tensor; it must be a tuple \(shift, scale\)"),
        ((None, None), (TABLE,), {}, TypeError, r"second: 1 values; it must be a tuple \(shift, scale\)"),
        ((None, TABLE), (TABLE[:2], None), {}, ValueError, r"second's shift: shape \(2, 8\); it must be \[3, 8\]"),
        ((TABLE[:, :4], None), (None, None), {}, ValueError, r"first's shift: shape \(3, 4\); it must be \[M, 8\]"),
        ((TABLE, TABLE), (TABLE, TABLE), {"norm": "batch"}, ValueError, "norm: .batch.; it must be"),
    ],
)
def test_bad_input_is_named(
    first: Any, second: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        adaln_pair(X, first, second, INDEX, **options)


def arguments(case: Case, device: torch.device) -> list[Tensor]:
    """x, the four tables, index."""
    index = case.index().to(device)
    tensors = case.tensors(case.tokens, 1, torch.float32) + case.tensors(case.rows, 4, torch.float32)
    return [*(tensor.to(device).requires_grad_() for tensor in tensors), index]
