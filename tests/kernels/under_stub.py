"""Launches over the stub driver, judged in a process of their own (see test_plans): prints what went wrong, by name.

Every check compares what `launch` asks the driver for, plan or none, with what Triton's own launch asks for.
"""

import json
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from benchmarks import _checkout, stub_driver

_checkout.make_importable()

CHECKS: dict[str, Callable[[], None]] = {}


class Pair(NamedTuple):
    first: Any
    second: Any


class Other(NamedTuple):
    first: Any
    second: Any


LIMIT = tl.constexpr(3)


@triton.jit
def kernel(x, y, size, factor, pair, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < size) * factor + LIMIT
    if y is not None:
        value += tl.load(y + place, mask=place < size).to(tl.float32)
    if pair.second is not None:
        value += pair.second
    tl.store(pair.first + place, value, mask=place < size)


@triton.jit
def kernel_alike(x, y, size, factor, pair, BLOCK: tl.constexpr):
    tl.store(pair.first + tl.program_id(0), size)


@triton.jit
def described_kernel(block, y):
    tl.store(y, tl.sum(tl.sum(block.load([0, 0]).to(tl.float32), 1), 0))


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def both(kernel: Any, *args: Any, grid: tuple[int, ...] = (2,), **meta: Any) -> stub_driver.Launch:
    """The launch that Triton makes of it, which those by `launch`, the first and the later ones, must be too."""
    begin = STUB.num_launches
    kernel[grid](*args, **meta)
    for _ in range(3):
        launch(kernel, grid, *args, **meta)
    own, *ours = STUB.launches(begin)
    assert ours == [own] * 3, f"{own} but {ours}"
    return own


def call(x: Any = None, y: Any = None, size: int = 64, factor: float = 2.0, pair: Any = None, **meta: Any) -> Any:
    """A launch of `kernel`, with what is given in place of the usual."""
    given = (X if x is None else x, y, size, factor, Pair(OUT, 5) if pair is None else pair)
    return both(kernel, *given, **{"BLOCK": 64, "num_warps": 4, **meta})


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@check
def a_plan_takes_the_launches_after_the_first() -> None:
    call()
    with replaced(triton.JITFunction, "run", None):  # Triton's own way
        launch(kernel, (2,), X, None, 64, 2.0, Pair(OUT, 5), BLOCK=64, num_warps=4)


@check
def kernels_called_alike_are_different_kernels() -> None:
    arguments = (X, None, 64, 2.0, Pair(OUT, 5))
    assert both(kernel, *arguments, BLOCK=64).kernel != both(kernel_alike, *arguments, BLOCK=64).kernel


@check
def a_pointer_that_is_not_aligned_is_another_kernel() -> None:
    compiled = {call(x=X[first:]).kernel for first in (0, 4, 1, 8, 1)}  # 4 · 4 bytes are aligned, too
    assert len(compiled) == 2
    assert call(x=X[1:]).integers()[0] == X.data_ptr() + 4


@check
def integers_are_what_triton_makes_of_them() -> None:
    sizes = [64, 48, 17, 1, True, 0, -16, 2**31, 2**40, 1, 64, 17]
    kernels = [call(size=size).kernel for size in sizes]
    assert (
        len(set(kernels)) > 4 and kernels[0] == kernels[-2] and kernels[2] == kernels[-1] and kernels[3] == kernels[-3]
    )
    inside = [call(pair=Pair(OUT, value)).kernel for value in (5, 16, 1, True, 2**40)]
    assert len(set(inside)) > 3


@check
def floats_are_values_and_not_kernels() -> None:
    one, other = call(factor=1.0), call(factor=3.5)
    assert one.kernel == other.kernel and one.params != other.params
    assert call(factor=1).kernel != one.kernel


@check
def a_dtype_and_none_are_other_kernels() -> None:
    compiled = {call(y=y).kernel for y in (None, X, X.half(), X.bfloat16(), torch.nn.Parameter(X))}
    assert len(compiled) == 4  # a parameter is a tensor
    assert call(pair=Pair(OUT, None)).kernel != call().kernel


@check
def constants_and_warps_are_other_kernels() -> None:
    compiled = {call(**meta).kernel for meta in ({}, {"BLOCK": 128}, {"num_warps": 8}, {"num_stages": 5})}
    assert len(compiled) == 4


@check
def tuples_of_another_class_are_other_arguments() -> None:
    assert call(pair=Other(OUT, 5)).params == call(pair=Pair(OUT, 5)).params


@check
def grids_of_every_rank() -> None:
    assert [
        both(kernel, X, None, 64, 2.0, Pair(OUT, 5), BLOCK=64, grid=grid).grid for grid in ((3,), (3, 4), (3, 4, 5))
    ] == [
        (3, 1, 1),
        (3, 4, 1),
        (3, 4, 5),
    ]


