import pytest
import torch

from tests.helpers import poison_empty


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (16, 64), (37, 5, 26), (64 * 64 + 1, 5)])
def test_sums_every_partial(shape: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from sora_fast.kernels._fold import fold

    # Whole numbers: the sum is exact in any order.
    partials = torch.randint(-100, 100, shape, device=device).float()
    poison_empty(monkeypatch)
    assert torch.equal(fold(partials), partials.sum(dim=0))
