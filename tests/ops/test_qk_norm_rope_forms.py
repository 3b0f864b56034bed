"""The forms of qk_norm_rope that other people's blocks need: q or k alone, other norms, positions, tables of turns."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sora_fast.kernels._launch import recording
from sora_fast.ops._rope import encoded
from sora_fast.ops.qk_norm_rope import Rope3D, RopeTable, _qk_norm_rope, _qk_norm_rope_backward, qk_norm_rope
from sora_fast.packing import PackedLayout
from sora_fast.proof.rule import poisoned_scratch
from tests.helpers import assert_within_rule, examples, far_apart
from tests.layouts import Pack, packs
from tests.modulated import no_recompilation
from tests.ragged import DTYPES
from tests.tracing import check_unasked

BACKENDS = ("torch", "triton")
NORMS = ("rms", "rms_across_heads", "layer")
EPS = 3e-3  # large enough to be felt
LAYOUT = PackedLayout.from_grids([(2, 3, 2), (1, 1, 4)], order="tiled", capacity=19, max_segments=3)
# Interpreted, a norm over all heads takes 30 ms a token.
SMALL = PackedLayout.from_grids([(1, 2, 2)], capacity=5)
THETAS = (50.0, 300.0, 2000.0)
ROPES = {interleaved: Rope3D(theta=THETAS, interleaved=interleaved) for interleaved in (True, False)}
Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """One of them. group: k has every group-th head only. given: queries and keys, or one of them alone. turn: "",
    "positions", or tables of "tokens" or of "heads"."""

    norm: str = "rms"
    turn: str = ""
    given: str = "qk"
    interleaved: bool = True
    normed: str = "qk"
    head_dim: int = 8
    heads: int = 3
    group: int = 1
    dtype: torch.dtype = torch.float32

    def leaves(self, tokens: int) -> tuple[Leaves, Leaves]:
        """What wants a gradient, by name, and the gradients that arrive at q' and k'."""
        torch.manual_seed(0)
        qkv, d_out = torch.randn(2, tokens, 3, self.heads, self.head_dim).to(self.dtype)
        leaves = {"qkv": 2 * qkv + 1}
        for name in self.normed:
            heads = self.heads if name == "q" else self.heads // self.group
            channels = self.head_dim * (heads if self.norm == "rms_across_heads" else 1)
            leaves[f"{name}_weight"] = torch.randn(channels).to(self.dtype)
            if self.norm == "layer":
                leaves[f"{name}_bias"] = torch.randn(channels).to(self.dtype)
        if self.turn in ("tokens", "heads"):
            heads = [self.heads] if self.turn == "heads" else []
            leaves["cos"], leaves["sin"] = torch.randn(2, tokens, *heads, self.head_dim // 2).unbind()
        wanted = {name: d_out[:, place] for place, name in enumerate("qk") if name in self.given}
        if "k" in wanted:
            wanted["k"] = wanted["k"][:, :: self.group]
        used = {name: leaf for name, leaf in leaves.items() if name[1:2] != "_" or name[0] in self.given}
        return used, wanted

    def positions(self, tokens: int) -> Tensor | None:
        return torch.linspace(-3, 40, 3 * tokens).view(tokens, 3) if self.turn == "positions" else None

    def run(self, op: Any, leaves: Leaves, grads: Leaves) -> Leaves:
        """Outputs and gradients by name. op(q, k, leaves) → (q', k')."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        q, k, _ = leaves["qkv"].unbind(1)
        q, k = (x if name in self.given else None for name, x in (("q", q), ("k", k[:, :: self.group])))
        outputs = dict(zip("qk", op(q, k, leaves), strict=True))
        assert {name for name, x in outputs.items() if x is not None} == set(self.given)
        results = torch.autograd.grad([outputs[x] for x in grads], list(leaves.values()), list(grads.values()))
        return {**{x: outputs[x] for x in grads}, **{f"d {x}": g for x, g in zip(leaves, results, strict=True)}}

    def formula(self, layout: PackedLayout, dtype: torch.dtype) -> Leaves:
        """In plain PyTorch, with its own derivative."""
        leaves, grads = self.leaves(layout.capacity)
        wide = {name: x.to(torch.promote_types(dtype, x.dtype)) for name, x in leaves.items()}

        def op(q: Tensor | None, k: Tensor | None, leaves: Leaves) -> Any:
            return tuple(None if x is None else self._plain(x, n, leaves, layout) for n, x in (("q", q), ("k", k)))

        return self.run(op, wide, {name: x.to(dtype) for name, x in grads.items()})

    def _plain(self, x: Tensor, name: str, leaves: Leaves, layout: PackedLayout) -> Tensor:
        weight, bias = leaves.get(f"{name}_weight"), leaves.get(f"{name}_bias")
        if weight is not None:
            y = x.flatten(1) if self.norm == "rms_across_heads" else x
            y = F.layer_norm(y, weight.shape, weight, bias, EPS) if bias is not None else self._rms(y, weight)
        else:
            y = x
        y = y.view(x.shape)
        real = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (turn.to(real) for turn in self._turns(leaves, layout, real))
        a, b = y.to(real).unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else y.to(real).chunk(2, dim=-1)
        both = a * cos - b * sin, a * sin + b * cos
        y = torch.stack(both, dim=-1).flatten(-2) if self.interleaved else torch.cat(both, dim=-1)
        return torch.where((layout.segment_ids >= 0)[:, None, None], y.to(x.dtype), 0)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, EPS)

    def _turns(self, leaves: Leaves, layout: PackedLayout, real: torch.dtype) -> tuple[Tensor, Tensor]:
        if "cos" in leaves:
            return tuple(leaves[x] if self.turn == "heads" else leaves[x][:, None] for x in ("cos", "sin"))
        places, angles = self.positions(layout.capacity), []
        places = layout.coords if places is None else places
        for axis, size in enumerate(ROPES[True].split_for(self.head_dim)):
            speeds = THETAS[axis] ** (-torch.arange(0, size, 2, dtype=real) / max(size, 1))
            angles.append(places[:, axis, None].to(real) * speeds)
        angles = torch.cat(angles, dim=1)[:, None]
        return angles.cos(), angles.sin()

    def run_op(self, layout: PackedLayout, device: torch.device, backend: str) -> Leaves:
        """With NaN in the padding of everything that has any."""
        leaves, grads = self.leaves(layout.capacity)
        padding = layout.segment_ids < 0

        def poisoned(x: Tensor) -> Tensor:
            return x.masked_fill(padding.view(-1, *[1] * (x.ndim - 1)), float("nan")).to(device)

        leaves = {name: x.to(device) if name[1:2] == "_" else poisoned(x) for name, x in leaves.items()}
        places = self.positions(layout.capacity)
        op = partial(
            self.op, layout=layout.to(device), positions=None if places is None else poisoned(places), backend=backend
        )
        return self.run(op, leaves, {name: poisoned(x) for name, x in grads.items()})

    def op(self, q: Tensor | None, k: Tensor | None, leaves: Leaves, layout: PackedLayout, **options: Any) -> Any:
        weights = leaves.get("q_weight"), leaves.get("k_weight")
        rope = RopeTable(leaves["cos"], leaves["sin"], self.interleaved) if "cos" in leaves else ROPES[self.interleaved]
        biases = {"q_bias": leaves.get("q_bias"), "k_bias": leaves.get("k_bias")}
        return qk_norm_rope(q, k, *weights, layout, rope, norm=self.norm, eps=EPS, **biases, **options)

    def check(self, layout: PackedLayout, device: torch.device, backend: str) -> None:
        with poisoned_scratch():
            actual = self.run_op(layout, device, backend)
        plain, oracle = (self.formula(layout, dtype) for dtype in (self.dtype, torch.float64))
        padding = layout.segment_ids < 0
        for name, result in actual.items():
            assert_within_rule(result, plain[name], oracle[name], name=f"{name} of {self}")
            if name.removeprefix("d ")[1:2] != "_":
                assert not result.cpu()[padding].any(), name


