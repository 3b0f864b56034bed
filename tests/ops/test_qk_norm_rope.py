from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sora_fast.ops._rope import encoded
from sora_fast.ops.qk_norm_rope import Rope3D, _qk_norm_rope, _qk_norm_rope_backward, qk_norm_rope
from sora_fast.packing import PackedLayout
from sora_fast.proof.rule import poisoned_scratch
from tests.helpers import assert_within_rule, examples, far_apart
from tests.layouts import Pack, packs
from tests.modulated import no_recompilation
from tests.ragged import DTYPES
from tests.tracing import check_unasked

BACKENDS = ("torch", "triton")
HEAD_DIMS = (64, 72, 96, 128)
ROPES = (
    None,
    Rope3D(),
    Rope3D(interleaved=False),
    Rope3D(theta=100.0, scale=(2.0, 0.5, -1.0)),
    Rope3D(theta=100.0, scale=(0.25, 1.0, 1.5), scaling="ntk"),
    Rope3D(extent=(None, 7.5, 32.0), interleaved=False),
    Rope3D(scale=(0.5, 1.0, 2.0), scaling="ntk", extent=(20.0, None, 9.0)),
)


def formula(
    x: Tensor, weight: Tensor | None, layout: PackedLayout, rope: Rope3D | None, segment_scale: Tensor | None = None
) -> Tensor:
    """Pairs of channels as complex numbers, turned by multiplication; in fp32, or in fp64 for such an x."""
    head_dim, real = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    y = x if weight is None else F.rms_norm(x, (head_dim,), weight, eps=1e-6)
    if rope is not None:
        turn = torch.polar(torch.ones((), dtype=real), radians(layout, rope, head_dim, segment_scale, real))[:, None]
        if rope.interleaved:
            y = torch.view_as_real(torch.view_as_complex(y.to(real).unflatten(-1, (-1, 2)).contiguous()) * turn)
            y = y.flatten(-2)
        else:
            y = torch.complex(*y.to(real).chunk(2, dim=-1)) * turn
            y = torch.cat([y.real, y.imag], dim=-1)
    return torch.where((layout.segment_ids >= 0)[:, None, None], y.to(x.dtype), 0)


def radians(
    layout: PackedLayout, rope: Rope3D, head_dim: int, segment_scale: Tensor | None, real: torch.dtype
) -> Tensor:
    """[N, D/2], from a place and a theta of every token and axis."""
    segment, angles = layout.segment_ids.clamp(min=0), []
    for axis, size in enumerate(rope.split or default_split(head_dim)):
        place, factor = layout.coords[:, axis].to(real), torch.full((layout.capacity,), rope.scale[axis], dtype=real)
        if rope.extent is not None and rope.extent[axis] is not None:
            place = place / layout.grids[segment, axis].clamp(min=1) * rope.extent[axis]
        if segment_scale is not None:
            factor = factor * segment_scale[segment, axis].to(real)
        theta = torch.full_like(factor, rope.theta)
        if rope.scaling == "linear":
            place = place * factor
        elif size > 2:
            theta = theta * factor ** (-size / (size - 2))
        angles.append(place[:, None] * theta[:, None] ** (-torch.arange(0, size, 2, dtype=real) / max(size, 1)))
    return torch.cat(angles, dim=1)


def default_split(head_dim: int) -> tuple[int, int, int]:
    return {6: (2, 2, 2), 64: (24, 20, 20), 72: (24, 24, 24), 96: (32, 32, 32), 128: (44, 42, 42)}[head_dim]


