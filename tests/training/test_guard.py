import pytest
import torch

from sora_fast.training.guard import Diverged, Guard


def _watch(guard: Guard, flags: str) -> None:
    for step, flag in enumerate(flags, start=1):
        guard.watch(step, [f"packs of {step}"], torch.tensor(flag == "x"))  # type: ignore[list-item]


def test_stops_after_so_many_in_a_row() -> None:
    guard = Guard(3)
    _watch(guard, "xx.xx..xx.")
    with pytest.raises(Diverged, match="3 steps in a row, 2 to 4;") as error:
        _watch(guard, ".xxxx")
    assert (error.value.step, error.value.packs) == (2, ["packs of 2"])
    assert isinstance(error.value, FloatingPointError)


def test_at_the_first() -> None:
    with pytest.raises(Diverged, match="1 steps in a row, 1 to 1"):
        _watch(Guard(1), "x")


def test_looks_late() -> None:
    """As on a GPU, where the flags arrive while later steps are under way."""
    guard = Guard(2)
    for step, flag in enumerate([True, True, False], start=1):
        guard._waiting.append((step, (), torch.tensor(flag), None))
    guard.settle(left=2)
    with pytest.raises(Diverged):
        guard.settle()
