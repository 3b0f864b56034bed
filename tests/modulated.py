"""What the tests of the modulation ops share: cases of every shape, and the check of an op against an fp64 oracle."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from sora_fast.packing import RowIndex
from sora_fast.proof.rule import poisoned_scratch
from tests.helpers import assert_within_rule, far_apart

PATTERNS = ("sorted", "interleaved", "random", "single row", "row a token", "unused rows", "all padding")
LAYOUTS = ("contiguous", "sliced", "permuted")
# (tokens, table). The interpreter is not trusted with bf16, and a GPU is.
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)]
if torch.cuda.is_available():
    DTYPES += [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
# Interpreted, a wide row takes seconds; what is compiled for it is looked at ahead of time.
WIDTHS = (64, 384, 1152, 1536, 3072, 5120, 8192) if torch.cuda.is_available() else (64, 192)

Op = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """`tokens` × `width` inputs that point into a table of `rows` rows."""

    tokens: int = 45
    width: int = 48
    rows: int = 4
    pattern: str = "random"
    layout: str = "sliced"
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    seed: int = 0

    def index(self) -> Tensor:
        """[N] int32, with some padding in the middle and at the end."""
        torch.manual_seed(self.seed)
        token = torch.arange(self.tokens)
        index = {
            "sorted": token * self.rows // self.tokens,
            "interleaved": token % self.rows,
            "random": torch.randint(self.rows, (self.tokens,)),
            "single row": torch.full_like(token, self.rows // 2),
            "row a token": token.flip(0),
            "unused rows": token % 2 * (self.rows - 1),
            "all padding": torch.full_like(token, -1),
        }[self.pattern].int()
        index[torch.rand(self.tokens) < 0.1] = -1
        index[self.tokens - self.tokens // 8 :] = -1
        return index

    @property
    def table_rows(self) -> int:
        return self.tokens if self.pattern == "row a token" else self.rows

    def tensors(self, rows: int, count: int, dtype: torch.dtype) -> list[Tensor]:
        """`count` random [rows, width], laid out as the case says; sliced ones are chunks of one tensor."""
        width = self.width
        values = torch.randn(rows, count * width, dtype=torch.float64).to(dtype).split(width, dim=1)[:count]
        if self.layout == "permuted":
            return [value.t().contiguous().t() for value in values]
        return [value.contiguous() if self.layout == "contiguous" else value for value in values]


@dataclass(frozen=True)
class Norm:
    """A norm of rows; weight, bias: whether it has one."""

    kind: str = "layer"
    weight: bool = False
    bias: bool = False

    @property
    def vectors(self) -> list[str]:
        return [name for name in ("weight", "bias") if getattr(self, name)]

    def __call__(self, x: Tensor, *vectors: Tensor) -> Tensor:
        """As plain PyTorch has it. vectors: the weight and the bias, as far as there are any."""
        given = dict(zip(self.vectors, vectors, strict=True))
        x = x.to(vectors[0].dtype) if vectors else x
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[1:], **given, eps=1e-6)
        bias = given.pop("bias", 0)
        return F.rms_norm(x, x.shape[1:], **given, eps=1e-6) + bias

    def bound_to(self, op: Op) -> Op:
        """`op` with this norm, whose weight and bias come after the tables."""

        def run(*args: Any, **options: Any) -> Tensor | tuple[Tensor, ...]:
            *tensors, index = args
            first = len(tensors) - len(self.vectors)
            vectors = dict(zip(self.vectors, tensors[first:], strict=True))
            return op(*tensors[:first], index, norm=self.kind, **vectors, **options)

        return run


def without(op: Op, absent: tuple[str, ...], *, tokens: int, names: tuple[str, ...]) -> Op:
    """`op` that takes no table of `absent`, and is given None for it. names: its tables, which come after so many
    tensors of tokens; a formula is an op, too."""

    def run(*args: Any, **options: Any) -> Tensor | tuple[Tensor, ...]:
        rest = iter(args[tokens:])
        tables = [None if name in absent else next(rest) for name in names]
        return op(*args[:tokens], *tables, *rest, **options)

    return run


NORMS = [Norm(kind, *affine) for kind in ("layer", "rms") for affine in product((False, True), repeat=2)]


# For forms that differ in a line or two from what `cases` is searched for, one or the other of these, which the
# interpreter has done in a second: no multiples of anything; a row of several chunks, in half precision beside fp32.
FEW = (
    Case(tokens=30, width=33, layout="permuted"),
    Case(tokens=50, width=20, rows=1, dtypes=DTYPES[-1]),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case; small, since the interpreter is slow, but of more than one chunk of the backward walk."""
    return Case(
        tokens=draw(st.integers(1, 50)),
        width=draw(st.sampled_from([1, 3, 16, 33, 64, 72, 100])),
        rows=draw(st.integers(1, 5)),
        pattern=draw(st.sampled_from(PATTERNS)),
        layout=draw(st.sampled_from(LAYOUTS)),
        dtypes=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
    )


