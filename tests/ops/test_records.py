"""Records of what is proved, and when they hold."""

import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sora_fast.ops import _records
from sora_fast.ops._records import Machine, Record, find, keep, read_list, source_hash, written

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MACHINE = Machine("sm_90", "580.65", "2.13.0", "3.7.1", "0.1.0")

machine_of = Machine.of


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that is not there, and a cache of its own."""
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_records, "VALIDATED", tmp_path / "validated.json")
    monkeypatch.setattr(_records, "_own", {})
    be(MACHINE, monkeypatch)
    yield
    _records.forget()


def be(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "of", staticmethod(lambda device: machine))
    _records.forget()


def record(op: str = "adaln", *, passed: bool = True, **changes: object) -> Record:
    made = Record(
        op, "triton", "bfloat16", MACHINE, source_hash(op), passed=passed, cases=3, reason="" if passed else "x"
    )
    return replace(made, **changes)


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another process would find it."""
    monkeypatch.setattr(_records, "_own", {})
    _records.forget()


def found(op: str = "adaln") -> Record | None:
    return find(op, "triton", torch.bfloat16, CUDA)


def test_what_is_kept_is_found_by_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found() is None
    assert keep([record()]) == ""
    assert found() == record()
    later(monkeypatch)
    assert found() == record()
    assert find("adaln", "triton", torch.float16, CUDA) is None
    assert found("gated_residual") is None


def test_a_newer_verdict_takes_the_place_of_the_older(monkeypatch: pytest.MonkeyPatch) -> None:
    keep([record()])
    keep([record(passed=False)])
    later(monkeypatch)
    assert found() == record(passed=False)


@pytest.mark.parametrize("changed", ["device_class", "driver", "torch", "triton", "package"])
def test_a_record_holds_for_one_machine(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep([record()])
    be(replace(MACHINE, **{changed: "another"}), monkeypatch)
    assert found() is None


def test_a_record_holds_for_one_source(monkeypatch: pytest.MonkeyPatch) -> None:
    keep([record()])
    monkeypatch.setattr(_records, "source_hash", lambda *_: "another")
    later(monkeypatch)
    assert found() is None


@pytest.mark.parametrize(
    ("changed", "holds"),
    [("driver", True), ("torch", True), ("package", True), ("triton", False), ("device_class", False)],
)
def test_what_is_shipped_holds_for_the_same_machine_code(
    changed: str, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _records.VALIDATED.write_text(written([record()]))
    be(replace(MACHINE, **{changed: "another"}), monkeypatch)
    assert (found() is not None) == holds


def test_what_failed_here_stays_off_whatever_is_shipped() -> None:
    _records.VALIDATED.write_text(written([record()]))
    keep([record(passed=False)])
    assert found() == record(passed=False)


def test_shipped_records_of_another_source_or_form_count_for_nothing() -> None:
    _records.VALIDATED.write_text(json.dumps([asdict(record(source="0123")), {"op": "adaln"}, 7]))
    assert found() is None and len(read_list(_records.VALIDATED)) == 1


def test_what_was_interpreted_counts_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted = machine_of(CPU)
    assert interpreted.device_class == "interpreter"
    be(interpreted, monkeypatch)
    keep([record(machine=interpreted)])
    assert found() == record(machine=interpreted)
    be(MACHINE, monkeypatch)
    assert found() is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"op": "adaln"}'])
def test_a_torn_or_foreign_file_is_no_record(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    keep([record()])
    (file,) = (_records.cache_folder() / "proved").iterdir()
    file.write_bytes(content)
    later(monkeypatch)
    assert found() is None
    assert keep([record()]) == "" and found() == record()


@pytest.mark.parametrize(
    "changed", [{"op": "gated_residual"}, {"source": "0"}, {"machine": replace(MACHINE, driver="1")}]
)
def test_a_file_that_says_something_else_is_no_record(
    changed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep([record()])
    (file,) = (_records.cache_folder() / "proved").iterdir()
    file.write_text(json.dumps(asdict(record(**changed))))
    later(monkeypatch)
    assert found() is None


def test_where_nothing_can_be_written_it_holds_for_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "file" / "cache"))
    assert "Not a directory" in keep([record()])
    assert found() == record()
    later(monkeypatch)
    assert found() is None


def test_the_cache_lies_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _records.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SORA_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert _records.cache_folder() == Path("/somewhere/sora_fast")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to pass over
    monkeypatch.setenv("HOME", "/home/me")
    assert _records.cache_folder() == Path("/home/me/.cache/sora_fast")

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    assert _records.cache_folder() is None
    assert keep([record()]) == "there is no home folder" and found() == record()


def _keep_often(folder: str, passed: bool) -> None:
    os.environ["SORA_FAST_CACHE"] = folder
    for _ in range(100):
        assert keep([record(passed=passed), record("gated_residual", passed=passed)]) == ""


def test_two_processes_at_once_tear_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    arguments = [(str(tmp_path / "cache"), passed) for passed in (True, False)]
    keep([record()])
    writers = [context.Process(target=_keep_often, args=pair) for pair in arguments]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        later(monkeypatch)
        assert found() in (record(), record(passed=False))
        seen += 1
    assert seen and [writer.exitcode for writer in writers] == [0, 0]
    assert len(list((tmp_path / "cache" / "proved").iterdir())) == 2, "nothing unfinished is left"


def test_the_hash_covers_what_a_kernel_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "adaln": "from sora_fast.kernels._rows import x\n",
        "_rows": "from sora_fast.kernels import _fold\n",
        "_fold": "",
        "adaln_backward": "",
        "other": "",
    }
    for name, content in files.items():
        (tmp_path / f"{name}.py").write_text(content)

    def hashed() -> str:
        return source_hash.__wrapped__("adaln")

    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(_records, "find_spec", lambda name: spec)
    before, changed = hashed(), []
    for name in files:
        content = (tmp_path / f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(content + "# changed\n")
        changed.append(hashed() != before)
        (tmp_path / f"{name}.py").write_text(content)
    assert changed == [True, True, True, True, False] and hashed() == before


def test_the_hash_of_attention_covers_both_its_files() -> None:
    folder = Path(__file__).resolve().parents[2] / "kernels"
    reached = _records._reached(folder, ["packed_attention", "packed_attention_backward"])
    assert reached == {
        "packed_attention",
        "packed_attention_backward",
        "_attention_config",
        "_attention_measured",
        "_attention_operands",
        "_attention_walk",
        "_launch",
        "_plans",
    }
