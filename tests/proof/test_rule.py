import pytest
import torch

from sora_fast.proof.rule import error_and_limit, poisoned_scratch


def test_twice_the_error_of_plain_pytorch_and_a_floor() -> None:
    exact = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    plain, actual = (exact + 0.25).float(), (exact - 0.5).float()
    floor = 8 * 2.0**-23
    assert error_and_limit(actual, plain, exact) == (0.5, 0.5 + 4 * floor)
    assert error_and_limit(actual, plain, exact, terms=100.0)[1] == 0.5 + 100 * floor


def test_integers_must_be_the_same() -> None:
    large = torch.tensor([1 << 30, 5], dtype=torch.int32)
    assert error_and_limit(large, large, large) == (0.0, 0.0)
    assert error_and_limit(large + 1, large, large) == (1.0, 0.0)


def test_what_is_not_comparable_is_an_error() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"torch.float16, but plain PyTorch gives torch.float32"):
        error_and_limit(x.half(), x, x.double())
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        error_and_limit(x[:2], x, x.double())
    with pytest.raises(ValueError, match="the oracle is not finite"):
        error_and_limit(x, x, x.double() / 0)


def test_scratch_is_poisoned_inside_and_only_there() -> None:
    with poisoned_scratch():
        assert torch.empty(3).isnan().all() and torch.zeros(2).new_empty(4).isnan().all()
        assert (torch.empty(2, dtype=torch.int32) == (1 << 31) - 1).all()
    assert torch.empty(3).fill_(1).sum() == 3 and "_filled" not in torch.empty.__qualname__