@dataclass(frozen=True)
class Inputs:
    """q and k as slices of a fused projection, and the gradients that arrive. group: k has every group-th head only."""

    layout: PackedLayout
    rope: Rope3D | None
    head_dim: int
    heads: int = 2
    group: int = 1
    norm: tuple[bool, bool] = (True, True)
    dtype: torch.dtype = torch.float32
    scaled: bool = False  # a scale a segment

    @property
    def segment_scale(self) -> Tensor | None:
        if not self.scaled or self.rope is None:
            return None
        return torch.linspace(0.1, 4.0, 3 * self.layout.max_segments).view(-1, 3)

    def tensors(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """[N, 3, H, D] and its gradients' [N, 2, H, D]; weights [D]."""
        torch.manual_seed(0)
        shape = (self.layout.capacity, 3, self.heads, self.head_dim)
        qkv, d_out = torch.randn(shape).to(self.dtype), torch.randn(shape)[:, :2].to(self.dtype)
        weights = {name: torch.randn(self.head_dim).to(self.dtype) for name in ("q_weight", "k_weight")}
        return qkv, d_out, {name: w for (name, w), given in zip(weights.items(), self.norm, strict=True) if given}

    def run(self, op: Any, qkv: Tensor, d_out: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in {"qkv": qkv, **weights}.items()}
        q, k, _ = leaves["qkv"].unbind(1)
        outputs = op(q, k[:, :: self.group], leaves.get("q_weight"), leaves.get("k_weight"))
        dq, dk = d_out.unbind(1)
        grads = torch.autograd.grad(outputs, list(leaves.values()), (dq, dk[:, :: self.group]))
        return {"q": outputs[0], "k": outputs[1], **dict(zip(leaves, grads, strict=True))}

    def run_formula(self, dtype: torch.dtype) -> dict[str, Tensor]:
        qkv, d_out, weights = self.tensors()

        def op(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> tuple[Tensor, Tensor]:
            rest = (self.layout, self.rope, self.segment_scale)
            return formula(q, q_weight, *rest), formula(k, k_weight, *rest)

        return self.run(op, qkv.to(dtype), d_out.to(dtype), {name: w.to(dtype) for name, w in weights.items()})

    def run_op(self, device: torch.device, backend: str) -> dict[str, Tensor]:
        qkv, d_out, weights = self.tensors()
        padding = (self.layout.segment_ids < 0)[:, None, None, None]
        qkv, d_out = (x.masked_fill(padding, float("nan")).to(device) for x in (qkv, d_out))
        layout, scale = self.layout.to(device), self.segment_scale
        scale = None if scale is None else scale.to(device)

        def op(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
            return qk_norm_rope(*tensors, layout, self.rope, segment_scale=scale, backend=backend)

        return self.run(op, qkv, d_out, {name: w.to(device) for name, w in weights.items()})


def check(inputs: Inputs, backend: str, device: torch.device) -> None:
    with poisoned_scratch():
        actual = inputs.run_op(device, backend)
    plain, oracle = inputs.run_formula(inputs.dtype), inputs.run_formula(torch.float64)
    padding = inputs.layout.segment_ids < 0
    for name, result in actual.items():
        assert_within_rule(result, plain[name], oracle[name], name=f"{name} of {inputs}")
        if "weight" not in name:
            assert not result.cpu()[padding].any(), name


@pytest.mark.parametrize("backend", BACKENDS)
@examples(12)
@given(
    pack=packs(),
    head_dim=st.sampled_from([6, 64, 72]),
    rope=st.sampled_from(ROPES),
    norm=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from(DTYPES),
    scaled=st.booleans(),
)
def test_random_layouts_match_the_oracle(
    pack: Pack,
    head_dim: int,
    rope: Rope3D | None,
    norm: tuple[bool, bool],
    dtype: torch.dtype,
    scaled: bool,
    backend: str,
    device: torch.device,
) -> None:
    check(Inputs(pack.layout, rope, head_dim, norm=norm, dtype=dtype, scaled=scaled), backend, device)


LAYOUT = PackedLayout.from_grids([(2, 3, 2), (1, 1, 4)], order="tiled", capacity=19, max_segments=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ROPES[1:3])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims_match_the_oracle(head_dim: int, rope: Rope3D, dtype: torch.dtype, device: torch.device) -> None:
    check(Inputs(LAYOUT, rope, head_dim, heads=3, dtype=dtype), "triton", device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rope", ROPES[1:])
def test_a_scale_a_segment(rope: Rope3D, backend: str, device: torch.device) -> None:
    check(Inputs(LAYOUT, rope, 64, heads=1, scaled=True), backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extent_makes_sizes_alike(backend: str, device: torch.device) -> None:
    # Every other token of a segment twice as large, of the same extent, stands where those of the small one do.
    layout = PackedLayout.from_grids([(2, 3, 4), (4, 6, 8)], device=device)
    q = torch.ones(layout.capacity, 1, 64, device=device)
    rope = Rope3D(extent=(3.0, 20.0, 16.0))
    turned, _ = qk_norm_rope(q, q, None, None, layout, rope, backend=backend)
    small, large = turned[:24].view(2, 3, 4, 64), turned[24:].view(4, 6, 8, 64)
    torch.testing.assert_close(large[::2, ::2, ::2], small)
    assert not torch.allclose(large[:2, :3, :4], small)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_for_all_segments_is_that_of_the_rope(backend: str, device: torch.device) -> None:
    layout, scale = LAYOUT.to(device), torch.tensor([0.5, 2.0, 0.25], device=device)
    q = torch.randn(19, 1, 64, device=device)
    for scaling in ("linear", "ntk"):
        ropes = Rope3D(scaling=scaling), Rope3D(scaling=scaling, scale=tuple(scale.tolist()))
        results = (
            qk_norm_rope(q, q, None, None, layout, rope, segment_scale=given, backend=backend)[0]
            for rope, given in zip(ropes, (scale.expand(3, 3), None), strict=True)
        )
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("interleaved", [True, False])
def test_strides(interleaved: bool, device: torch.device) -> None:
    layout, rope = LAYOUT.to(device), Rope3D(interleaved=interleaved)
    dense = torch.randn(2, 19, 3, 72, device=device)
    weight = torch.randn(144, device=device)[::2]
    runs = []
    for order in (range(4), (3, 2, 1, 0), (2, 1, 0, 3)):
        qk, grads = (x.permute(*order).contiguous().permute(*order).requires_grad_() for x in (dense, dense.flip(1)))
        assert qk.stride() == torch.empty(dense.permute(*order).shape).permute(*order).stride()
        outputs = qk_norm_rope(*qk, weight, None, layout, rope, backend="triton")
        runs.append([*outputs, *torch.autograd.grad(outputs, qk, grads.unbind())])
    for other in runs[1:]:
        # Not to the bit: on a GPU, threads share a head's channels as they lie, and sum them in that order.
        torch.testing.assert_close(other, runs[0])


@pytest.mark.parametrize("interleaved", [True, False])
def test_strides_past_32_bits(interleaved: bool, device: torch.device) -> None:
    layout, rope = LAYOUT.to(device), Rope3D(interleaved=interleaved)
    # Half precision takes the least memory.
    qk, grads = (list(torch.randn(2, 19, 3, 8, device=device).half()) for _ in range(2))
    weight = torch.randn(8, device=device).half()

    def run(qk: list[Tensor], weight: Tensor, grads: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (*qk, weight)]
        outputs = qk_norm_rope(*leaves, weight, layout, rope, backend="triton")
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    expected = run(qk, weight, grads)
    moved = [run([far_apart(x, axis) for x in qk], weight, grads) for axis in range(3)]
    moved += [run(qk, weight, [far_apart(x, axis) for x in grads]) for axis in range(3)]
    moved.append(run(qk, far_apart(weight, 0), grads))
    for results in moved:
        torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0.0, 3e-8, 1e4, 6e4])
def test_extreme_heads_in_fp16(size: float, backend: str, device: torch.device) -> None:
    # Squares of 6e4 overflow fp16; those of 3e-8 vanish in it.
    x = (size * torch.randn(19, 1, 64).clamp(-1, 1)).half().to(device).requires_grad_()
    weight = torch.ones(64, device=device, dtype=torch.float16)
    q, _ = qk_norm_rope(x, x, weight, weight, LAYOUT.to(device), Rope3D(), backend=backend)
    q.backward(torch.ones_like(q))
    exact = formula(x.detach().cpu().double(), weight.cpu().double(), LAYOUT, Rope3D())
    assert x.grad.isfinite().all()
    assert (q.cpu().double() - exact).abs().max() <= torch.finfo(torch.float16).eps * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rope", [Rope3D(), Rope3D(split=(64, 0, 0), theta=1e6)])
def test_far_coordinates(rope: Rope3D, backend: str, device: torch.device) -> None:
    # Hundreds of radians: the range is reduced over many turns, and all quadrants are met.
    keep = [torch.arange(0, 1000, 37), torch.arange(0, 500, 23), torch.arange(0, 500, 29)]
    layout = PackedLayout.from_grids([(1000, 1, 1), (1, 500, 1), (1, 1, 500)], keep=keep)
    check(Inputs(layout, rope, 64, heads=1), backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dot_products_see_distances_alone(backend: str, device: torch.device) -> None:
    layout = PackedLayout.from_grids([(4, 5, 6)], device=device)
    q, k = (torch.randn(1, 1, 64, device=device).expand(120, 1, 64) for _ in range(2))
    q, k = qk_norm_rope(q, k, None, None, layout, Rope3D(), backend=backend)
    scores = (q[:, 0] @ k[:, 0].T).view(4, 5, 6, 4, 5, 6)
    torch.testing.assert_close(scores[:-1, 1:, :-2, :-1, 1:, :-2], scores[1:, :-1, 2:, 1:, :-1, 2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_to_the_bit(backend: str, device: torch.device) -> None:
    first, second = (Inputs(LAYOUT, Rope3D(), 64).run_op(device, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_that_want_no_gradient_cost_nothing(device: torch.device) -> None:
    shapes = [(19, 2, 64)] * 2 + [(64,)] * 2
    op = partial(qk_norm_rope, layout=LAYOUT.to(device), rope=Rope3D(), backend="triton")
    check_unasked(op, [torch.randn(shape, device=device) for shape in shapes], asked=2, spared="fold_kernel")


def test_many_tokens_are_folded_in_two_steps(device: torch.device) -> None:
    # Of one head of 64 channels, 16 tokens make a partial sum, and 64 of those a group.
    check(Inputs(PackedLayout.from_grids([(1, 33, 32)]), None, 64, heads=1), "triton", device)


def test_gradcheck() -> None:
    q, k, *weights = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((19, 1, 6),) * 2 + ((6,),) * 2)
    for rope, scale in ((Rope3D(), None), (ROPES[-1], torch.rand(3, 3) + 0.5)):
        op = partial(qk_norm_rope, layout=LAYOUT, rope=rope, segment_scale=scale)
        assert torch.autograd.gradcheck(op, (q, k, *weights))
        assert torch.autograd.gradgradcheck(op, (q, k, *weights))


@pytest.mark.parametrize("norm", [True, False])
def test_opcheck(norm: bool, device: torch.device) -> None:
    layout = LAYOUT.to(device)
    qkv = torch.randn(19, 2, 3, 8, device=device, requires_grad=True)
    q, k = qkv[:, :, 0], qkv.detach().permute(1, 0, 2, 3)[..., 1, :].transpose(0, 1)
    weights = [torch.randn(8, device=device, requires_grad=True) if norm else None for _ in range(2)]
    places = (layout.segment_ids, layout.coords, layout.grids, torch.ones(3, 3, device=device))
    rest = (*[None] * 4, *places, *encoded(ROPES[-1], 8), "rms", 1e-6)
    if not norm:
        rest = (*[None] * 4, *places[:2], None, None, *encoded(None, 8), "rms", 1e-6)
    torch.library.opcheck(_qk_norm_rope.registered, (q, k, *weights, *rest))
    q, weights = q.detach(), [None if weight is None else weight.detach() for weight in weights]
    torch.library.opcheck(_qk_norm_rope_backward.registered, (q.clone(), k, q, k, *weights, *rest, norm, False))


@pytest.mark.parametrize(("backend", "compiler"), [("torch", "inductor"), ("triton", "aot_eager")])
def test_compiles_once_for_ragged_batches(backend: str, compiler: str, device: torch.device) -> None:
    def step(*tensors: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        scale = 64 / layout.grids.clamp(min=1)
        return qk_norm_rope(*tensors, layout, ROPES[-1], segment_scale=scale, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    with no_recompilation():
        for grids in ([(2, 3, 2)], [(1, 2, 2), (1, 1, 5)], [(1, 1, 1)] * 3):
            inputs = Inputs(PackedLayout.from_grids(grids, capacity=14, max_segments=3), None, 64)
            layout = inputs.layout.to(device)
            qkv, d_out, weights = inputs.tensors()
            for tensor in (qkv, d_out):
                tensor[inputs.layout.segment_ids < 0] = float("nan")
            given = (qkv.to(device), d_out.to(device), {name: weight.to(device) for name, weight in weights.items()})
            expected, actual = (inputs.run(partial(fn, layout=layout), *given) for fn in (step, compiled))
            for name in expected:
                torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_queries(backend: str, device: torch.device) -> None:
    check(Inputs(LAYOUT, Rope3D(), 64, heads=6, group=3), backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_pack(backend: str, device: torch.device) -> None:
    layout = PackedLayout.from_grids([], max_segments=1).to(device)
    q = torch.zeros(0, 2, 64, device=device)
    weight = torch.ones(64, device=device, requires_grad=True)
    outputs = qk_norm_rope(q, q, weight, weight, layout, Rope3D(), backend=backend)
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert outputs[0].shape == (0, 2, 64) and not weight.grad.any()


Q, W, S = torch.zeros(19, 2, 64), torch.zeros(64), torch.ones(3, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q[1:], Q, W, W, LAYOUT, None), {}, ValueError, r"q: shape .* it must be \[19, H, D\]"),
        ((Q[..., 1:], Q, W, W, LAYOUT, None), {}, ValueError, "q: head dim 63; it must be even"),
        ((Q, Q[..., :32], W, W, LAYOUT, None), {}, ValueError, r"k: shape .* it must be \[19, Hk, 64\]"),
        ((Q, Q.repeat(1, 2, 1), W, W, LAYOUT, None), {}, ValueError, "k: 4 heads; they must divide the 2 of q"),
        ((Q[:, :0], Q, W, W, LAYOUT, None), {}, ValueError, "k: 2 heads; they must divide the 0 of q"),
        ((Q, Q[:, :0], W, W, LAYOUT, None), {}, ValueError, "k: 0 heads; they must divide the 2 of q"),
        ((Q, Q.half(), W, W, LAYOUT, None), {}, TypeError, "k: float16; it must be float32"),
        ((Q, Q, W, W, None, None), {}, TypeError, "layout: NoneType; it must be a PackedLayout"),
        ((Q, Q, W, W, LAYOUT, (2, 2, 2)), {}, TypeError, "rope: tuple; it must be a Rope3D, a RopeTable or"),
        ((Q, Q, W[1:], W, LAYOUT, None), {}, ValueError, r"q_weight: shape \(63,\); it must be \[64\]"),
        ((Q, Q, W, W.int(), LAYOUT, None), {}, TypeError, "k_weight: int32"),
        ((Q, Q, W, W, LAYOUT, Rope3D((2, 2, 2))), {}, ValueError, "rope.split: .* 6 channels, but the head dim is 64"),
        ((Q, Q, W, W, LAYOUT, None), {"eps": 0.0}, ValueError, "eps: 0.0"),
        ((Q, Q, W, W, LAYOUT, None), {"eps": None}, TypeError, "eps: NoneType; it must be a number"),
        ((Q, Q, W, W, LAYOUT, None), {"segment_scale": S}, ValueError, "segment_scale: given without a rope"),
        ((Q, Q, W, W, LAYOUT, Rope3D()), {"segment_scale": S[:2]}, ValueError, r"segment_scale: .* must be \[3, 3\]"),
        ((Q, Q, W, W, LAYOUT, Rope3D()), {"segment_scale": S.double()}, TypeError, "segment_scale: float64"),
        ((Q, Q, W, W, LAYOUT, Rope3D()), {"segment_scale": S.clone().requires_grad_()}, ValueError, "be detached"),
    ],
)
def test_bad_arguments(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        qk_norm_rope(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": (2.0, 2, 2)}, "split: .* three even sizes"),
        ({"split": (3, 2, 2)}, "split: "),
        ({"theta": 0.0}, "theta: 0.0"),
        ({"theta": float("nan")}, "theta: nan; it must be positive and finite"),
        ({"scale": (1.0,)}, "scale: "),
        ({"scale": (1.0, float("inf"), 1.0)}, "scale: .* three finite factors"),
        ({"scale": (1.0, 0.0, 1.0), "scaling": "ntk"}, "scale: .* above 0"),
        ({"scaling": "yarn"}, 'scaling: .yarn.; it must be "linear" or "ntk"'),
        ({"extent": (1.0, 2.0)}, "extent: .* three finite lengths"),
        ({"extent": (None, 0.0, 1.0)}, "extent: .* above 0, or None"),
        ({"extent": (None, float("nan"), 1.0)}, "extent: .* above 0, or None"),
    ],
)
def test_bad_rope(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rope3D(**options)