FORMS = st.builds(
    Form,
    norm=st.sampled_from(NORMS),
    turn=st.sampled_from(["", "positions", "tokens", "heads"]),
    given=st.sampled_from(["qk", "q", "k"]),
    interleaved=st.booleans(),
    normed=st.sampled_from(["qk", "qk", "q", "k", ""]),
    head_dim=st.sampled_from([6, 8, 24]),
    heads=st.sampled_from([1, 3, 4]),
    dtype=st.sampled_from(DTYPES),
)


@pytest.mark.parametrize("backend", BACKENDS)
@examples(14)
@given(pack=packs(), form=FORMS)
def test_random_forms_match_the_oracle(pack: Pack, form: Form, backend: str, device: torch.device) -> None:
    form.check(pack.layout, device, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turn", ["", "tokens"])
@pytest.mark.parametrize("norm", NORMS)
def test_grouped_queries(norm: str, turn: str, backend: str, device: torch.device) -> None:
    Form(norm, turn, heads=6, group=3).check(LAYOUT, device, backend)


@pytest.mark.parametrize(("interleaved", "turn"), [(True, ""), (False, "heads")])
@pytest.mark.parametrize("norm", NORMS[1:])
def test_wide_heads(norm: str, turn: str, interleaved: bool, device: torch.device) -> None:
    # 72 channels a head; 5 heads of them: neither is a power of two, nor is their product.
    Form(norm, turn, interleaved=interleaved, head_dim=72, heads=5).check(SMALL, device, "triton")


def test_many_tokens_over_all_heads(device: torch.device) -> None:
    # Several programs, the last with a part of its tokens; sums folded once.
    layout = PackedLayout.from_grids([(1, 5, 7)], capacity=37)
    Form("rms_across_heads", "tokens", heads=2).check(layout, device, "triton")


@pytest.mark.parametrize(("turn", "launches"), [("", 2), ("tokens", 1)])
def test_the_widest_have_a_launch_each_for_queries_and_keys(turn: str, launches: int, device: torch.device) -> None:
    form, layout = Form("rms_across_heads", turn, heads=66, group=2, head_dim=128), SMALL.to(device)
    form.check(SMALL, device, "triton")
    leaves, grads = ({name: x.to(device) for name, x in part.items()} for part in form.leaves(5))
    with recording((9, 0)) as recorder:
        form.run(partial(form.op, layout=layout, backend="triton"), leaves, grads)
    names = [kernel.fn.__name__ for kernel, *_ in recorder.launches]
    assert names.count("qk_norm_rope_together_backward_kernel") == launches


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_to_the_bit(backend: str, device: torch.device) -> None:
    for form in (Form("rms_across_heads", "heads"), Form("layer", "tokens")):
        first, second = (form.run_op(SMALL, device, backend) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_alone_as_together(backend: str, device: torch.device) -> None:
    for form in (Form(), Form("rms_across_heads"), Form("layer", "heads")):
        both = form.run_op(SMALL, device, backend)
        for name in "qk":
            alone = replace(form, given=name).run_op(SMALL, device, backend)
            for same in {name, f"d {name}_weight", f"d {name}_bias"} & both.keys():
                assert torch.equal(alone[same], both[same]), same


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_and_positions_of_the_layout_change_nothing(backend: str, device: torch.device) -> None:
    layout, rope = LAYOUT.to(device), Rope3D(theta=(1e4, 1e4, 1e4), interleaved=False)
    q, k = torch.randn(2, 19, 3, 64, device=device)
    angles = rope.angles(64, layout.segment_ids, layout.coords, layout.grids)
    run = partial(qk_norm_rope, q, k, None, None, layout, backend=backend)
    expected = run(replace(rope, theta=1e4))
    assert all(map(torch.equal, run(rope), expected))
    assert all(map(torch.equal, run(rope, positions=layout.coords.float()), expected))
    for given_angles in (angles, angles[:, None].expand(19, 3, 32)):
        torch.testing.assert_close(run(RopeTable.of_angles(given_angles, interleaved=False)), expected)


@pytest.mark.parametrize("interleaved", [True, False])
def test_strides_of_tables_and_weights(interleaved: bool, device: torch.device) -> None:
    layout, x = SMALL.to(device), torch.randn(5, 3, 48, device=device)
    q, weights = x.permute(2, 1, 0).contiguous().permute(2, 1, 0), torch.randn(2, 288, device=device)[:, ::2].unbind()
    table = torch.randn(2, 5, 3, 24, device=device)
    dense = table.unbind(), weights
    # Columns that are there twice; rows and heads the other way round; all past 32 bits.
    twice = table.repeat_interleave(2, dim=-1)[..., ::2].unbind(), weights
    turned = table.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1).unbind(), weights
    far = [far_apart(t, 0) for t in dense[0]], [far_apart(w, 0) for w in weights]
    results = []
    for (cos, sin), (q_weight, k_weight) in (dense, twice, turned, far):
        leaves = [t.detach().requires_grad_() for t in (q, x, cos, sin, q_weight, k_weight)]
        rope = RopeTable(*leaves[2:4], interleaved)
        options = {"norm": "rms_across_heads", "backend": "triton"}
        outputs = qk_norm_rope(*leaves[:2], *leaves[4:], layout, rope, **options)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, (x, q))])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_weights_and_tables_that_want_no_gradient_cost_nothing(device: torch.device) -> None:
    layout = SMALL.to(device)
    for form in (Form("rms_across_heads"), Form("layer")):
        leaves, _ = form.leaves(5)
        names, tensors = zip(*leaves.items(), strict=True)

        def op(qkv: Tensor, *vectors: Tensor, form: Form = form, names: tuple[str, ...] = names) -> Any:
            q, k, _ = qkv.unbind(1)
            return form.op(q, k, dict(zip(names[1:], vectors, strict=True)), layout, backend="triton")

        check_unasked(op, [x.to(device) for x in tensors], asked=1, spared="fold_kernel")
    q = torch.randn(5, 3, 8, device=device, requires_grad=True)
    cos, sin = torch.randn(2, 5, 4, device=device)
    gradients = []
    for wanted in (False, True):
        table = RopeTable(cos.clone().requires_grad_(wanted), sin)
        output, _ = qk_norm_rope(q, None, None, None, layout, table, backend="triton")
        gradients.append(torch.autograd.grad(output, q, torch.ones_like(output))[0])
    assert torch.equal(*gradients)


