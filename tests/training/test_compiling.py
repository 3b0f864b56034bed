"""One compilation serves every pack. How often that happens does not depend on the backend: these spare the C++ one."""

import logging

import pytest
import torch
from torch._dynamo.utils import counters

from sora_fast.training import compiling
from sora_fast.training.compiling import compile_loss
from sora_fast.training.recompute import recompute
from sora_fast.training.step import PackLoss
from tests.training.packs import networks, pack

CPU = torch.device("cpu")


def gradients(loss_of: PackLoss, seed: int) -> tuple[float, list[torch.Tensor]]:
    loss_of.networks.zero_grad()
    loss, _ = loss_of(pack(loss_of.networks, seed))
    loss.backward()
    return loss.item(), [p.grad.clone() for p in loss_of.parameters() if p.grad is not None]


def assert_alike(one: tuple[float, list[torch.Tensor]], other: tuple[float, list[torch.Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("scope", "how"), [("blocks", None), ("model", None), ("blocks", "selective"), ("model", "block")]
)
def test_one_compilation_for_fifty_packs(scope: str, how: str | None) -> None:
    """Of images and clips, tasks, dropped tokens, with and without text; forward and backward."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (PackLoss(networks(depth=2), "float32") for _ in range(2))
    blocks = compiled.networks.model.blocks
    if how is not None:
        recompute(blocks, how)
    said = compile_loss(compiled, blocks, backend="aot_eager", scope=scope, device=CPU)
    assert ("2 blocks" in said) == (scope == "blocks")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(50):
            result = gradients(compiled, seed)
            if seed % 10 == 0:
                assert_alike(result, gradients(plain, seed))
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["graph_break"] == {}


def test_a_changed_shape_would_be_seen() -> None:
    """Of the counting: what is not of static shape is compiled anew."""
    torch._dynamo.reset()
    twice = torch.compile(lambda x: x + x, fullgraph=True, dynamic=False, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(Exception, match="ecompil"):
        for size in (2, 3):
            twice(torch.ones(size))


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiling, "cpp_problem", lambda: "c++ is not there")
    of = PackLoss(networks(), "float32")
    with caplog.at_level(logging.WARNING):
        said = compile_loss(of, of.networks.model.blocks, backend="inductor", scope="model", device=CPU)
    assert said == "nothing is compiled" and "c++ is not there" in caplog.text
    assert of._compiled_call_impl is None