def for_valid_tokens(formula: Op) -> Op:
    """An op from a formula of (token tensors, gathered rows, vectors) that knows no padding: plain PyTorch, naively."""

    def op(*args: Any, tokens: int, tables: int) -> tuple[Tensor, ...]:
        *tensors, index = args
        valid = index >= 0
        last = tokens + tables
        rows = [table[index[valid].long()] for table in tensors[tokens:last]]
        results = formula(*(x[valid] for x in tensors[:tokens]), *rows, *tensors[last:])
        results = results if isinstance(results, tuple) else (results,)
        dtype = tensors[0].dtype
        return tuple(torch.zeros(len(index), r.shape[1], dtype=dtype).index_put((valid,), r.to(dtype)) for r in results)

    return op


def outputs_and_gradients(op: Op, tensors: list[Tensor], d_outputs: list[Tensor]) -> list[Tensor]:
    """Outputs of op(*tensors), then the gradient of every tensor."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, leaves, d_outputs[: len(outputs)])]


# Numbers of a result, at least, that the error rule is asked about.
_FEWEST = 32


def check_against_oracle(op: Op, formula: Op, case: Case, **options: Any) -> None:
    """Outputs and gradients of `op` obey the error rule, with NaN in padding, in rows without a token and in scratch
    memory; the first two are exact zeros in what comes out.

    formula: the op without padding and with gathered rows. options: of `_compare`.
    """
    # The largest error of a few numbers is a matter of luck, plain PyTorch's too: it takes more of them to compare.
    repeats = -(-_FEWEST // (min(case.tokens, case.table_rows) * case.width))
    found = [
        _compare(op, formula, replace(case, seed=case.seed + 100 * repeat), **options) for repeat in range(repeats)
    ]
    for number, results in enumerate(zip(*found, strict=True)):
        actual, plain, oracle = map(torch.stack, zip(*results, strict=True))
        assert_within_rule(actual, plain, oracle, name=f"result {number} of {case}")


def _compare(
    op: Op,
    formula: Op,
    case: Case,
    *,
    tokens: int,
    tables: int,
    device: torch.device,
    backend: str,
    csr: bool = True,
    vectors: int = 0,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ours, plain PyTorch's, the truth) of every output and gradient.

    csr: give a RowIndex, not its tensor. vectors: how many [C] follow the tables, for the formula too.
    """
    index = case.index()
    inputs = case.tensors(case.tokens, tokens, case.dtypes[0]) + case.tensors(case.table_rows, tables, case.dtypes[1])
    inputs += [vector[0] for vector in case.tensors(1, vectors, case.dtypes[1])] if vectors else []
    d_outputs = case.tensors(case.tokens, 2, case.dtypes[0])
    for tensor in [*inputs[:tokens], *d_outputs]:
        tensor[index < 0] = float("nan")
    for table in inputs[tokens : tokens + tables]:
        table[~_used(index, len(table))] = float("nan")

    def reference(dtype: torch.dtype | None) -> list[Tensor]:
        wide = [t if dtype is None else t.to(dtype) for t in inputs]
        given = [t if dtype is None else t.to(dtype) for t in d_outputs]
        return outputs_and_gradients(
            lambda *t: for_valid_tokens(formula)(*t, index, tokens=tokens, tables=tables), wide, given
        )

    rows = RowIndex.from_index(index, case.table_rows).to(device) if csr else index.to(device)
    with poisoned_scratch():
        actual = outputs_and_gradients(
            lambda *t: op(*t, rows, backend=backend), [t.to(device) for t in inputs], [t.to(device) for t in d_outputs]
        )
    plain, oracle = reference(None), reference(torch.float64)
    for number, a in enumerate(actual):
        if number >= len(plain) - vectors:
            continue
        empty = index < 0 if number < len(plain) - vectors - tables else ~_used(index, len(a))
        assert (a.cpu()[empty] == 0).all(), f"result {number} of {case}: padding or an unused row is not zero"
    return [(a.cpu(), p, o) for a, p, o in zip(actual, plain, oracle, strict=True)]


