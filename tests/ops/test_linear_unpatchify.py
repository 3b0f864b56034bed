from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sora_fast.ops.linear_unpatchify import _linear_unpatchify, linear_unpatchify
from sora_fast.ops.unpatchify import unpatchify
from sora_fast.packing import PackedLayout, RaggedLatents
from sora_fast.proof.rule import poisoned_scratch
from tests.helpers import assert_within_rule, examples
from tests.modulated import no_recompilation
from tests.ragged import BACKENDS, DTYPES, RaggedCase, ragged_cases

WIDTHS = [1, 20, 72] if not torch.cuda.is_available() else [1, 20, 384, 1152]
NAN = float("nan")


class Inputs:
    """What the op and its oracle are given: leaves by name, of strides that no linear layer would give them."""

    def __init__(self, case: RaggedCase, width: int, *, bias: bool = True, channels: int | None = None) -> None:
        torch.manual_seed(case.seed)
        self.case, self.layout = case, case.layout()
        channels = channels or case.channels
        columns = case.num_pixels // case.channels * channels
        self.elements = case.latents().flat.numel() * channels // case.channels + 3
        shapes = {"x": (self.layout.capacity, width), "weight": (columns, width)}
        shapes |= {"bias": (columns,)} if bias else {}
        self.leaves = {name: torch.randn(*shape, 2).to(case.dtype)[..., 0] for name, shape in shapes.items()}
        self.leaves["weight"] = self.leaves["weight"].t().contiguous().t()
        self.d_flat = torch.randn(self.elements).to(case.dtype)
        self.padding = self.layout.segment_ids < 0

    def run(self, op: Any, dtype: torch.dtype, *, device: str | torch.device = "cpu", **spoiled: Tensor) -> Any:
        """{"flat": result, name of a leaf: its gradient}."""
        leaves = {
            name: leaf.detach().to(device, dtype).requires_grad_() for name, leaf in {**self.leaves, **spoiled}.items()
        }
        flat = op(**leaves)
        grads = torch.autograd.grad(flat, list(leaves.values()), self.d_flat.to(device, dtype))
        return {"flat": flat, **dict(zip(leaves, grads, strict=True))}

    def op(self, device: torch.device, backend: str) -> Any:
        layout, shapes = self.layout.to(device), self.case.latents().shapes.to(device)

        def call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            given = (x, weight, bias, layout, self.case.patch_size, shapes)
            return linear_unpatchify(*given, capacity=self.elements, backend=backend).flat

        return call

    def formula(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A plain product, and an op that is proved elsewhere to move rows to their pixels."""
        rows = F.linear(torch.where(self.padding[:, None], 0, x), weight, bias)
        shapes = self.case.latents().shapes
        return unpatchify(rows, self.layout, self.case.patch_size, shapes, capacity=self.elements, backend="torch").flat


def check(inputs: Inputs, backend: str, device: torch.device) -> None:
    """Values and gradients obey the error rule, with NaN in padding and in scratch; what no token writes is zero."""
    case = inputs.case
    with poisoned_scratch():
        x = inputs.leaves["x"].masked_fill(inputs.padding[:, None], NAN)
        actual = inputs.run(inputs.op(device, backend), case.dtype, device=device, x=x)
    plain, oracle = (inputs.run(inputs.formula, dtype) for dtype in (case.dtype, torch.float64))
    for name, result in actual.items():
        assert_within_rule(result, plain[name], oracle[name], name=f"{name} of {case}")
    assert not actual["flat"].cpu()[oracle["flat"] == 0].any()
    assert not actual["x"].cpu()[inputs.padding].any()


@pytest.mark.parametrize("backend", BACKENDS)
@examples(12)
@given(case=ragged_cases(), width=st.sampled_from(WIDTHS), bias=st.booleans())
def test_random_cases_match_the_oracle(
    case: RaggedCase, width: int, bias: bool, backend: str, device: torch.device
) -> None:
    check(Inputs(case, width, bias=bias), backend, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks_in_every_direction(dtype: torch.dtype, device: torch.device) -> None:
    case = RaggedCase(shapes=((9, 2, 12, 17), (9, 1, 9, 5)), order="tiled", drop=True, dtype=dtype)
    check(Inputs(case, 130, channels=18), "triton", device)


def test_addresses_beyond_int32(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from sora_fast.kernels import _patches

    monkeypatch.setattr(_patches, "INT32_ELEMENTS", 0)
    check(Inputs(RaggedCase(order="tiled", drop=True, dtype=torch.float16), 20), "triton", device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_to_the_bit(backend: str, device: torch.device) -> None:
    inputs = Inputs(RaggedCase(order="tiled", drop=True), 20)
    runs = [inputs.run(inputs.op(device, backend), torch.float32, device=device) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("order", ["cthw", "hwtc"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_orders_are_other_rows_of_the_weight(backend: str, order: str, device: torch.device) -> None:
    """Values and gradients are those of the weight in the usual order, to the bit."""
    inputs = Inputs(RaggedCase(patch_size=(2, 1, 3), order="tiled"), 20)
    sizes = dict(zip(("t", "h", "w"), inputs.case.patch_size, strict=True))
    layout, shapes = inputs.layout.to(device), inputs.case.latents().shapes.to(device)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = f"(t h w c) ... -> ({' '.join(order)}) ..."
        weight, bias = (rearrange(leaf, rows, **sizes) for leaf in (weight, bias))
        given, options = (x, weight, bias, layout, inputs.case.patch_size, shapes), {"backend": backend}
        return linear_unpatchify(*given, capacity=inputs.elements, order=order, **options).flat

    usual, other = (inputs.run(op, torch.float32, device=device) for op in (inputs.op(device, backend), call))
    assert all(torch.equal(result, other[name]) for name, result in usual.items())


def test_gradcheck() -> None:
    inputs = Inputs(RaggedCase(shapes=((2, 2, 3, 2), (2, 1, 1, 3)), drop=True), 3)
    leaves = [leaf.double().requires_grad_() for leaf in inputs.leaves.values()]
    assert torch.autograd.gradcheck(inputs.op(torch.device("cpu"), "torch"), leaves)


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias: bool, device: torch.device) -> None:
    inputs = Inputs(RaggedCase(), 5, bias=bias)
    layout, latents = inputs.layout.to(device), inputs.case.latents().to(device)
    leaves = [leaf.to(device).requires_grad_() for leaf in inputs.leaves.values()]
    leaves += [] if bias else [None]
    geometry = (latents.offsets, latents.shapes, layout.segment_ids, layout.coords, list(inputs.case.patch_size))
    torch.library.opcheck(_linear_unpatchify.registered, (*leaves, *geometry, latents.flat.numel()))


@pytest.mark.parametrize(("backend", "compiler"), [("torch", "aot_eager"), ("triton", "aot_eager")])
def test_compiles_once_for_ragged_batches(backend: str, compiler: str, device: torch.device) -> None:
    weight, bias = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((4, 6), (4,)))

    def step(x: Tensor, layout: PackedLayout, latents: RaggedLatents) -> Tensor:
        return linear_unpatchify(x, weight, bias, layout, (1, 2, 2), latents, backend=backend).flat

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    with no_recompilation():
        for shapes in ([(1, 2, 5, 4), (1, 1, 6, 6)], [(1, 1, 1, 1), (1, 1, 3, 3), (1, 2, 2, 2)]):
            latents = RaggedLatents.empty(shapes, capacity=100, max_segments=3).to(device)
            grids = [(t, -(-h // 2), -(-w // 2)) for _, t, h, w in shapes]
            layout = PackedLayout.from_grids(grids, capacity=30, max_segments=3).to(device)
            x = torch.randn(30, 6, device=device, requires_grad=True)
            results = []
            for fn in (step, compiled):
                flat = fn(x, layout, latents)
                results.append([flat, *torch.autograd.grad(flat.square().sum(), (x, weight, bias))])
            for expected, actual in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_pack(backend: str, device: torch.device) -> None:
    layout = PackedLayout.from_grids([], max_segments=2).to(device)
    x = torch.zeros(0, 8, device=device, requires_grad=True)
    weight, shapes = torch.ones(4, 8, device=device), torch.zeros(2, 4, dtype=torch.int32, device=device)
    videos = linear_unpatchify(x, weight, None, layout, (1, 2, 2), shapes, capacity=7, backend=backend)
    videos.flat.sum().backward()
    assert videos.to_list() == [] and not videos.flat.any() and x.grad.shape == (0, 8)


CASE = RaggedCase()
LAYOUT, LATENTS = CASE.layout(), CASE.latents()
X, WEIGHT, BIAS = torch.zeros(LAYOUT.capacity, 5), torch.zeros(CASE.num_pixels, 5), torch.zeros(CASE.num_pixels)
PATCH = CASE.patch_size


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[1:], WEIGHT, BIAS, LAYOUT, PATCH, LATENTS), ValueError, "x: shape .* it must be"),
        ((X, WEIGHT[:, 1:], BIAS, LAYOUT, PATCH, LATENTS), ValueError, "weight: shape .* it must be"),
        ((X, WEIGHT[1:], BIAS[1:], LAYOUT, PATCH, LATENTS), ValueError, "weight: 23 rows; .* need 8·Cout"),
        ((X, WEIGHT, BIAS[1:], LAYOUT, PATCH, LATENTS), ValueError, r"bias: shape \(23,\); it must be \[24\]"),
        ((X, WEIGHT.half(), BIAS, LAYOUT, PATCH, LATENTS), TypeError, "weight: float16; it must be float32"),
        ((X.int(), WEIGHT, BIAS, LAYOUT, PATCH, LATENTS), TypeError, "x: int32"),
        ((X, WEIGHT, BIAS, LAYOUT, (2, 2), LATENTS), ValueError, "patch_size: .* three ints"),
        ((X, WEIGHT, BIAS, LAYOUT, PATCH, LATENTS.shapes), ValueError, "capacity: None"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(backend: str, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_unpatchify(*arguments, backend=backend)
