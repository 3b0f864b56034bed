"""Whether the compiled libraries are there: what is said when they are not, and that it costs nobody an op."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sora_fast import doctor, explain
from sora_fast.ops import _dispatch, _library, unpatchify
from sora_fast.packing import PackedLayout


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package whose installation has left nothing yet."""

    def forget() -> None:
        _library.missing.cache_clear()
        _dispatch._decide.cache_clear()

    monkeypatch.setattr(_library, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_library, "RECORD", tmp_path / "built.txt")
    monkeypatch.setattr(_dispatch, "_calls", {})
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def test_where_there_is_a_compiler_the_library_is_there() -> None:
    """Else every other test of it would be skipped in silence."""
    if not _library.RECORD.exists() or shutil.which("g++") is None:
        pytest.skip("the package was not installed here, or there is no compiler")
    assert _library.missing("cpu") is None


def test_without_it_the_torch_backend_runs_and_says_why(elsewhere: Path) -> None:
    (elsewhere / "built.txt").write_text("_cpu: not built: there is no C++ compiler (g++); so it is slow\n")
    layout = PackedLayout.from_grids([(1, 2, 2)])
    shapes = torch.tensor([[1, 1, 4, 4]], dtype=torch.int32)
    call = (torch.randn(4, 4), layout, (1, 2, 2), shapes)
    unpatchify(*call, capacity=16)
    assert "unpatchify: torch, chosen 1×" in explain()
    assert "not cpu: the package has no compiled library for it; _cpu: not built: there is no C++ compiler" in explain()
    assert "_cpu: not built: there is no C++ compiler (g++); so it is slow" in str(doctor.examine("cpu"))
    with pytest.raises(ValueError, match="'cpu' cannot run unpatchify here: the package has no compiled library"):
        unpatchify(*call, capacity=16, backend="cpu")


def test_a_checkout_that_was_not_installed_says_so(elsewhere: Path) -> None:
    assert "nothing was built" in _library.missing("cpu")


def test_a_library_that_does_not_load_is_named(elsewhere: Path) -> None:
    (elsewhere / "_cpu.abi3.so").write_text("no library")
    assert "_cpu.abi3.so does not load" in _library.missing("cpu")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is for CUDA")
def test_kernels_for_a_gpu_do_not_load_into_a_torch_for_cpus() -> None:
    assert "is not for CUDA" in _library.missing("cuda")
