from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sora_fast.ops._modulation import parts
from sora_fast.ops.linear_unpatchify import linear_unpatchify
from sora_fast.ops.patch_embed import (
    FactorisedPosition,
    _patch_embed,
    _pixel_gradient,
    _rows_taken,
    _table_gradient,
    _weight_gradient,
    patch_embed,
)
from sora_fast.ops.unpatchify import unpatchify
from sora_fast.packing import PackedLayout, RaggedLatents
from sora_fast.proof.rule import poisoned_scratch
from tests.helpers import assert_within_rule, examples, far_apart
from tests.modulated import no_recompilation
from tests.ragged import BACKENDS, DTYPES, RaggedCase, pad, ragged_cases

POSITIONS = ("none", "row a token", "tables", "only h")
WIDTHS = [1, 20, 32] if not torch.cuda.is_available() else [1, 20, 384, 1152]


class Inputs:
    """What an op and its oracle are given: leaves by name, the same numbers in any dtype."""

    def __init__(self, case: RaggedCase, width: int, position: str) -> None:
        torch.manual_seed(case.seed)
        self.case, self.layout, tokens = case, case.layout(), case.layout().capacity
        shapes: dict[str, tuple[int, ...]] = {"weight": (width, case.num_pixels), "bias": (width,)}
        if position == "row a token":
            shapes["position"] = (tokens, width)
        elif position != "none":
            spare = {"t": 0, "h": 1, "w": 2}
            largest = np.max(case.grids, axis=0)
            shapes |= {axis: (size + spare[axis], width) for axis, size in zip("thw", largest, strict=True)}
            if position == "only h":
                del shapes["t"], shapes["w"]
        self.leaves = {"flat": case.latents().flat}
        # Rows of a wider tensor: strides are taken as they are.
        self.leaves |= {name: torch.randn(*shape, 2).to(case.dtype)[..., 0] for name, shape in shapes.items()}
        self.d_tokens = torch.randn(tokens, width).to(case.dtype)

    def run(self, op: Any, dtype: torch.dtype, d_tokens: Tensor, *, device: str | torch.device = "cpu", **spoiled: Any):
        """{"tokens": result, name of a leaf: its gradient}."""
        leaves = {**self.leaves, **spoiled}
        leaves = {name: leaf.detach().to(device, dtype).requires_grad_() for name, leaf in leaves.items()}
        tokens = op(**leaves)
        grads = torch.autograd.grad(tokens, list(leaves.values()), d_tokens.to(device, dtype))
        return {"tokens": tokens, **dict(zip(leaves, grads, strict=True))}

    def formula(self, flat: Tensor, weight: Tensor, bias: Tensor, **position: Tensor) -> Tensor:
        tokens = F.linear(self.case.patches(flat), weight, bias)
        segments, raster = self.layout.segment_ids.numpy(), self.layout.raster_index.numpy()
        coords = [
            np.stack(np.unravel_index(raster[segments == segment], grid), axis=1)
            for segment, grid in enumerate(self.case.grids)
        ]
        rows = np.concatenate([*coords, np.zeros((self.case.spare_tokens, 3), dtype=np.int64)])
        for axis, column in zip("thw", rows.T, strict=True):
            if axis in position:
                tokens = tokens + position[axis][column]
        tokens = tokens + position.get("position", 0)
        return torch.where((self.layout.segment_ids >= 0)[:, None], tokens, 0)

    def op(self, device: torch.device, backend: str) -> Any:
        case = self.case

        def call(flat: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None = None, **tables: Tensor):
            return patch_embed(
                case.latents().to(device).with_flat(flat),
                weight,
                bias,
                self.layout.to(device),
                case.patch_size,
                FactorisedPosition(**tables) if tables else position,
                backend=backend,
            )

        return call


def check(case: RaggedCase, width: int, position: str, backend: str, device: torch.device) -> None:
    """Values and all gradients obey the error rule, with NaN in padding, in what no token reads, and in scratch."""
    inputs = Inputs(case, width, position)
    padding = inputs.layout.segment_ids < 0
    nan = float("nan")
    flat = inputs.leaves["flat"].masked_fill(case.unread(), nan)
    d_tokens = inputs.d_tokens.masked_fill(padding[:, None], nan)
    with poisoned_scratch():
        actual = inputs.run(inputs.op(device, backend), case.dtype, d_tokens, device=device, flat=flat)
    plain = inputs.run(inputs.formula, case.dtype, inputs.d_tokens)
    oracle = inputs.run(inputs.formula, torch.float64, inputs.d_tokens)
    for name, result in actual.items():
        assert_within_rule(result, plain[name], oracle[name], name=f"{name} of {case}")
    assert not actual["tokens"].cpu()[padding].any()
    assert not actual["flat"].cpu()[case.unread()].any()


