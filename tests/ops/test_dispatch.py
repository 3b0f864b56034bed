import pytest
import torch

from sora_fast import explain, use_backend
from sora_fast.ops import _dispatch, _records, adaln
from sora_fast.ops._dispatch import choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_calls", {})
    _dispatch._remind.cache_clear()
    _dispatch._decide.cache_clear()  # what other tests have let it know of machines that are not there
    for variable in ("SORA_FAST_BACKEND", "SORA_FAST_PROVE", "RANK"):
        monkeypatch.delenv(variable, raising=False)


def test_plain_pytorch_is_the_choice_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("adaln", None, CPU) == "torch"
    assert "not triton: the interpreter is for tests" in explain()


def _proved(monkeypatch: pytest.MonkeyPatch, *names: tuple[str, torch.dtype | None], passed: bool = True) -> None:
    """On a GPU that is not there, records of these alone."""
    monkeypatch.setattr(_records, "device_class", lambda device: "sm_90")
    machine = _records.Machine("sm_90", "580", "2.13", "3.7.1", "0.1.0")

    def find(op: str, backend: str, dtype: torch.dtype | None, device: torch.device) -> _records.Record | None:
        options = {"source": "", "cases": 1, "passed": passed, "reason": "" if passed else "error 1.0"}
        found = (op, dtype) in names and backend == "triton"
        return _records.Record(op, backend, str(dtype), machine, **options) if found else None

    monkeypatch.setattr(_records, "find", find)
    _dispatch._decide.cache_clear()


def test_a_kernel_without_a_recorded_pass_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _proved(monkeypatch)
    assert chosen("adaln", torch.bfloat16) == "torch"
    assert "not triton: no recorded pass of bfloat16 on sm_90: `sora-fast doctor --prove` proves it here" in explain()
    assert chosen("gated_residual", torch.bfloat16) == "torch"
    (warning,) = caplog.messages
    assert "`sora-fast doctor --prove`" in warning


def test_a_kernel_is_chosen_for_the_dtypes_that_it_is_proved_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _proved(monkeypatch, ("adaln", torch.bfloat16), ("schedule", None))
    assert chosen("adaln", torch.bfloat16) == "triton"
    assert chosen("adaln", torch.float16) == "torch"
    assert chosen("gated_residual", torch.bfloat16) == "torch"
    assert chosen("schedule", None) == "triton"


def test_a_kernel_that_was_wrong_here_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _proved(monkeypatch, ("adaln", torch.bfloat16), passed=False)
    assert chosen("adaln", torch.bfloat16) == "torch"
    assert "not triton: wrong on this machine (error 1.0)" in explain()
    assert not caplog.messages, "who proved it has been told"


@pytest.mark.parametrize(("variable", "value"), [("SORA_FAST_PROVE", "0"), ("RANK", "1")])
def test_who_wants_no_proof_is_not_reminded(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _proved(monkeypatch)
    monkeypatch.setenv(variable, value)
    assert chosen("adaln", torch.bfloat16) == "torch"
    assert not caplog.messages


def chosen(op: str, dtype: torch.dtype | None) -> str:
    return choose(op, None, CUDA, dtype=dtype)


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
