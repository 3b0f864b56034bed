import pytest
import torch

from sora_fast import use_backend
from sora_fast.ops._dispatch import asked_for
from sora_fast.training.compiling import compile_loss
from sora_fast.training.recompute import HOW, recompute
from sora_fast.training.step import PackLoss
from tests.tracing import KeptBytes
from tests.training.packs import networks, pack


def _run(how: str | None, precision: str = "float32") -> tuple[list[torch.Tensor], int]:
    """Gradients, and the bytes that the forward pass leaves for the backward pass."""
    loss_of = PackLoss(networks(depth=3), precision)
    if how is not None:
        recompute(loss_of.networks.model.blocks, how)
    given = pack(loss_of.networks, 1)
    with KeptBytes() as kept:
        loss, _ = loss_of(given)
    left = kept.now()
    loss.backward()
    return [p.grad for p in loss_of.parameters() if p.grad is not None], left


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_gradients_of_fewer_bytes(precision: str) -> None:
    expected, everything = _run(None, precision)
    kept = {}
    for how in HOW:
        gradients, kept[how] = _run(how, precision)
        assert len(gradients) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
    assert kept["block"] < kept["selective"] < everything
    assert kept["block"] < 0.5 * everything


@pytest.mark.parametrize("how", HOW)
def test_the_backend_is_that_of_the_forward_pass(how: str) -> None:
    asked: list[str | None] = []

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            asked.append(asked_for())
            return (x @ x).exp()

    block = Block()
    recompute([block], how)
    x = torch.eye(3, requires_grad=True)
    with use_backend("torch"):
        out = block(x)
    with use_backend("triton"):
        out.sum().backward()
    assert asked == ["torch", "torch"]


@pytest.mark.parametrize("how", HOW)
def test_a_compiled_graph_keeps_fewer_bytes_too(how: str) -> None:
    kept = []
    for asked in (None, how):
        torch._dynamo.reset()
        loss_of = PackLoss(networks(), "float32")
        blocks = loss_of.networks.model.blocks
        if asked is not None:
            recompute(blocks, asked)
        compile_loss(loss_of, blocks, backend="aot_eager", scope="blocks", device=torch.device("cpu"))
        kept.append(0)

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss_of(pack(loss_of.networks, 1))
    assert kept[1] < 0.8 * kept[0]


def test_names_and_sampling_are_left_alone() -> None:
    of = networks()
    before = list(of.state_dict())
    recompute(of.model.blocks, "block")
    assert list(of.state_dict()) == before
    with torch.no_grad():
        PackLoss(of, "float32")(pack(of, 1))


def test_rejects() -> None:
    with pytest.raises(ValueError, match="how: 'all'; it must be one of block, selective"):
        recompute([], "all")
