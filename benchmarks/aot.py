"""Compile every Triton kernel ahead of time, without a GPU, and inspect what came out.

    python -m benchmarks.aot [--check | --update] [--json FILE] [--target sm_90 ...] [--kernel NAME ...]

Every case of benchmarks/cases.py is run forward and backward on small CPU tensors while the kernels' launches are
recorded instead of made; each launch is then compiled as Triton itself would compile it on that GPU (the same
specialisation of arguments, the same configuration). What is inspected is therefore what ships. Exit code 1 if a
kernel does not compile, spills registers, or wants more shared memory than the GPU has. Beneath the kernels stand
their hot loops, with a bound on their speed that is no measurement: see benchmarks/hot_loop.py.

--check compares with benchmarks/results/aot.json, names every change, and exits with 1 if there is one; under another
version of Triton than the file's it says so and compares nothing. --update rewrites the file, a target at a time:
interrupted, it goes on where it was, because Triton keeps what it has compiled. Both obey --target and --kernel.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks import _checkout, cubin
from benchmarks.hot_loop import aligned, read_loops, table
from benchmarks.snapshot import FILE, SHARED_LIMIT, Row, Selection, Snapshot
from benchmarks.ttir import loop_flops


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
    text = cubin.disassemble(compiled.asm["cubin"])
    # Not metadata's number of warps: of a specialised kernel that counts those that only load, too.
    asked = loop_flops(compiled.asm["ttir"])
    loops = tuple(read_loops(text, warps=options.num_warps, target=target, asked=asked))
    return Row(launch.name, target, shared_bytes=compiled.metadata.shared, loops=loops, **asdict(cubin.inspect(text)))


def record(target: str, selection: Selection) -> Iterator[Launch]:
    """What the cases launch on `target`, forward and backward, as far as `selection` names it."""
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
            launches = _distinct(case.name, recorder.launches)
            yield from (launch for launch in launches if selection.names(launch.name))


def _distinct(case: str, launches: Sequence[tuple[Any, ...]]) -> Iterator[Launch]:
    """Launches that compile to something of their own: of one kernel, those that differ in their options."""
    seen: dict[str, list[dict[str, Any]]] = {}
    for kernel, args, meta in launches:
        variants = seen.setdefault(kernel.fn.__name__, [])
        if meta in variants:
            continue
        variants.append(meta)
        name = f"{case}/{kernel.fn.__name__}" + (f"#{len(variants)}" if len(variants) > 1 else "")
        yield Launch(name, kernel, args, meta)


def compile_all(target: str, selection: Selection) -> tuple[list[Row], list[str]]:
    """The rows of what compiles for `target`, and a line for each launch that does not."""
    rows, failures = [], []
    for launch in record(target, selection):
        print(f"compiling {launch.name} for {target}", file=sys.stderr)
        try:
            with redirect_stdout(sys.stderr):  # where Triton prints whole listings when the assembler fails
                rows.append(compile_launch(launch, target))
        except Exception as error:  # Triton's compiler raises many kinds; the other kernels still count
            failures.append(f"{launch.name} for {target} does not compile: {str(error)[:1000]}")
    return rows, failures


def _table(rows: Sequence[Row]) -> str:
    columns = [field.name for field in fields(Row) if field.name != "loops"]
    lines = aligned(columns, [[str(getattr(row, name)) for name in columns] for row in rows], left=2).splitlines()
    notes = ["", *(f"  ← {row.problem}" if row.problem else "" for row in rows)]
    kernels = "\n".join(text + note for text, note in zip(lines, notes, strict=True))
    loops = (
        (f"{row.kernel} {row.target} {place}", loop) for row in rows for place, loop in enumerate(row.loops or (), 1)
    )
    return f"{kernels}\n\n{table(loops)}"


def _parser() -> argparse.ArgumentParser:
    from sora_fast.arguments import path

    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="name what differs from the snapshot in the repository")
    what.add_argument("--update", action="store_true", help="rewrite that snapshot: the differences are intended")
    parser.add_argument("--snapshot", type=path, default=FILE, metavar="FILE", help="another one than the repository's")
    parser.add_argument("--json", type=path, help="also write the rows to this file")
    parser.add_argument("--target", nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT), help="GPUs")
    parser.add_argument("--kernel", nargs="+", default=(), metavar="NAME", help="only names that contain this")
    return parser


def _comparable(options: argparse.Namespace, selection: Selection) -> Snapshot:
    """The snapshot to compare with or to update. ValueError if it cannot be that, _Foreign if it need not be."""
    here = triton.__version__
    known = Snapshot.read(options.snapshot)
    if known is None and options.check:
        raise ValueError(f"{options.snapshot} is not there yet; --update writes it")
    if known is None or known.triton == here:
        return known or Snapshot(here, ())
    reason = f"the snapshot is of Triton {known.triton}, this is {here}"
    if options.check:
        raise _Foreign(f"not compared: {reason}")
    if options.update and not selection.everything:
        raise ValueError(f"{reason}: update all of it, without --target and --kernel")
    return Snapshot(here, ())


class _Foreign(Exception):
    """The snapshot was made by another compiler: its counts say nothing about this one's."""


def main(arguments: Sequence[str] | None = None) -> int:
    from sora_fast.files import check_folder

    parser = _parser()
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    selection = Selection(options.target, options.kernel)
    try:
        snapshot = _comparable(options, selection)
        for file in filter(None, (options.json, options.update and options.snapshot)):
            check_folder(file.parent)
    except ValueError as error:
        parser.error(str(error))
    except _Foreign as reason:
        print(reason)
        return 0

    rows: list[Row] = []
    failures: list[str] = []
    for target in options.target:
        compiled, failed = compile_all(target, selection)
        rows += compiled
        failures += failed
        if options.update and not failed:
            snapshot = snapshot.with_rows(compiled, Selection([target], options.kernel))
            snapshot.write(options.snapshot)
    print(_table(rows))
    print(*failures, sep="\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    changes = list(snapshot.differences(rows, selection)) if options.check else []
    if changes:
        print("changed since the snapshot (if intended: the same command with --update):", *changes, sep="\n")
    return 1 if changes or failures or not rows or any(row.problem for row in rows) else 0


if __name__ == "__main__":
    _checkout.make_importable()
    sys.exit(main())
