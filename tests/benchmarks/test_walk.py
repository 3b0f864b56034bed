import pytest
import torch

from benchmarks.walk import walk


def test_it_walks_through_the_cases_of_an_op(capsys: pytest.CaptureFixture[str]) -> None:
    walk(torch.device("cpu"), ["mlp_activation"])
    forms = ("gelu", "swiglu", "gelu_erf", "swiglu,second")
    assert capsys.readouterr().out.splitlines() == [f"mlp_activation[{form},H256]" for form in forms]
