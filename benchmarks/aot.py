"""Compile every Triton kernel ahead of time, without a GPU, and inspect what came out.

    python -m benchmarks.aot [--json FILE] [--target sm_90 ...] [--kernel NAME ...]

Every case of benchmarks/cases.py is run forward and backward on small CPU tensors while the kernels' launches are
recorded instead of made; each launch is then compiled as Triton itself would compile it on that GPU (the same
specialisation of arguments, the same configuration). What is inspected is therefore what ships. Exit code 1 if a
kernel does not compile, spills registers, or wants more shared memory than the GPU has.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks import _checkout, cubin

# The largest dynamic shared memory of one block, in bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


@dataclass(frozen=True)
class Row:
    """One kernel on one target. registers: a thread's; spills: bytes a thread; hgmma: how many instructions."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    hgmma: int

    @property
    def problem(self) -> str:
        limit = SHARED_LIMIT[self.target]
        if self.spills:
            return f"spills {self.spills} bytes a thread"
        return f"wants more shared memory than {limit} bytes" if self.shared_bytes > limit else ""


@dataclass(frozen=True, eq=False)
class Launch:
    """A recorded launch: what a kernel was called with. `name` is case/kernel."""

    name: str
    kernel: JITFunction
    args: tuple[Any, ...]
    meta: dict[str, Any]


def compile_launch(launch: Launch, target: str) -> Row:
    """Compile `launch` for `target` ("sm_90") as Triton's launcher would, and read the cubin."""
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    backend = make_backend(gpu)
    # The two options that JITFunction.run adds to every launch.
    meta = {**launch.meta, "debug": False, "instrumentation_mode": ""}
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **meta)
    options, signature, constants, attributes = kernel._pack_args(backend, meta, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=options.__dict__)
    found = cubin.inspect(compiled.asm["cubin"])
    return Row(launch.name, target, found.registers, found.spills, compiled.metadata.shared, found.hgmma)


def record(target: str, only: Sequence[str] = ()) -> Iterator[Launch]:
    """What the cases launch on `target`, forward and backward; `only`: parts of names (case/kernel) to keep."""
    from benchmarks.cases import Setting, all_cases
    from sora_fast import use_backend
    from sora_fast.kernels._launch import recording
    from sora_fast.ops import _dispatch

    arch = divmod(int(target.removeprefix("sm_")), 10)
    # CPU tensors stand in for a GPU's: dispatch lets them through to Triton as it does for the interpreter.
    with patch.object(_dispatch, "interpreting", lambda: True), use_backend("triton"):
        for case in all_cases(Setting.ahead_of_time()):
            with recording(arch) as recorder:
                case.step()
            yield from _distinct(case.name, recorder.launches, only)


def _distinct(case: str, launches: Sequence[tuple[Any, ...]], only: Sequence[str]) -> Iterator[Launch]:
    """Launches that compile to something of their own: of one kernel, those that differ in their options."""
    seen: dict[str, list[dict[str, Any]]] = {}
    for kernel, args, meta in launches:
        variants = seen.setdefault(kernel.fn.__name__, [])
        if meta in variants:
            continue
        variants.append(meta)
        name = f"{case}/{kernel.fn.__name__}" + (f"#{len(variants)}" if len(variants) > 1 else "")
        if not only or any(part in name for part in only):
            yield Launch(name, kernel, args, meta)


def _table(rows: Sequence[Row]) -> str:
    width = max((len(row.kernel) for row in rows), default=6)
    head = f"{'kernel':{width}}  target  registers  spills  shared_bytes  hgmma"
    lines = [
        f"{r.kernel:{width}}  {r.target:6}  {r.registers:9}  {r.spills:6}  {r.shared_bytes:12}  {r.hgmma:5}"
        f"{'  ← ' + r.problem if r.problem else ''}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--target", nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT), help="GPUs")
    parser.add_argument("--kernel", nargs="+", default=(), metavar="NAME", help="only names that contain this")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")

    rows: list[Row] = []
    failures: list[str] = []
    for target in options.target:
        for launch in record(target, options.kernel):
            print(f"compiling {launch.name} for {target}", file=sys.stderr)
            try:
                with redirect_stdout(sys.stderr):  # where Triton prints whole listings when the assembler fails
                    rows.append(compile_launch(launch, target))
            except Exception as error:  # Triton's compiler raises many kinds; the other kernels still count
                failures.append(f"{launch.name} for {target} does not compile: {str(error)[:1000]}")
    print(_table(rows))
    print(*failures, sep="\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if failures or not rows or any(row.problem for row in rows) else 0


if __name__ == "__main__":
    _checkout.make_importable()
    sys.exit(main())