def test_gradcheck() -> None:
    layout = PackedLayout.from_grids([(1, 2, 2)], capacity=5)
    for form in (Form("rms_across_heads", "heads"), Form("layer", "tokens"), Form("layer", given="k")):
        form = replace(form, head_dim=4, heads=2, interleaved=form.norm == "layer")
        leaves, _ = form.leaves(5)

        def op(*tensors: Tensor, form: Form = form, names: tuple[str, ...] = tuple(leaves)) -> list[Tensor]:
            named = dict(zip(names, tensors, strict=True))
            q, k, _ = named["qkv"].unbind(1)
            outputs = form.op(q if "q" in form.given else None, k, named, layout)
            return [x for x in outputs if x is not None]

        inputs = [x.double().requires_grad_() for x in leaves.values()]
        assert torch.autograd.gradcheck(op, inputs)
        assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("norm", NORMS[1:])
def test_opcheck(norm: str, device: torch.device) -> None:
    layout = SMALL.to(device)
    q, k, dq, dk = (torch.randn(3, 5, 8, device=device).transpose(0, 1) for _ in range(4))
    weights, biases = torch.randn(2, 2, 24 if norm == "rms_across_heads" else 8, device=device)
    biases = [*biases] if norm == "layer" else [None, None]
    table = torch.randn(2, 5, *([3] if norm == "layer" else []), 4, device=device)
    rest = (layout.segment_ids, layout.coords, None, None, *encoded(None, 8), norm, 1e-6)
    both = [q, k, *weights, *biases, *table]
    alone = [q, None, weights[0], None, biases[0], None, *table]
    # The rest of what it looks at takes ten seconds, and is looked at in the form that models here have.
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    for tensors in (both, alone):
        leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
        check(_qk_norm_rope.registered, (*leaves, *rest))
        grads = dq, None if tensors is alone else dk
        check(_qk_norm_rope_backward.registered, (*grads, *tensors, *rest, True, tensors is both))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_once_for_ragged_batches(backend: str, device: torch.device) -> None:
    form = Form("layer", "heads", given="k")
    leaves, grads = ({name: x.to(device) for name, x in part.items()} for part in form.leaves(14))
    compiled = torch.compile(form.op, fullgraph=True, backend="aot_eager")
    with no_recompilation():
        for grids in ([(2, 3, 2)], [(1, 2, 2), (1, 1, 5)]):
            layout = PackedLayout.from_grids(grids, capacity=14, max_segments=3, device=device)
            expected, actual = (
                form.run(partial(op, layout=layout, backend=backend), leaves, grads) for op in (form.op, compiled)
            )
            for name in expected:
                torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