def check_far_apart(op: Op, *, tokens: int, tables: int, device: torch.device) -> None:
    """On Triton, outputs and gradients are the same when rows, or columns, lie further apart than 32 bits reach."""
    case = Case(tokens=5, width=3, rows=3, layout="contiguous")
    index = case.index().to(device)
    # Half precision takes the least memory.
    inputs = case.tensors(5, tokens, torch.float16) + case.tensors(3, tables, torch.float16)
    inputs, d_outputs = ([t.to(device) for t in given] for given in (inputs, case.tensors(5, 2, torch.float16)))

    def run(tensors: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        return outputs_and_gradients(lambda *t: op(*t, index, backend="triton"), tensors, gradients)

    expected = run(inputs, d_outputs)
    for axis in range(2):
        for place in range(len(inputs)):
            moved = [far_apart(t, axis) if place == number else t for number, t in enumerate(inputs)]
            torch.testing.assert_close(run(moved, d_outputs), expected)
        torch.testing.assert_close(run(inputs, [far_apart(t, axis) for t in d_outputs]), expected)


def _used(index: Tensor, rows: int) -> Tensor:
    return torch.bincount(index[index >= 0], minlength=rows) > 0


@contextmanager
def no_recompilation() -> Iterator[None]:
    """Inside, compiling anything a second time is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def check_compiles_once(
    op: Op, *, tokens: int, tables: int, device: torch.device, backend: str, compiler: str, vectors: int = 0
) -> None:
    """Compiled in one graph, forward and backward, `op` gives what it gives otherwise, for any content of the batch."""

    def call(*tensors: Any) -> Tensor | tuple[Tensor, ...]:
        return op(*tensors, backend=backend)

    with no_recompilation():
        compiled = torch.compile(call, fullgraph=True, backend=compiler)
        for pattern in ("sorted", "random"):
            case = Case(pattern=pattern, tokens=20)
            rows = RowIndex.from_index(case.index(), case.rows).to(device)
            inputs = case.tensors(20, tokens, torch.float32) + case.tensors(case.rows, tables, torch.float32)
            inputs = [t.to(device) for t in [*inputs, *torch.randn(vectors, case.width)]]
            d_outputs = [t.to(device) for t in case.tensors(20, 2, torch.float32)]
            for tensor in [*inputs[:tokens], *d_outputs]:
                tensor[rows.index < 0] = float("nan")
            expected = outputs_and_gradients(lambda *t, rows=rows: call(*t, rows), inputs, d_outputs)
            actual = outputs_and_gradients(lambda *t, rows=rows: compiled(*t, rows), inputs, d_outputs)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e)
