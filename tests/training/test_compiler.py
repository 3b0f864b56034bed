import contextlib
from pathlib import Path

import pytest
from torch._inductor import config

from sora_fast.training.compiler import cpp_problem
from tests.training.test_trainer import Gradients, Trainer, tiny


def _compiler(path: Path | str) -> contextlib.AbstractContextManager:
    return config.patch({"cpp.cxx": (None, str(path))})


def _script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_compiler_that_works_is_no_problem(tmp_path: Path) -> None:
    with _compiler(_script(tmp_path / "works", "exit 0")):
        assert cpp_problem() is None


def test_what_is_wrong_with_a_compiler_is_said(tmp_path: Path) -> None:
    with _compiler(tmp_path / "absent"):
        assert "No working C++ compiler" in str(cpp_problem())
    lacking = 'test "$1" = --version && exit 0; echo "<stdin>:2:10: fatal error: Python.h: No such file" >&2; exit 1'
    with _compiler(_script(tmp_path / "lacking", lacking)):
        assert str(cpp_problem()).endswith("lacking fails: <stdin>:2:10: fatal error: Python.h: No such file")
    with _compiler(_script(tmp_path / "mute", 'test "$1" = --version')):
        assert str(cpp_problem()).endswith("mute fails: code 1")


def test_training_goes_on_without_a_compiler(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with _compiler(tmp_path / "absent"):
        trainer = Trainer(tiny(steps=2, compile="inductor"), Gradients(), tmp_path / "run")
        assert trainer.fit(progress=False)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert warnings[0].startswith("training without torch.compile, which is slower: it needs a C++ compiler")
