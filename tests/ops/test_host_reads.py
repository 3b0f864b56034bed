"""The torch backend where it is not on a CPU reads nothing on the host: on "meta" there is nothing to be read.

Every value asked for there is an error, as is every shape that depends on one, so what passes can be captured.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_fast.diffusion import RectifiedFlow, training_loss
from sora_fast.masks import SpacetimeMask
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.ops import (
    Rope3D,
    RopeTable,
    adaln,
    gated_residual,
    gated_residual_adaln,
    linear_unpatchify,
    mlp_activation,
    packed_attention,
    patch_embed,
    qk_norm_rope,
    segment_mean,
    unpatchify,
)
from sora_fast.ops.patch_embed import FactorisedPosition
from sora_fast.packing import Conditioning, JointLayout, PackedKVCache, PackedLayout, RaggedLatents, RowIndex
from sora_fast.schedule import TileSchedule

PATCH = (1, 2, 2)


@pytest.fixture(autouse=True)
def flex_takes_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def on_meta(bundle: Any) -> Any:
    return bundle._map(lambda tensor: torch.empty_like(tensor, device="meta"))


LAYOUT = on_meta(PackedLayout.from_grids([(2, 3, 4), (1, 4, 4)], capacity=64, max_segments=3, order="tiled"))
TEXT = on_meta(PackedLayout.from_grids([(5, 1, 1), (3, 1, 1)], capacity=10, max_segments=3))
VIDEOS = on_meta(RaggedLatents.from_list([torch.zeros(2, 2, 6, 8), torch.zeros(2, 1, 8, 8)], max_segments=3))
ROWS = RowIndex(*(torch.empty(n, dtype=torch.int32, device="meta") for n in (64, 4, 64)))
MASKS = {
    "full": SpacetimeMask.full(),
    "window": SpacetimeMask.window(1, 2, 2, stride=(1, 2, 2)),
    "frame_causal": SpacetimeMask.frame_causal(),
    "token_causal": SpacetimeMask.token_causal(),
}


def x(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=True)


def attention(mask: SpacetimeMask, **options: Any) -> Callable[[], Any]:
    return lambda: packed_attention(x(64, 4, 16), x(64, 2, 16), x(64, 2, 16), LAYOUT, mask, backend="torch", **options)


CALLS: dict[str, Callable[[], Any]] = {
    **{f"attention, {name}": attention(mask) for name, mask in MASKS.items()},
    "attention, logsumexp": attention(MASKS["window"], return_lse=True),
    "attention, cross": lambda: packed_attention(
        x(64, 4, 16), x(10, 2, 16), x(10, 2, 16), LAYOUT, kv_layout=TEXT, backend="torch"
    ),
    "adaln": lambda: adaln(x(64, 32), x(3, 32), x(3, 32), ROWS, weight=x(32), backend="torch"),
    "adaln, index": lambda: adaln(x(64, 32), x(3, 32), x(3, 32), ROWS.index, backend="torch"),
    "gated_residual": lambda: gated_residual(x(64, 32), x(64, 32), x(3, 32), ROWS, backend="torch"),
    "gated_residual_adaln": lambda: gated_residual_adaln(
        x(64, 32), x(64, 32), x(3, 32), x(3, 32), x(3, 32), ROWS, backend="torch"
    ),
    "qk_norm_rope": lambda: qk_norm_rope(
        x(64, 4, 16), x(64, 4, 16), x(16), x(16), LAYOUT, Rope3D(extent=(4, 8, 8)), backend="torch"
    ),
    "qk_norm_rope, plain": lambda: qk_norm_rope(
        x(64, 4, 16), x(64, 4, 16), None, None, LAYOUT, Rope3D(), backend="torch"
    ),
    "qk_norm_rope, keys alone": lambda: qk_norm_rope(
        *(None, x(64, 4, 16), None, x(16), LAYOUT, Rope3D(theta=(1e4, 1e3, 1e2))),
        **{"norm": "layer", "k_bias": x(16), "positions": x(64, 3).detach(), "backend": "torch"},
    )[1],
    "qk_norm_rope, table": lambda: qk_norm_rope(
        *(x(64, 4, 16), x(64, 4, 16), x(64), x(64), LAYOUT, RopeTable.of_angles(x(64, 4, 8))),
        **{"norm": "rms_across_heads", "backend": "torch"},
    ),
    "mlp_activation": lambda: mlp_activation(x(64, 32), x(32), "swiglu", backend="torch"),
    "patch_embed": lambda: patch_embed(
        VIDEOS.with_flat(x(*VIDEOS.flat.shape)), x(32, 8), x(32), LAYOUT, PATCH, backend="torch"
    ),
    "patch_embed, position": lambda: patch_embed(
        VIDEOS, x(32, 8), None, LAYOUT, PATCH, FactorisedPosition(x(9, 32), x(9, 32), x(9, 32)), backend="torch"
    ),
    "unpatchify": lambda: (
        unpatchify(x(64, 8), LAYOUT, PATCH, VIDEOS.shapes, capacity=VIDEOS.flat.shape[0], backend="torch").flat
    ),
    "linear_unpatchify": lambda: (
        linear_unpatchify(
            x(64, 32), x(8, 32), x(8), LAYOUT, PATCH, VIDEOS.shapes, capacity=VIDEOS.flat.shape[0], backend="torch"
        ).flat
    ),
    "segment_mean": lambda: segment_mean(x(64, 32), LAYOUT),
}


@pytest.mark.parametrize("call", CALLS)
def test_ops(call: str) -> None:
    outputs = CALLS[call]()
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        assert output.is_meta
        output.sum().backward(retain_graph=True)


@pytest.mark.parametrize("mask", MASKS)
def test_schedules(mask: str) -> None:
    schedule = TileSchedule.build(LAYOUT, MASKS[mask])
    assert schedule.to_block_mask().kv_indices.is_meta
    assert schedule.refresh_(LAYOUT) is schedule
    assert TileSchedule.build(LAYOUT, kv_layout=TEXT).by_key.begin.is_meta


@pytest.mark.parametrize("mask", MASKS)
def test_joint_sequences(mask: str) -> None:
    joint = JointLayout.build(TEXT, LAYOUT)
    merged = joint.merge(x(10, 2, 16), x(64, 2, 16))
    outs = joint.split(packed_attention(merged, merged, merged, joint.layout, MASKS[mask], backend="torch"))
    assert [len(out) for out in outs] == [10, 64]
    sum(out.sum() for out in outs).backward()


@pytest.mark.parametrize("mask", MASKS)
def test_caches(mask: str) -> None:
    cache = PackedKVCache.empty(2, 2, 16, capacity=100, new_capacity=64, max_segments=3, device="meta")
    cache.append_(LAYOUT, window=3, ended=torch.empty(3, dtype=torch.bool, device="meta"))
    new = x(64, 2, 16).detach().bfloat16()
    packed_attention(new, *cache.write_(1, new, new), LAYOUT, MASKS[mask], kv_layout=cache.layout, backend="torch")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("position", ["rope", "rope+sincos3d", "fractional"])
def test_a_training_step(position: str, mask: str) -> None:
    sizes = {"dim": 32, "depth": 2, "heads": 2, "in_channels": 2, "patch_size": PATCH}
    with torch.device("meta"):
        model = SoraDiT(SoraDiTConfig(**sizes, mask=MASKS[mask], position=position))
    sigma, clean = torch.empty(3, device="meta"), torch.empty(64, dtype=torch.bool, device="meta")
    noise = torch.empty_like(VIDEOS.flat)
    options = {"noise": noise, "patch_size": PATCH, "clean": clean}
    training_loss(model, VIDEOS, LAYOUT, RectifiedFlow(base_tokens=4), sigma, **options).backward()
    assert all(parameter.grad.is_meta for parameter in model.parameters())
    for conditioning in (Conditioning.per_segment(sigma, LAYOUT), Conditioning.with_clean(sigma, clean, LAYOUT)):
        assert conditioning.index.is_meta


def test_a_read_would_be_seen() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        LAYOUT.cu_seqlens.tolist()
    with pytest.raises((RuntimeError, NotImplementedError)):
        LAYOUT.segment_ids.nonzero()