@pytest.mark.parametrize("backend", BACKENDS)
@examples(12)
@given(case=ragged_cases(), width=st.sampled_from(WIDTHS), position=st.sampled_from(POSITIONS))
def test_random_cases_match_the_oracle(
    case: RaggedCase, width: int, position: str, backend: str, device: torch.device
) -> None:
    check(case, width, position, backend, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks_in_every_direction(dtype: torch.dtype, device: torch.device) -> None:
    # More pixels, channels and tokens than one block of any of the three kernels holds.
    case = RaggedCase(shapes=((9, 2, 12, 17), (9, 1, 9, 5)), order="tiled", dtype=dtype)
    check(case, 130, "tables", "triton", device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_addresses_beyond_int32(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from sora_fast.kernels import _patches

    monkeypatch.setattr(_patches, "INT32_ELEMENTS", 0)
    check(RaggedCase(order="tiled", drop=True, dtype=dtype), 20, "tables", "triton", device)


@pytest.mark.parametrize(
    ("name", "axis"), [("weight", 0), ("weight", 1), ("bias", 0), ("position", 0), ("position", 1), ("flat", 0)]
)
def test_strides_beyond_int32(name: str, axis: int, device: torch.device) -> None:
    inputs = Inputs(RaggedCase(), 5, "row a token")
    op, leaves = inputs.op(device, "triton"), {name: leaf.to(device) for name, leaf in inputs.leaves.items()}
    torch.testing.assert_close(op(**leaves | {name: far_apart(leaves[name], axis)}), op(**leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layout_of_any_strides(backend: str, device: torch.device) -> None:
    weight = torch.randn(5, CASE.num_pixels, device=device)
    rows = torch.randn(LAYOUT.capacity, CASE.num_pixels, device=device)

    def run(layout: PackedLayout, latents: RaggedLatents) -> list[Tensor]:
        to_pixels = (layout, PATCH, latents.shapes)
        return [
            patch_embed(latents, weight, None, layout, PATCH, backend=backend),
            unpatchify(rows, *to_pixels, capacity=999, backend=backend).flat,
            linear_unpatchify(
                rows, weight.T.repeat(1, 5)[:, : rows.shape[1]], None, *to_pixels, capacity=999, backend=backend
            ).flat,
        ]

    plain = LAYOUT.to(device), LATENTS.to(device)
    for actual, expected in zip(run(*(bundle._map(_strided) for bundle in plain)), run(*plain), strict=True):
        assert torch.equal(actual, expected)


def _strided(x: Tensor) -> Tensor:
    """Every second number of memory, the first axis the fastest."""
    return torch.stack([x.mT, x.mT], dim=-1)[..., 0].mT if x.ndim == 2 else torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.parametrize("pw", [4, 8, 20])
@pytest.mark.parametrize("spoiler", [0, 1, 2])
def test_runs_as_long_as_a_vector(pw: int, spoiler: int, device: torch.device) -> None:
    """Patches that are read by vectors where all rows of a video start at a multiple of them, and not elsewhere: a
    narrow video, one that starts at an odd place, a crop. spoiler: which of three videos is odd.
    """
    videos = [[2, 1, 3, 2 * pw] for _ in range(3)]
    videos[spoiler][3] -= 3
    case = RaggedCase(tuple(map(tuple, videos)), (1, 2, pw), spare_tokens=30, dtype=torch.float16)
    check(case, 20, "none", "triton", device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_program_walks_over_channels(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sora_fast.kernels.patch_embed import PatchEmbedConfig

    assert PatchEmbedConfig().channels_for(1 << 15, 1152) == 1152
    assert PatchEmbedConfig().channels_for(1 << 11, 1152) == 128
    assert PatchEmbedConfig().channels_for(1 << 14, 1152) == 640, "two programs a block of tokens, of 5 and 4 steps"
    # One program a block of tokens, of three steps; then two, of two steps and of one.
    for programs, position in ((1, "row a token"), (4, "tables")):
        few = PatchEmbedConfig(tokens=16, width=32, programs=programs, num_warps=4)
        assert few.channels_for(RaggedCase().layout().capacity, 70) == (96 if programs == 1 else 64)
        monkeypatch.setattr(PatchEmbedConfig, "choose", staticmethod(lambda *_, few=few: few))
        check(RaggedCase(dtype=dtype), 70, position, "triton", device)


def test_several_partial_sums(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from sora_fast.kernels.patch_embed import PatchEmbedConfig

    short = PatchEmbedConfig(step=16, chunk=16)
    monkeypatch.setattr(PatchEmbedConfig, "choose", staticmethod(lambda *_: short))
    check(RaggedCase(shapes=((3, 4, 6, 8), (3, 1, 2, 7))), 20, "tables", "triton", device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_conv3d_video_by_video(backend: str, device: torch.device) -> None:
    case = RaggedCase()
    layout, latents = case.layout().to(device), case.latents().to(device)
    kernel, bias = torch.randn(6, case.channels, *case.patch_size), torch.randn(6)
    weight = kernel.flatten(1).to(device)
    tokens = patch_embed(latents, weight, bias.to(device), layout, case.patch_size, backend=backend).cpu()
    bounds = layout.cu_seqlens.tolist()
    for video, start, end in zip(case.latents().to_list(), bounds, bounds[1:], strict=False):
        plain = F.conv3d(pad(video, case.patch_size), kernel, bias, stride=case.patch_size).flatten(1).T
        exact = F.conv3d(pad(video, case.patch_size).double(), kernel.double(), bias.double(), stride=case.patch_size)
        assert_within_rule(tokens[start:end], plain, exact.flatten(1).T)


def test_sin_cos_positions_are_those_of_dit() -> None:
    width, rows, columns = 12, 3, 5
    table = FactorisedPosition.sin_cos(width, rows, columns)
    layout = PackedLayout.from_grids([(1, rows, columns)])
    latents = RaggedLatents.from_list([torch.zeros(1, 1, rows, columns)])
    tokens = patch_embed(latents, torch.zeros(width, 1), None, layout, (1, 1, 1), table)
    omega = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    for h in range(rows):
        for w in range(columns):
            parts = [np.sin(w * omega), np.cos(w * omega), np.sin(h * omega), np.cos(h * omega)]
            assert np.array_equal(tokens[h * columns + w].numpy(), np.concatenate(parts).astype(np.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_to_the_bit(backend: str, device: torch.device) -> None:
    inputs = Inputs(RaggedCase(order="tiled", drop=True), 20, "tables")
    runs = [inputs.run(inputs.op(device, backend), torch.float32, inputs.d_tokens, device=device) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_partial_sums_of_the_weights_gradient_are_bounded(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sora_fast.kernels.patch_embed import PatchEmbedConfig

    config = PatchEmbedConfig()
    chunks = {rows: config.chunk_for(1 << 20, 5120 * rows) for rows in (5, 65, 257, 3073)}
    assert chunks[5] == config.chunk and chunks[65] == 32768
    assert all(-(-(1 << 20) // chunk) * 5120 * rows <= 1 << 24 for rows, chunk in chunks.items())
    inputs = Inputs(RaggedCase(order="tiled"), 20, "tables")
    run = partial(inputs.run, inputs.op(device, "triton"), torch.float32, inputs.d_tokens, device=device)
    monkeypatch.setattr(PatchEmbedConfig, "chunk_for", lambda *_: 32)
    many = run()
    monkeypatch.undo()
    for name, result in run().items():
        torch.testing.assert_close(result, many[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_table_are_added_up_in_fp32(dtype: torch.dtype) -> None:
    """4096 tokens took the same row: one by one in 16 bits, the sum stops growing at 256, or at 2048."""
    layout = PackedLayout.from_grids([(1, 64, 64)])
    latents = RaggedLatents.from_list([torch.zeros(1, 1, 64, 64, dtype=dtype)])
    table = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
    position = FactorisedPosition(t=table)
    tokens = patch_embed(latents, torch.zeros(2, 1, dtype=dtype), None, layout, (1, 1, 1), position, backend="torch")
    assert tokens.dtype == dtype
    assert (torch.autograd.grad(tokens.sum(), table)[0] == 4096).all()


@pytest.mark.parametrize("order", ["thwc", "hwtc"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_orders_are_other_columns_of_the_weight(backend: str, order: str, device: torch.device) -> None:
    """Values and gradients are those of the weight in the usual order."""
    inputs = Inputs(RaggedCase(patch_size=(2, 1, 3), order="tiled"), 20, "none")
    sizes = dict(zip(("t", "h", "w"), inputs.case.patch_size, strict=True))
    layout, latents = inputs.layout.to(device), inputs.case.latents().to(device)

    def call(flat: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = rearrange(weight, f"n (c t h w) -> n ({' '.join(order)})", **sizes)
        given = latents.with_flat(flat), weight, bias, layout, inputs.case.patch_size
        return patch_embed(*given, order=order, backend=backend)

    usual, other = (
        inputs.run(op, torch.float32, inputs.d_tokens, device=device) for op in (inputs.op(device, backend), call)
    )
    for name, result in usual.items():
        torch.testing.assert_close(other[name], result, rtol=1e-5, atol=1e-5)  # a copy may be multiplied another way


def test_gradcheck() -> None:
    inputs = Inputs(RaggedCase(shapes=((2, 2, 3, 2), (2, 1, 1, 3)), drop=True), 3, "tables")
    op = inputs.op(torch.device("cpu"), "torch")
    leaves = {name: leaf.double().requires_grad_() for name, leaf in inputs.leaves.items()}
    assert torch.autograd.gradcheck(lambda *t: op(**dict(zip(leaves, t, strict=True))), tuple(leaves.values()))


@pytest.mark.parametrize("position", ["none", "tables"])
def test_opcheck(position: str, device: torch.device) -> None:
    inputs = Inputs(RaggedCase(), 5, position)
    case, layout, latents = inputs.case, inputs.layout.to(device), inputs.case.latents().to(device)
    leaves = {name: leaf.to(device) for name, leaf in inputs.leaves.items()}
    tables = [leaves[axis] for axis in "thw" if axis in leaves]
    table = torch.cat(tables) if tables else leaves.get("position")
    rows = [len(t) for t in tables]
    geometry = (latents.offsets, latents.shapes, layout.segment_ids, layout.coords, list(case.patch_size))
    weights = [leaves["weight"], leaves["bias"], table]
    differentiable = [latents.flat, *weights]
    for leaf in differentiable:
        if leaf is not None:
            leaf.requires_grad_()
    torch.library.opcheck(_patch_embed.registered, (*differentiable, rows, *geometry))
    d_tokens = inputs.d_tokens.to(device).t().contiguous().t()
    flat, weight = latents.flat.detach(), leaves["weight"].detach()
    torch.library.opcheck(_weight_gradient.registered, (d_tokens, flat, *geometry, case.num_pixels))
    if rows:
        torch.library.opcheck(_table_gradient.registered, (d_tokens, *parts(_rows_taken(*geometry[2:4], rows))))
    torch.library.opcheck(_pixel_gradient.registered, (d_tokens, weight, *geometry, len(flat)))


@pytest.mark.parametrize(("backend", "compiler"), [("torch", "inductor"), ("triton", "aot_eager")])
def test_compiles_once_for_ragged_batches(backend: str, compiler: str, device: torch.device) -> None:
    weight, bias, *tables = (
        torch.randn(*s, device=device, requires_grad=True) for s in ((8, 12), (8,), (4, 8), (9, 8))
    )

    def step(latents: RaggedLatents, layout: PackedLayout, *parameters: Tensor) -> Tensor:
        weight, bias, t, w = parameters
        return patch_embed(latents, weight, bias, layout, (1, 2, 2), FactorisedPosition(t=t, w=w), backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    with no_recompilation():
        for shapes in ([(3, 2, 5, 4), (3, 1, 6, 6)], [(3, 3, 4, 4)], [(3, 1, 1, 1), (3, 1, 3, 3), (3, 2, 2, 2)]):
            latents = RaggedLatents.empty(shapes, capacity=300, max_segments=3).to(device)
            latents = latents.with_flat(torch.randn(300, device=device))
            layout = PackedLayout.from_grids(
                [(t, -(-h // 2), -(-w // 2)) for _, t, h, w in shapes], capacity=30, max_segments=3
            ).to(device)
            results = []
            for fn in (step, compiled):
                tokens = fn(latents, layout, weight, bias, *tables)
                results.append([tokens, *torch.autograd.grad(tokens.square().sum(), (weight, bias, *tables))])
            for expected, actual in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_pack(backend: str, device: torch.device) -> None:
    layout = PackedLayout.from_grids([], max_segments=2).to(device)
    latents = RaggedLatents.from_list([], capacity=0, max_segments=2).to(device)
    weight = torch.ones(8, 4, device=device, requires_grad=True)
    tokens = patch_embed(latents, weight, None, layout, (1, 2, 2), backend=backend)
    tokens.sum().backward()
    assert tokens.shape == (0, 8) and not weight.grad.any()


@pytest.mark.parametrize("capacity", [0, 7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_no_tokens_are_zeros(backend: str, capacity: int, device: torch.device) -> None:
    layout = PackedLayout.from_grids([], capacity=capacity, max_segments=2).to(device)
    latents = RaggedLatents.from_list([], capacity=5, max_segments=2).to(device)
    latents = latents.with_flat(torch.full((5,), float("nan"), device=device, requires_grad=True))
    weight, bias, *tables = (
        torch.randn(*shape, device=device, requires_grad=True) for shape in ((8, 4), (8,), (3, 8), (3, 8), (3, 8))
    )
    leaves = [latents.flat, weight, bias, *tables]
    with poisoned_scratch():
        tokens = patch_embed(latents, weight, bias, layout, (1, 2, 2), FactorisedPosition(*tables), backend=backend)
        grads = torch.autograd.grad(tokens, leaves, torch.full_like(tokens, float("nan")))
    assert not tokens.any() and not any(grad.any() for grad in grads)


CASE = RaggedCase()
LAYOUT, LATENTS = CASE.layout(), CASE.latents()
NO_CHANNELS = RaggedLatents.from_list(
    [torch.zeros(CASE.shapes[0]), torch.zeros(0, *CASE.shapes[1][1:])], max_segments=3
)
WEIGHT, BIAS, PATCH = torch.zeros(5, CASE.num_pixels), torch.zeros(5), CASE.patch_size


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LATENTS, WEIGHT, BIAS, LAYOUT, (2, 2, 0)), ValueError, "patch_size: .* three ints"),
        ((LATENTS, WEIGHT, BIAS, LAYOUT, 2), ValueError, "patch_size: 2; .* three ints"),
        ((LATENTS.flat, WEIGHT, BIAS, LAYOUT, PATCH), TypeError, "latents: Tensor; it must be RaggedLatents"),
        ((LATENTS.with_flat(LATENTS.flat[:, None]), WEIGHT, BIAS, LAYOUT, PATCH), ValueError, "latents.flat: shape"),
        ((LATENTS.with_flat(LATENTS.flat[:9]), WEIGHT, BIAS, LAYOUT, PATCH), ValueError, "latents.flat: 9 elements"),
        ((NO_CHANNELS, WEIGHT, BIAS, LAYOUT, PATCH), ValueError, "latents: a video of 0 channels, but .* takes 3"),
        (
            (LATENTS.with_flat(LATENTS.flat.to("meta")), WEIGHT.to("meta"), None, LAYOUT, PATCH),
            ValueError,
            "on cpu, but weight is on meta",
        ),
        (
            (replace(LATENTS, offsets=LATENTS.offsets[1:]), WEIGHT, BIAS, LAYOUT, PATCH),
            ValueError,
            "latents.offsets: shape",
        ),
        (
            (replace(LATENTS, offsets=LATENTS.offsets.int()), WEIGHT, BIAS, LAYOUT, PATCH),
            TypeError,
            "latents.offsets: int32; it must be int64",
        ),
        ((LATENTS, WEIGHT, BIAS, None, PATCH), TypeError, "layout: NoneType; it must be a PackedLayout"),
        ((LATENTS, WEIGHT, BIAS, LAYOUT, (2, 2, 4)), ValueError, r"layout: segment 0 has the grid \(2, 3, 2\)"),
        ((LATENTS, WEIGHT[:, 1:], BIAS, LAYOUT, PATCH), ValueError, r"weight: .* it must be \[width, Cin·8\]"),
        ((LATENTS, WEIGHT[:, 8:], BIAS, LAYOUT, PATCH), ValueError, "latents: a video of 3 channels, but .* takes 2"),
        ((LATENTS, WEIGHT, BIAS[1:], LAYOUT, PATCH), ValueError, r"bias: shape \(4,\); it must be \[5\]"),
        ((LATENTS, WEIGHT.half(), BIAS, LAYOUT, PATCH), TypeError, "latents.flat: float32; it must be float16"),
        ((LATENTS, WEIGHT.int(), BIAS, LAYOUT, PATCH), TypeError, "weight: int32"),
        ((LATENTS, WEIGHT, BIAS, LAYOUT, PATCH, WEIGHT), ValueError, "position: shape .* it must be"),
        ((LATENTS, WEIGHT, BIAS, LAYOUT, PATCH, "rope"), TypeError, "position: str; it must be a tensor"),
        (
            (LATENTS, WEIGHT, BIAS, LAYOUT, PATCH, FactorisedPosition(h=WEIGHT[:2, :5])),
            ValueError,
            "position.h: 2 rows; it must have one for every coordinate",
        ),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patch_embed(*arguments)
    with pytest.raises(ValueError, match="width: 6; it must be a multiple of 4"):
        FactorisedPosition.sin_cos(6, 2, 2)