@check
def nothing_is_launched_over_an_empty_grid() -> None:
    begin = STUB.num_launches
    launch(kernel, (2, 0), X, None, 64, 2.0, Pair(OUT, 5), BLOCK=64)
    assert STUB.num_launches == begin


@check
def another_stream_and_device_are_seen() -> None:
    usual = call()
    with replaced(STUB, "stream", 7):
        assert call().stream == 7
    with replaced(STUB, "device", 1):
        assert call().kernel != usual.kernel  # modules are loaded for one device
    assert call() == usual


@check
def hooks_see_every_launch() -> None:
    seen: list[str] = []

    def enter(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    call()
    triton.knobs.runtime.launch_enter_hook.add(enter)
    try:
        call()
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(enter)
    assert seen == ["kernel"] * 4
    call()
    with replaced(triton.knobs.runtime, "launch_exit_hook", enter):
        call()
    with replaced(triton.knobs.runtime, "launch_enter_hook", None):
        call()
    assert seen == ["kernel"] * 8


@check
def hooks_before_a_run_are_called() -> None:
    seen: list[int] = []
    call()
    with replaced(kernel, "pre_run_hooks", [lambda *args, **meta: seen.append(args[2])]):
        call()
    assert seen == [64] * 4


@check
def debugging_compiles_anew() -> None:
    usual = call()
    with replaced(triton.knobs.runtime, "debug", True):
        assert call().kernel != usual.kernel
    assert call() == usual


@check
def a_changed_global_is_the_error_that_triton_makes_of_it() -> None:
    call()
    with replaced_global("LIMIT", tl.constexpr(4)):
        try:
            launch(kernel, (2,), X, None, 64, 2.0, Pair(OUT, 5), BLOCK=64, num_warps=4)
        except RuntimeError as error:
            assert "LIMIT" in str(error)
        else:
            raise AssertionError("no error")
    call()


@contextmanager
def replaced_global(name: str, value: Any) -> Iterator[None]:
    before = globals()[name]
    globals()[name] = value
    try:
        yield
    finally:
        globals()[name] = before


@check
def descriptors_are_made_of_the_tensors_of_each_call() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    def of(rows: int, x: torch.Tensor) -> stub_driver.Launch:
        return both(described_kernel, TensorDescriptor.from_tensor(x, [rows, 32]), OUT)

    x = torch.zeros(256, 64, dtype=torch.float16)
    first, later, shorter = of(32, x), of(32, x[8:]), of(32, x[:100])
    assert first.kernel == later.kernel == shorter.kernel
    maps = [launch.params[0] for launch in (first, later, shorter)]
    assert [int.from_bytes(content[:8], "little") for content in maps] == [x.data_ptr(), x[8:].data_ptr(), x.data_ptr()]
    assert len({content[24:] for content in maps}) == 3  # 256, 248 and 100 rows
    assert len({launch.kernel for launch in (first, of(16, x), of(32, x.float()))}) == 3


@check
def keys_are_as_fine_as_triton_s() -> None:
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    draw = random.Random(0)
    single = [None, True, False, 0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**32, 2**63, 0.0, 1.0, 2.5]
    single += [X[first:].to(dtype) for dtype in (torch.float32, torch.float16, torch.int32) for first in (0, 1)]
    single += [X.to(torch.float16)[first:] for first in (0, 1, 2, 8)]
    kinds = (lambda values: tuple(values), lambda values: Pair(*values), lambda values: Other(*values))
    values: list[Any] = [*single]
    for _ in range(2000):
        values.append(draw.choice(kinds)([draw.choice(single), draw.choice(values[-50:])]))
    meant: dict[Any, Any] = {}
    for value in values:
        key: list[Any] = []
        assert _plans._describe((value,), key)
        own = native_specialize_impl(type(backend), value, False, True, True)
        assert meant.setdefault(tuple(key), own) == own, f"{value} is {own}, and so is another of {key}"


@check
def an_unknown_triton_launches_itself() -> None:
    with replaced(_plans, "_KNOWN", False), replaced(_plans, "_plans", {}):
        call()
        assert not _plans._plans


@check
def plans_do_not_grow_without_end() -> None:
    with replaced(_plans, "_MOST", 4):
        for size in range(20, 40):
            call(size=size)
        assert len(_plans._plans) <= 4


if __name__ == "__main__":
    STUB = stub_driver.activate()
    from sora_fast.kernels import _plans
    from sora_fast.kernels._launch import launch

    X, OUT = torch.zeros(256), torch.zeros(4096)
    wrong = {}
    for name, function in CHECKS.items():
        try:
            function()
            wrong[name] = ""
        except Exception:
            wrong[name] = traceback.format_exc()
    print(json.dumps(wrong))
