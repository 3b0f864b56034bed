import pytest
import torch

from sora_fast import explain, use_backend
from sora_fast.ops import _dispatch, adaln
from sora_fast.ops._dispatch import choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_calls", {})
    monkeypatch.delenv("SORA_FAST_BACKEND", raising=False)


def test_plain_pytorch_is_the_choice_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("adaln", None, CPU) == "torch"
    assert "not triton: the interpreter is for tests" in explain()


def test_a_kernel_without_a_recorded_pass_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "device_class", lambda device: "sm_90")
    monkeypatch.setattr(_dispatch, "validated", lambda: {})
    assert choose("adaln", None, CUDA) == "torch"
    assert "not triton: no recorded pass on sm_90" in explain()
    monkeypatch.setattr(_dispatch, "validated", lambda: {"sm_90": {"adaln": {"triton": {}}}})
    assert choose("adaln", None, CUDA) == "triton"
    assert choose("gated_residual", None, CUDA) == "torch"


def test_who_asks_for_a_backend_gets_it_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("adaln", "triton", CPU) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend: 'triton' cannot run adaln here: the tensors are on cpu"):
        choose("adaln", "triton", CPU)
    with pytest.raises(ValueError, match="backend: 'cuda' cannot run adaln here: adaln has no cuda backend"):
        choose("adaln", "cuda", CUDA)
    with pytest.raises(ValueError, match="backend: 'fastest'; it must be one of"):
        choose("adaln", "fastest", CPU)


def test_the_user_sets_a_backend_where_the_op_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"):
        assert choose("adaln", None, CPU) == "triton"
        with use_backend(None):
            assert choose("adaln", None, CPU) == "torch"
        assert choose("segment_mean", None, CPU, ("torch",)) == "torch"
    assert "segment_mean has no triton backend" in explain()
    monkeypatch.setenv("SORA_FAST_BACKEND", "triton")
    assert choose("adaln", None, CPU) == "triton"
    monkeypatch.setenv("SORA_FAST_BACKEND", "tritton")
    with pytest.raises(ValueError, match="SORA_FAST_BACKEND: 'tritton'"):
        choose("adaln", None, CPU)


def test_explain_counts_calls_and_a_compiled_graph_does_not_guard_on_them() -> None:
    assert explain() == "no op has been called"
    x, table, index = torch.randn(4, 8), torch.zeros(1, 8), torch.zeros(4, dtype=torch.int32)
    for _ in range(3):
        adaln(x, table, table, index)
    assert "adaln: torch, chosen 3×" in explain()
    compiled = torch.compile(adaln, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled(x, table, table, index)
            choose("adaln", None, CPU)
