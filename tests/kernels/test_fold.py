import pytest
import torch

from sora_fast.proof.rule import poisoned_scratch


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (16, 64), (37, 5, 26), (64 * 64 + 1, 5)])
def test_sums_every_partial(shape: tuple[int, ...], device: torch.device) -> None:
    from sora_fast.kernels._fold import fold

    # Whole numbers: the sum is exact in any order.
    partials = torch.randint(-100, 100, shape, device=device).float()
    with poisoned_scratch():
        assert torch.equal(fold(partials), partials.sum(dim=0))
