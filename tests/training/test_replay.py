from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sora_fast.training import replay
from sora_fast.training.config import write_config
from sora_fast.training.run import CONFIG, Networks
from sora_fast.training.step import NoisyPack, PackLoss
from tests.training.packs import networks, pack


def _where(of: Networks, seed: int = 1) -> str | None:
    return replay.examine(PackLoss(of, "float32"), pack(of, seed))[1]


def test_a_pack_comes_back_to_the_bit(tmp_path: Path) -> None:
    of = networks()
    write_config(tmp_path / CONFIG, of.config)
    packs = [pack(of, 1), pack(of, 2)]
    expected = [PackLoss(of, "float32")(given)[0].item() for given in packs]
    replay.save(tmp_path, 0, 12, of, packs[:1])
    replay.save(tmp_path, 1, 12, of, packs)
    findings = replay.replay(tmp_path)
    assert [(f.step, f.worker, f.pack) for f in findings] == [(12, 0, 0), (12, 1, 0), (12, 1, 1)]
    assert [f.loss for f in findings] == [expected[0], *expected]
    assert str(findings[0]).endswith("; all is finite here")


def test_a_pack_without_text_comes_back() -> None:
    given = replace(pack(networks(), 1), prompts=None)
    back = replay._rebuilt(NoisyPack, *replay._flattened(given))
    assert back.prompts is None and back.layout.tile_size == given.layout.tile_size
    assert torch.equal(back.layout.coords, given.layout.coords) and torch.equal(back.noise, given.noise)


def test_nothing_is_kept(tmp_path: Path) -> None:
    write_config(tmp_path / CONFIG, networks().config)
    with pytest.raises(ValueError, match="no step is kept there"):
        replay.replay(tmp_path)


def test_the_first_place_is_named() -> None:
    of = networks(depth=2)
    assert _where(of) is None

    broken = pack(of, 1)
    broken.latents.flat[0] = float("nan")
    assert replay.examine(PackLoss(of, "float32"), broken)[1] == "the data: sample 0 of the pack"

    with torch.no_grad():
        weight = of.model.blocks[1].mlp.fc1.weight
        weight.copy_(torch.randn_like(weight).sign() * 1e38)
    assert _where(of).startswith("the output of model.blocks.1.mlp.fc1 (")

    of = networks(depth=2)
    of.model.blocks[1].attn.proj.register_full_backward_hook(lambda m, gi, go: tuple(g * float("inf") for g in gi))
    assert _where(of).startswith("the gradient of the output of model.blocks.1.attn.qkv (")

    of = networks(depth=2)
    with torch.no_grad():
        of.model.blocks[0].attn.qkv.bias[3] = float("inf")
    assert _where(of) == "the weight model.blocks.0.attn.qkv.bias (1 of 96 numbers)"


def test_what_is_unspecified_is_not_looked_at() -> None:
    of = networks()
    given = pack(of, 1)
    given.latents.flat[int(given.latents.offsets[-1]) :] = float("nan")
    assert replay.examine(PackLoss(of, "float32"), given)[1] is None
