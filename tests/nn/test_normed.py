import gc

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sora_fast import use_backend
from sora_fast.nn.normed import Normed, linear
from sora_fast.ops import adaln
from sora_fast.packing import RowIndex
from tests.modulated import no_recompilation


class Inputs:
    """Tokens, padding among them, and a Linear."""

    def __init__(self, device: torch.device, *, bias: bool = True) -> None:
        torch.manual_seed(0)
        index = torch.tensor([1, 0, -1, 1, 2], dtype=torch.int32, device=device)
        self.rows = RowIndex.from_index(index, 3)
        self.x = torch.randn(5, 16, device=device, requires_grad=True)
        self.shift, self.scale = (torch.randn(3, 16, device=device, requires_grad=True) for _ in range(2))
        self.module = torch.nn.Linear(16, 8, bias=bias).to(device)

    def normed(self) -> Normed:
        sources = self.x, self.shift, self.scale, self.rows
        return Normed(adaln(*sources), *sources)

    def gradients(self, out: Tensor) -> tuple[Tensor, ...]:
        leaves = [self.x, self.shift, self.scale, *self.module.parameters()]
        return torch.autograd.grad(out.float().square().sum(), leaves)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_not_kept_and_the_gradients_are_the_same(bias: bool, backend: str, device: torch.device) -> None:
    inputs = Inputs(device, bias=bias)
    with use_backend(backend):
        plain = inputs.module(inputs.normed().h)
        expected = [plain, *inputs.gradients(plain)]
        normed = inputs.normed()
        out, kept = linear(inputs.module, normed), StorageWeakRef(normed.h.untyped_storage())
        del normed
        gc.collect()  # the interpreter leaves cycles
        assert kept.expired(), "h waits for the backward pass"
        actual = [out, *inputs.gradients(out)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_frozen_layers_pass_the_gradient_on(device: torch.device) -> None:
    inputs = Inputs(device)
    inputs.module.requires_grad_(False)
    grads = [
        torch.autograd.grad(out.sum(), inputs.x)[0]
        for out in (linear(inputs.module, inputs.normed()), inputs.module(inputs.normed().h))
    ]
    assert torch.equal(*grads)


def test_under_autocast(device: torch.device) -> None:
    inputs = Inputs(device)
    with torch.autocast(device.type, torch.bfloat16):
        outputs = linear(inputs.module, inputs.normed()), inputs.module(inputs.normed().h)
    assert outputs[0].dtype == torch.bfloat16
    for actual, expected in zip(*map(inputs.gradients, outputs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_what_replaces_or_hooks_a_linear_layer_is_called(device: torch.device) -> None:
    inputs, called = Inputs(device), []
    inputs.module.register_forward_hook(lambda *_: called.append("hook"))
    linear(inputs.module, inputs.normed())
    assert called == ["hook"]
    assert linear(torch.nn.Identity(), inputs.normed()).shape == (5, 16)


@pytest.mark.parametrize(("backend", "compiler"), [("torch", "inductor"), ("triton", "aot_eager")])
def test_compiles_in_one_graph(backend: str, compiler: str, device: torch.device) -> None:
    inputs = Inputs(device)

    def run(rows: RowIndex) -> Tensor:
        sources = inputs.x, inputs.shift, inputs.scale, rows
        return linear(inputs.module, Normed(adaln(*sources), *sources))

    with use_backend(backend), no_recompilation():
        compiled = torch.compile(run, fullgraph=True, backend=compiler)
        for index in ([0, 1, 2, 0, 1], [-1, -1, 2, 2, 2]):
            rows = RowIndex.from_index(torch.tensor(index, dtype=torch.int32, device=device), 3)
            for actual, expected in zip(*(inputs.gradients(f(rows)) for f in (compiled, run)), strict=True):
                torch.testing.assert_close(actual, expected)
