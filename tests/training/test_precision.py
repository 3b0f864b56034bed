"""The policy that precision.py states."""

import pytest
import torch
from torch import Tensor

from sora_fast.training import optim, precision
from sora_fast.training.precision import fitting_precision
from sora_fast.training.step import PackLoss, take_gradients, update
from tests.tracing import Products
from tests.training.packs import networks, pack


def test_bfloat16_is_for_products_and_the_stream_alone() -> None:
    of = networks(precision="bfloat16")
    loss_of, parameters = PackLoss(of, "bfloat16"), of.trained()
    stream: list[Tensor] = []
    of.model.blocks[0].register_forward_hook(lambda module, inputs, output: stream.extend(output))
    seen: dict[str, torch.dtype] = {}
    of.model.blocks[0].adaLN_modulation.register_forward_hook(lambda m, i, o: seen.update(modulation=o[0].dtype))
    of.model.final_layer.register_forward_hook(lambda m, i, o: seen.update(output=o.flat.dtype))
    optimizers, average = optim.build_optimizers(parameters, "muon", lr=1e-3), optim.WeightAverage(parameters, 0.9)
    with Products() as products:
        loss = take_gradients(loss_of, [pack(of, 1)], list(parameters.values()))
    assert products.dtypes == {torch.bfloat16}
    assert {x.dtype for x in stream} == {torch.bfloat16} and set(seen.values()) == {torch.bfloat16}
    assert loss.dtype == torch.float32
    assert {p.grad.dtype for p in parameters.values()} == {torch.float32}
    norm, _ = update(parameters, optimizers, average, loss, clip_norm=1.0)
    assert norm.dtype == torch.float32
    kept = [*parameters.values(), *average.tensors.values(), *optim.optimizer_tensors(optimizers, parameters).values()]
    assert {x.dtype for x in kept} == {torch.float32}


def test_the_loss_is_that_of_float32_to_bfloat16s_rounding() -> None:
    of = networks()
    losses = [PackLoss(of, precision)(pack(of, 1))[0].item() for precision in ("float32", "bfloat16")]
    assert losses[0] != losses[1] and abs(losses[1] / losses[0] - 1) < 2**-8


@pytest.mark.parametrize(("gain", "chosen"), [(0.3, "float32"), (1.4, "float32"), (1.6, "bfloat16"), (16, "bfloat16")])
def test_bfloat16_is_taken_where_its_products_are_faster(
    monkeypatch: pytest.MonkeyPatch, gain: float, chosen: str
) -> None:
    rates = {torch.float32: 1e11, torch.bfloat16: gain * 1e11}
    monkeypatch.setattr(precision, "measured_ceiling", lambda device, dtype: rates[dtype])
    assert fitting_precision(torch.device("cpu")) == (chosen, pytest.approx(gain))
