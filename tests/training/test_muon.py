import pytest
import torch
from torch import nn

from sora_fast.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 24, 12), (2, 64, 16), (1, 8, 40)])
def test_orthogonal(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonal(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    # The same singular vectors: U·diag·Vᵀ stays where the matrix was.
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ result @ v.mT
    torch.testing.assert_close(inner, torch.diag_embed(inner.diagonal(dim1=1, dim2=2)), atol=1e-4, rtol=0)


def test_the_same_steps_as_pytorch() -> None:
    """Up to bfloat16, which PyTorch's computes in."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((16, 32), (32, 8), (16, 32))]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.1}
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, first in zip(ours, theirs, start, strict=True):
        moved = (other - first).norm()
        assert moved > 0.1
        assert (one - other).norm() < 0.03 * moved


def test_only_matrices_that_have_a_gradient() -> None:
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([used, unused], 0.1)
    used.grad = torch.eye(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2, 2)) and not torch.equal(used, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"parameters: shapes \[\(3,\)\]; Muon takes matrices only"):
        Muon([nn.Parameter(torch.ones(3))], 0.1)
