from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given
from torch import Tensor

from sora_fast.ops._dispatch import explain
from sora_fast.ops._patches_torch import scattered
from sora_fast.ops.patch_embed import patch_embed
from sora_fast.ops.unpatchify import _unpatchify, _unpatchify_backward, unpatchify
from sora_fast.packing import PackedLayout, RaggedLatents
from sora_fast.proof.rule import poisoned_scratch
from tests.helpers import examples
from tests.modulated import no_recompilation
from tests.ragged import BACKENDS, RaggedCase, ragged_cases

ROWS = {"thwc": "(pt ph pw c)", "cthw": "(c pt ph pw)", "hwtc": "(ph pw pt c)"}


def oracle(tokens: Tensor, case: RaggedCase, order: str) -> Tensor:
    """Each video put together on its full grid, then cropped."""
    layout, (pt, ph, pw) = case.layout(), case.patch_size
    videos = []
    for segment, ((_, *sizes), (t, h, w)) in enumerate(zip(case.shapes, case.grids, strict=True)):
        mine = layout.segment_ids == segment
        full = tokens.new_zeros(t * h * w, tokens.shape[1]).index_put((layout.raster_index[mine].long(),), tokens[mine])
        parts = {"t": t, "h": h, "pt": pt, "ph": ph, "pw": pw}
        video = rearrange(full, f"(t h w) {ROWS[order]} -> c (t pt) (h ph) (w pw)", **parts)
        videos.append(video[:, : sizes[0], : sizes[1], : sizes[2]].flatten())
    return torch.cat(videos)


def check(
    case: RaggedCase, backend: str, device: torch.device, channels: int | None = None, order: str = "thwc"
) -> None:
    """Nothing is computed, so everything must agree to the bit: values, gradients, zeros."""
    layout, latents = case.layout(), case.latents()
    channels = channels or case.channels
    columns = case.num_pixels // case.channels * channels
    elements = latents.flat.numel() * channels // case.channels + 3
    tokens = torch.randn(layout.capacity, 2 * columns).to(case.dtype)[:, ::2].requires_grad_()
    clean = torch.where((layout.segment_ids >= 0)[:, None], tokens, 0)
    exact = oracle(clean, case, order)
    garbage = torch.where((layout.segment_ids >= 0)[:, None], tokens.detach(), float("nan"))
    given = garbage.to(device).requires_grad_()
    with poisoned_scratch():
        places = layout.to(device), case.patch_size, latents.shapes.to(device)
        videos = unpatchify(given, *places, capacity=elements, order=order, backend=backend)
        d_flat = torch.randn(elements).to(case.dtype)
        (d_tokens,) = torch.autograd.grad(videos.flat, given, d_flat.to(device))
    used = len(exact)
    assert torch.equal(videos.flat[:used].cpu(), exact)
    assert videos.flat.shape == (elements,) and not videos.flat[used:].any()
    assert torch.equal(d_tokens.cpu(), torch.autograd.grad(exact, tokens, d_flat[:used])[0])
    assert [tuple(video.shape) for video in videos.to_list()] == [(channels, *shape[1:]) for shape in case.shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=ragged_cases())
def test_random_cases_match_the_oracle(case: RaggedCase, backend: str, device: torch.device) -> None:
    check(case, backend, device)


@pytest.mark.parametrize("order", ["cthw", "hwtc"])
@pytest.mark.parametrize("backend", BACKENDS)
@examples(10)
@given(case=ragged_cases())
def test_other_orders_match_the_oracle(case: RaggedCase, order: str, backend: str, device: torch.device) -> None:
    if order == "hwtc" and backend in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=f"backend: '{backend}' cannot run unpatchify here: .* no order hwtc"):
            check(case, backend, device, order=order)
    else:
        check(case, backend, device, order=order)


def test_who_moves_an_order_instead_is_said(device: torch.device) -> None:
    case = RaggedCase()
    layout, latents = case.layout().to(device), case.latents().to(device)
    tokens = torch.randn(layout.capacity, case.num_pixels, device=device)
    unpatchify(tokens, layout, case.patch_size, latents, order="hwtc")
    assert "not cpu: the compiled libraries have no order hwtc" in explain()


