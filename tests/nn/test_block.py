from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sora_fast import use_backend
from sora_fast.nn import BlockContext, DiTBlock, FinalLayer, PatchEmbed3D
from sora_fast.ops import Rope3D, _dispatch, adaln
from sora_fast.packing import PackedLayout, RaggedLatents, RowIndex
from sora_fast.schedule import TileSchedule
from tests.tracing import Computed


@pytest.mark.parametrize("options", [{}, {"eps": 0.3, "mlp_eps": 2.0}])
def test_a_chain_of_blocks_is_adaln_zero(options: dict[str, float]) -> None:
    """Two blocks on the fused ops against the chain of norms, branches and gates written out."""
    torch.manual_seed(0)
    dim = 32
    layout = PackedLayout.from_grids([(2, 3, 4), (1, 4, 4)], tile_size=16)
    blocks = [DiTBlock(dim, 2, rope=Rope3D(), **options) for _ in range(2)]
    usual, of_mlp = options.get("eps", 1e-6), options.get("mlp_eps", 1e-6)
    index = torch.randint(0, 3, (layout.capacity,), dtype=torch.int32)
    scale = torch.rand(2, 3) + 0.5
    shared = BlockContext(layout, TileSchedule.build(layout), RowIndex.from_index(index, 3), segment_scale=scale)
    modulations = [torch.randn(6, 3, dim).unbind(0) for _ in blocks]
    final = tuple(torch.randn(2, 3, dim).unbind(0))
    start = torch.randn(layout.capacity, dim)

    def norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = usual) -> torch.Tensor:
        return F.layer_norm(x, (dim,), eps=eps) * (1 + scale[index]) + shift[index]

    expected = start
    for block, (shift, scale, gate, shift_mlp, scale_mlp, gate_mlp) in zip(blocks, modulations, strict=True):
        attended = block.attn(norm(expected, shift, scale), layout, shared.schedule, segment_scale=shared.segment_scale)
        expected = expected + gate[index] * attended
        expected = expected + gate_mlp[index] * block.mlp(norm(expected, shift_mlp, scale_mlp, of_mlp))

    x, h = start, norm(start, *modulations[0][:2])
    for block, modulation, following in zip(blocks, modulations, (modulations[1][:2], final), strict=True):
        x, h = block(x, h, modulation, following, shared)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(h, norm(expected, *final), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "launches"),
    [
        pytest.param({}, 9, id="as DiT with QK-norm"),
        pytest.param({"mlp": "swiglu", "mlp_recompute": True}, 9, id="SwiGLU"),
        pytest.param({"norm_recompute": True}, 9, id="less kept"),
        pytest.param({"qk_norm": False}, 8, id="as DiT"),
        pytest.param({"context_dim": 8}, 14, id="with cross-attention"),
    ],
)
def test_launches_are_those_that_the_docstring_lists(
    options: dict[str, Any], launches: int, device: torch.device
) -> None:
    """Recorded, not run: 4 products (7 with cross-attention), the kernels, and no copy or cast in between."""
    from sora_fast.kernels._launch import recording

    dim = 64
    layout = PackedLayout.from_grids([(2, 3, 4), (1, 4, 4)]).to(device)
    text = PackedLayout.from_grids([(5, 1, 1), (3, 1, 1)]).to(device)
    schedules = TileSchedule.build(layout), TileSchedule.build(layout, kv_layout=text)
    rows = RowIndex.from_index(layout.segment_ids, 2)
    shared = BlockContext(layout, schedules[0], rows, torch.randn(8, 8, device=device), text, schedules[1])
    block = DiTBlock(dim, 2, **options).to(device)
    modulation = torch.randn(9 if "context_dim" in options else 6, 2, dim, device=device).unbind(0)
    x, h = torch.randn(2, layout.capacity, dim, device=device)
    with recording((9, 0)) as recorder, use_backend("triton"), Computed() as computed:
        block(x, h, modulation, modulation[:2], shared)
    looked_at = ("equal", "_local_scalar_dense") if device.type == "cpu" else ()  # by checks, which then cost nothing
    names = [name for name in computed.names if name not in looked_at]
    products = [name for name in names if name in ("mm", "addmm")]
    ops = [name for name in names if name.startswith("sora_fast::")]
    assert len(names) == len(products) + len(ops) == launches, names
    assert len(recorder.launches) == len(ops), "an op is one kernel"
    if not options:
        assert names == [
            "addmm",
            "sora_fast::qk_norm_rope",
            "sora_fast::packed_attention",
            "addmm",
            "sora_fast::gated_residual_adaln",
            "mm",
            "sora_fast::mlp_activation",
            "addmm",
            "sora_fast::gated_residual_adaln",
        ]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "options",
    [{}, {"mlp": "swiglu", "mlp_recompute": True}, {"context_dim": 8}, {"context_dim": 8, "eps": 0.3, "mlp_eps": 2.0}],
)
def test_what_is_normed_is_not_kept_and_the_gradients_are_the_same(
    options: dict[str, Any], backend: str, device: torch.device
) -> None:
    torch.manual_seed(0)
    dim = 32
    layout = PackedLayout.from_grids([(2, 2, 3), (1, 4, 4)], capacity=30, tile_size=16).to(device)
    text = PackedLayout.from_grids([(5, 1, 1), (3, 1, 1)]).to(device)
    schedules = TileSchedule.build(layout), TileSchedule.build(layout, kv_layout=text)
    rows = RowIndex.from_index(layout.segment_ids, 2)
    shared = BlockContext(layout, schedules[0], rows, torch.randn(8, 8, device=device), text, schedules[1])
    block = DiTBlock(dim, 2, **options).to(device)
    tables = torch.randn(11 if "context_dim" in options else 8, 2, dim, device=device, requires_grad=True)
    start = torch.randn(layout.capacity, dim, device=device, requires_grad=True)
    results, kept = [], []
    for block.norm_recompute in (False, True):
        *modulation, shift, scale = tables.unbind(0)
        sizes: dict[int, int] = {}
        with use_backend(backend):
            h = adaln(start, *modulation[:2], rows, eps=block.eps)
            with torch.autograd.graph.saved_tensors_hooks(partial(_note, sizes), lambda x: x):
                outputs = block(start, h, modulation, (shift, scale), shared)
            weights = [weight for name, weight in block.named_parameters() if "adaLN" not in name]
            leaves = [start, tables, *weights]
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, [outputs[0], outputs[1]])])
        kept.append(sum(sizes.values()))
    for recomputed, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(recomputed, plain)
    branches = 3 if "context_dim" in options else 2
    # The first residual is the last block's to keep, which is not here.
    assert kept[0] - kept[1] == (branches - 1) * start.nbytes


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize(
    "options", [{"mlp_recompute": True}, {"mlp": "swiglu", "mlp_recompute": True}, {"norm_recompute": True}]
)
def test_what_is_recomputed_runs_where_the_forward_pass_did(
    options: dict[str, Any], elsewhere: bool, backend: str, device: torch.device
) -> None:
    """A GPU's backward pass runs in a thread of its own, to which `use_backend` does not reach."""
    torch.manual_seed(0)
    layout = PackedLayout.from_grids([(2, 2, 3)], tile_size=16).to(device)
    rows = RowIndex.from_index(layout.segment_ids, 1)
    shared = BlockContext(layout, TileSchedule.build(layout), rows)
    block = DiTBlock(32, 2, **options).to(device)
    tables = torch.randn(8, 1, 32, device=device, requires_grad=True)
    start = torch.randn(layout.capacity, 32, device=device, requires_grad=True)
    leaves = [start, tables, *(weight for name, weight in block.named_parameters() if "adaLN" not in name)]
    *modulation, shift, scale = tables.unbind(0)

    def forward() -> torch.Tensor:
        return torch.stack(block(start, adaln(start, *modulation[:2], rows), modulation, (shift, scale), shared))

    with use_backend(backend):
        expected = torch.autograd.grad(forward().square().sum(), leaves)
        loss = forward().square().sum()
    before = {key: record.count for key, record in _dispatch._calls.items()}
    if elsewhere:
        with ThreadPoolExecutor() as pool:
            actual = pool.submit(torch.autograd.grad, loss, leaves).result()
    else:
        actual = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    chosen = {key for key, record in _dispatch._calls.items() if record.count != before.get(key, 0)}
    assert chosen == {("mlp_activation" if "mlp_recompute" in options else "adaln", backend)}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 40),
        ({"mlp_recompute": True}, 32),
        ({"norm_recompute": True}, 36),
        ({"mlp_recompute": True, "norm_recompute": True}, 28),
    ],
)
def test_a_block_keeps_as_much_as_its_docstring_says(options: dict[str, bool], kept: int, device: torch.device) -> None:
    """`kept` bytes a token and channel in 16 bits, 4 a head (logsumexp) and 16 (statistics of two norms): of 1152
    channels and 16 heads the figures there. In the middle of a chain: the first block's residual is nobody else's."""
    dim, heads, sizes = 64, 2, {}
    layout = PackedLayout.from_grids([(1, 5, 6)]).to(device)
    rows = RowIndex.from_index(layout.segment_ids, 1)
    shared = BlockContext(layout, TileSchedule.build(layout), rows)
    blocks = [DiTBlock(dim, heads, rope=Rope3D(), **options).half().to(device) for _ in range(2)]
    tables = torch.randn(6, 1, dim, device=device).half().requires_grad_().unbind(0)
    x, h = (torch.randn(30, dim, device=device).half().requires_grad_() for _ in range(2))
    after = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(partial(_note, sizes), lambda x: x):
        for block in blocks:
            x, h = block(x, h, tables, tables[:2], shared)
            after.append(sum(sizes.values()))
    assert (after[1] - after[0]) / 30 == kept * dim + 4 * heads + 16