def test_empty_pack(norm: str, backend: str, device: torch.device) -> None:
    layout = PackedLayout.from_grids([], max_segments=1, device=device)
    for form in (Form(norm, "tokens"), Form(norm, "heads", given="q")):
        leaves, grads = ({name: x.to(device) for name, x in part.items()} for part in form.leaves(0))
        results = form.run(partial(form.op, layout=layout, backend=backend), leaves, grads)
        assert all(result.numel() == 0 or not result.any() for result in results.values())


Q, W, V, T = torch.zeros(19, 2, 64), torch.zeros(64), torch.zeros(128), torch.zeros(19, 32)
ACROSS, LAYER = {"norm": "rms_across_heads"}, {"norm": "layer"}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, None, None, None), {}, ValueError, "q, k: both None"),
        ((None, Q, W, W), {}, ValueError, "q_weight, q_bias: given without q"),
        ((None, Q, None, W), LAYER | {"q_bias": W, "k_bias": W}, ValueError, "q_weight, q_bias: given without q"),
        ((None, Q, None, W), LAYER, ValueError, "k_bias: None; with a weight"),
        ((None, Q[1:], None, W), {}, ValueError, r"k: shape .* it must be \[19, H, D\]"),
        ((Q, None, W, W), {}, ValueError, "k_weight, k_bias: given without k"),
        ((Q, Q, W, W), {"norm": "batch"}, ValueError, 'norm: .batch.; it must be "rms", "rms_across_heads" or "layer"'),
        ((Q, Q, W, W), ACROSS, ValueError, r"q_weight: shape \(64,\); it must be \[128\]"),
        ((Q, Q[:, :1], V, V), ACROSS, ValueError, r"k_weight: shape \(128,\); it must be \[64\]"),
        ((Q, Q, V, V), {}, ValueError, r"q_weight: shape \(128,\); it must be \[64\]"),
        ((Q, Q, W, W), LAYER, ValueError, "q_bias: None; with a weight and norm=.layer. there must be one"),
        ((Q, Q, W, W), {"q_bias": W}, ValueError, "q_bias: given; .* else it must be None"),
        ((Q, Q, None, None), LAYER | {"k_bias": W}, ValueError, "k_bias: given; "),
        ((Q, Q, W, W), LAYER | {"q_bias": W, "k_bias": V}, ValueError, r"k_bias: shape \(128,\); it must be \[64\]"),
        ((Q, Q, W, W, RopeTable(T[1:], T)), {}, ValueError, r"rope.cos: shape \(18, 32\); it must be \[19, 32\]"),
        ((Q, Q, W, W, RopeTable(T, T[:, None])), {}, ValueError, r"rope.sin: .* it must be \[19, 2, 32\]"),
        ((Q, Q, W, W, RopeTable(T, Q[..., :32])), {}, ValueError, "rope.sin: .* must be that of rope.cos"),
        ((Q, Q, W, W, RopeTable(T.half(), T)), {}, TypeError, "rope.cos: float16; it must be float32"),
        ((Q, Q, W, W, RopeTable(None, T)), {}, TypeError, "rope.cos: NoneType"),
        ((Q, Q[:, :1], W, W, RopeTable(Q[..., :32], Q[..., :32])), {}, ValueError, "rope.cos: 2 heads; k has 1"),
        ((Q, Q, W, W), {"positions": T[:, :3]}, ValueError, "positions: given without a rope of coordinates"),
        (
            (Q, Q, W, W, RopeTable(T, T)),
            {"positions": T[:, :3]},
            ValueError,
            "positions: given without a rope of coordinates",
        ),
        ((Q, Q, W, W, RopeTable(T, T)), {"segment_scale": T[:3, :3]}, ValueError, "segment_scale: given without a"),
        ((Q, Q, W, W, Rope3D()), {"positions": T[:, :2]}, ValueError, r"positions: .* must be \[19, 3\]"),
        ((Q, Q, W, W, Rope3D()), {"positions": T[:, :3].long()}, TypeError, "positions: int64; it must be float32"),
        ((Q, Q, W, W, Rope3D()), {"positions": T[:, :3].clone().requires_grad_()}, ValueError, "be detached"),
    ],
)
def test_bad_arguments(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    rope = arguments[4] if len(arguments) > 4 else None
    with pytest.raises(error, match=message):
        qk_norm_rope(*arguments[:4], LAYOUT, rope, **options)


@pytest.mark.parametrize("theta", [(1.0, 2.0), (1.0, 0.0, 2.0), [1.0, float("nan"), 2.0]])
def test_bad_thetas(theta: Any) -> None:
    with pytest.raises(ValueError, match=r"theta: .* positive and finite, one number or three"):
        Rope3D(theta=theta)
