from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sora_fast import use_backend
from sora_fast.nn import BlockContext, DiTBlock
from sora_fast.ops import Rope3D
from sora_fast.packing import PackedLayout, RowIndex
from sora_fast.schedule import TileSchedule
from tests.tracing import Computed


def test_a_chain_of_blocks_is_adaln_zero() -> None:
    """Two blocks on the fused ops against the chain of norms, branches and gates written out."""
    torch.manual_seed(0)
    dim = 32
    layout = PackedLayout.from_grids([(2, 3, 4), (1, 4, 4)], tile_size=16)
    blocks = [DiTBlock(dim, 2, rope=Rope3D()) for _ in range(2)]
    index = torch.randint(0, 3, (layout.capacity,), dtype=torch.int32)
    scale = torch.rand(2, 3) + 0.5
    shared = BlockContext(layout, TileSchedule.build(layout), RowIndex.from_index(index, 3), segment_scale=scale)
    modulations = [torch.randn(6, 3, dim).unbind(0) for _ in blocks]
    final = tuple(torch.randn(2, 3, dim).unbind(0))
    start = torch.randn(layout.capacity, dim)

    def norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale[index]) + shift[index]

    expected = start
    for block, (shift, scale, gate, shift_mlp, scale_mlp, gate_mlp) in zip(blocks, modulations, strict=True):
        attended = block.attn(norm(expected, shift, scale), layout, shared.schedule, segment_scale=shared.segment_scale)
        expected = expected + gate[index] * attended
        expected = expected + gate_mlp[index] * block.mlp(norm(expected, shift_mlp, scale_mlp))

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