def test_orders_without_waiting_for_a_device(device: torch.device) -> None:
    """What the torch backend does elsewhere than on a CPU."""
    case = RaggedCase(patch_size=(2, 1, 3), drop=True)
    layout, latents = case.layout(), case.latents()
    tokens = torch.where((layout.segment_ids >= 0)[:, None], torch.randn(layout.capacity, case.num_pixels), 0)
    for order in ROWS:
        places = latents.offsets, latents.shapes, layout, case.patch_size, len(latents.flat)
        found = scattered(tokens, *places, order)
        exact = oracle(tokens, case, order)
        assert torch.equal(found[: len(exact)], exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_learned_sigma_doubles_the_channels(backend: str, device: torch.device) -> None:
    check(RaggedCase(drop=True), backend, device, channels=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_addresses_beyond_int32(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from sora_fast.kernels import _patches

    monkeypatch.setattr(_patches, "INT32_ELEMENTS", 0)
    check(RaggedCase(order="tiled", drop=True, dtype=dtype), "triton", device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inverts_patch_embed(backend: str, device: torch.device) -> None:
    case = RaggedCase(order="tiled")
    layout, latents = case.layout().to(device), case.latents().to(device)
    identity = torch.eye(case.num_pixels, device=device)
    tokens = patch_embed(latents, identity, None, layout, case.patch_size, backend="torch")
    rows = rearrange(tokens, "n (c p) -> n (p c)", c=case.channels)
    for video, original in zip(
        unpatchify(rows, layout, case.patch_size, latents, backend=backend).to_list(), latents.to_list(), strict=True
    ):
        assert torch.equal(video, original)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_pack(backend: str, device: torch.device) -> None:
    layout = PackedLayout.from_grids([], max_segments=2).to(device)
    tokens = torch.zeros(0, 8, device=device, requires_grad=True)
    shapes = torch.zeros(2, 4, dtype=torch.int32, device=device)
    videos = unpatchify(tokens, layout, (1, 2, 2), shapes, capacity=7, backend=backend)
    videos.flat.sum().backward()
    assert videos.to_list() == [] and not videos.flat.any() and tokens.grad.shape == (0, 8)


def test_gradcheck() -> None:
    case = RaggedCase(drop=True)
    layout, latents = case.layout(), case.latents()
    tokens = torch.randn(layout.capacity, case.num_pixels, dtype=torch.float64, requires_grad=True)
    for order in ROWS:
        places = layout, case.patch_size, latents
        assert torch.autograd.gradcheck(lambda x: unpatchify(x, *places, order=order).flat, tokens)  # noqa: B023


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted: bool, device: torch.device) -> None:
    case = RaggedCase()
    layout, latents = case.layout().to(device), case.latents().to(device)
    tokens = torch.randn(layout.capacity, case.num_pixels, device=device)
    tokens = tokens.t().contiguous().t() if permuted else tokens
    geometry = (latents.offsets, latents.shapes, layout.segment_ids, layout.coords, list(case.patch_size))
    elements = latents.flat.numel()
    order = "hwtc" if permuted else "thwc"
    torch.library.opcheck(_unpatchify.registered, (tokens.requires_grad_(), *geometry, order, elements))
    flat = torch.randn(2 * elements, device=device)[:: 1 + permuted]
    torch.library.opcheck(_unpatchify_backward.registered, (flat, *geometry, order, case.num_pixels))


@pytest.mark.parametrize(("backend", "compiler"), [("torch", "inductor"), ("triton", "aot_eager")])
def test_compiles_once_for_ragged_batches(backend: str, compiler: str, device: torch.device) -> None:
    def step(tokens: Tensor, layout: PackedLayout, latents: RaggedLatents) -> RaggedLatents:
        return unpatchify(tokens * 2, layout, (1, 2, 2), latents, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    with no_recompilation():
        for shapes in ([(1, 2, 5, 4), (1, 1, 6, 6)], [(1, 3, 4, 4)], [(1, 1, 1, 1), (1, 1, 3, 3), (1, 2, 2, 2)]):
            latents = RaggedLatents.empty(shapes, capacity=100, max_segments=3).to(device)
            layout = PackedLayout.from_grids(
                [(t, -(-h // 2), -(-w // 2)) for _, t, h, w in shapes], capacity=30, max_segments=3
            ).to(device)
            tokens = torch.randn(30, 4, device=device, requires_grad=True)
            results = [fn(tokens, layout, latents).flat for fn in (step, compiled)]
            assert torch.equal(*results)
            grads = [torch.autograd.grad(flat.square().sum(), tokens)[0] for flat in results]
            assert torch.equal(*grads)


def test_compiles_for_any_number_of_pixels() -> None:
    """The capacity of the buffer, which comes from the latents, turns symbolic at the second batch."""

    def step(tokens: Tensor, layout: PackedLayout, latents: RaggedLatents) -> Tensor:
        return unpatchify(tokens, layout, (1, 2, 2), latents).flat

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for height in (4, 6, 8):
        latents = RaggedLatents.from_list([torch.randn(3, 1, height, 4)])
        layout = PackedLayout.from_grids([(1, height // 2, 2)])
        tokens = torch.randn(layout.capacity, 12)
        assert torch.equal(compiled(tokens, layout, latents), step(tokens, layout, latents))


def test_compiles_for_any_number_of_channels() -> None:
    layout = PackedLayout.from_grids([(1, 2, 2)])
    shapes = torch.tensor([[1, 1, 4, 4]], dtype=torch.int32)

    def step(tokens: Tensor) -> Tensor:
        return unpatchify(tokens, layout, (1, 2, 2), shapes, capacity=100).flat

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for channels in (2, 3):
        tokens = torch.randn(4, 4 * channels)
        assert torch.equal(compiled(tokens), step(tokens))


CASE = RaggedCase()
LAYOUT, LATENTS = CASE.layout(), CASE.latents()
TOKENS = torch.zeros(LAYOUT.capacity, CASE.num_pixels)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((TOKENS[1:], LAYOUT, (2, 2, 2), LATENTS), {}, ValueError, "tokens: shape .* it must be"),
        ((TOKENS[:, 1:], LAYOUT, (2, 2, 2), LATENTS), {}, ValueError, "tokens: 23 columns; .* need 8·Cout"),
        ((TOKENS.int(), LAYOUT, (2, 2, 2), LATENTS), {}, TypeError, "tokens: int32"),
        ((TOKENS, LAYOUT, (2, 2), LATENTS), {}, ValueError, "patch_size: .* three ints"),
        ((TOKENS, LAYOUT, 2, LATENTS), {}, ValueError, "patch_size: 2; .* three ints"),
        ((TOKENS, LAYOUT, (2, 2, 2), LATENTS.shapes.float()), {"capacity": 999}, TypeError, "shapes: float32"),
        ((TOKENS, LAYOUT, (1, 2, 2), LATENTS), {}, ValueError, "layout: segment 0 has the grid"),
        ((TOKENS, LAYOUT, (2, 2, 2), LATENTS.shapes), {}, ValueError, "capacity: None"),
        ((TOKENS, LAYOUT, (2, 2, 2), LATENTS.shapes), {"capacity": 999.0}, TypeError, "capacity: float; .* an int"),
        ((TOKENS, LAYOUT, (2, 2, 2), [(1, 2, 3, 4)]), {}, TypeError, "shapes: list; it must be a tensor"),
        ((TOKENS, None, (2, 2, 2), LATENTS), {}, TypeError, "layout: NoneType; it must be a PackedLayout"),
        ((TOKENS, LAYOUT, (2, 2, 2), LATENTS.shapes), {"capacity": 9}, ValueError, "capacity: 9 elements"),
        ((TOKENS, LAYOUT, (2, 2, 2), LATENTS.shapes[1:]), {"capacity": 999}, ValueError, "shapes: shape"),
        (
            (TOKENS, LAYOUT, (2, 2, 2), LATENTS),
            {"backend": "cuda"},
            ValueError,
            "the tensors are on cpu; cuda needs cuda",
        ),
        ((TOKENS.double(), LAYOUT, (2, 2, 2), LATENTS), {"backend": "triton"}, ValueError, "backend: 'triton'"),
    ],
)
def test_bad_arguments(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        unpatchify(*arguments, **options)


def test_a_bad_order_is_named() -> None:
    layout = PackedLayout.from_grids([(1, 1, 1)])
    shapes = torch.tensor([[1, 1, 2, 2]], dtype=torch.int32)
    with pytest.raises(ValueError, match="order: 'twhc'; it must be one of"):
        unpatchify(torch.zeros(1, 4), layout, (1, 2, 2), shapes, capacity=4, order="twhc")
