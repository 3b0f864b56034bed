import pytest
import torch

from benchmarks.walk import walk


def test_it_walks_through_the_cases_of_an_op(capsys: pytest.CaptureFixture[str]) -> None:
    walk(torch.device("cpu"), ["mlp_activation"])
    assert capsys.readouterr().out.splitlines() == ["mlp_activation[gelu,H256]", "mlp_activation[swiglu,H256]"]
