import pytest
import torch

from sora_fast.training import precision
from sora_fast.training.precision import fitting_precision


@pytest.mark.parametrize(("gain", "chosen"), [(0.3, "float32"), (1.4, "float32"), (1.6, "bfloat16"), (16, "bfloat16")])
def test_bfloat16_is_taken_where_its_products_are_faster(
    monkeypatch: pytest.MonkeyPatch, gain: float, chosen: str
) -> None:
    rates = {torch.float32: 1e11, torch.bfloat16: gain * 1e11}
    monkeypatch.setattr(precision, "measured_ceiling", lambda device, dtype: rates[dtype])
    assert fitting_precision(torch.device("cpu")) == (chosen, pytest.approx(gain))