def _note(sizes: dict[int, int], x: torch.Tensor) -> torch.Tensor:
    if 30 in x.shape:  # tokens
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return x


@pytest.mark.parametrize("options", [{}, {"context_dim": 8}])
def test_other_numbers_of_tables_are_named(options: dict[str, Any]) -> None:
    layout = PackedLayout.from_grids([(1, 2, 2)])
    shared = BlockContext(layout, TileSchedule.build(layout), RowIndex.from_index(layout.segment_ids, 1))
    x, tables = torch.zeros(4, 32), list(torch.zeros(12, 1, 32))
    block, count = DiTBlock(32, 2, **options), 9 if options else 6
    for wrong in (count - 1, count + 1, 15 - count):
        with pytest.raises(ValueError, match=f"modulation: {len(tables[:wrong])} tables; this block takes {count}"):
            block(x, x, tables[:wrong], tables[:2], shared)
    with pytest.raises(ValueError, match="following: 3 tables; this block takes 2"):
        block(x, x, tables[:count], tables[:3], shared)
    if options:
        with pytest.raises(ValueError, match=r"shared\.text: None, but this block has cross-attention"):
            block(x, x, tables[:9], tables[:2], shared)


@pytest.mark.parametrize("adaln", ["zero", "single"])
def test_trains_under_autocast(adaln: str) -> None:
    """Whichever makes the tables, the last two come from the final layer's AdaLNZero."""
    layout = PackedLayout.from_grids([(1, 4, 4)])
    latents = RaggedLatents.from_list([torch.randn(4, 1, 8, 8)])
    shared = BlockContext(layout, TileSchedule.build(layout), RowIndex.from_index(layout.segment_ids, 1))
    embed, block, final = PatchEmbed3D(32, 4, (1, 2, 2)), DiTBlock(32, 2, adaln=adaln), FinalLayer(32, 4, (1, 2, 2))
    condition = torch.randn(1, 32)
    with torch.autocast("cpu", torch.bfloat16):
        made = torch.nn.Linear(32, 6 * 32)(condition) if adaln == "single" else condition
        x = embed(latents, layout)
        x, h = block(x, x, block.adaLN_modulation(made), final.adaLN_modulation(condition), shared)
        loss = final(h, layout, latents).flat.float().square().mean() + x.float().mean()
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in block.parameters())


def test_modulation_starts_at_zero() -> None:
    tables = DiTBlock(32, 2, context_dim=8).adaLN_modulation(torch.randn(5, 32))
    assert len(tables) == 9 and not any(table.any() for table in tables)


def test_single_modulation_is_shared() -> None:
    block = DiTBlock(32, 2, adaln="single")
    assert [name for name, _ in block.adaLN_modulation.named_parameters()] == ["scale_shift_table"]
    assert [table.shape for table in block.adaLN_modulation(torch.randn(5, 6 * 32))] == [(5, 32)] * 6


def test_bad_adaln_is_named() -> None:
    with pytest.raises(ValueError, match="adaln: 'none'"):
        DiTBlock(32, 2, adaln="none")


def test_bad_mlp_is_named() -> None:
    with pytest.raises(ValueError, match="mlp: 'relu'"):
        DiTBlock(32, 2, mlp="relu")
