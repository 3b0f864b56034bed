"""Launch plans: what Triton finds out anew for every launch, kept for the next one like it.

Triton's own launch binds and specialises the arguments, writes the options out as text, looks the compiled kernel up
and asks every hook: 7 to 20 µs a launch. A plan keeps the compiled kernel under a key that is at least as fine as
Triton's own (the integers themselves, for all that a value may mean to the compiler), and calls its launcher: 5 to 10.
Whatever is out of the ordinary (a hook, a profiler, another kind of argument or of kernel) is left to Triton, and so is
the first launch of every key.

Knows Triton 3.6 and 3.7; under any other all launches are Triton's own, which is said once.
"""

import logging
from functools import cache
from typing import Any, NamedTuple

import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

log = logging.getLogger(__name__)

_KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
# Batches whose sizes change have keys of their own.
_MOST = 4096

Key = tuple[Any, ...]


class Plan(NamedTuple):
    """A compiled kernel as it is launched. constants: the arguments that follow those of the call; globals: what it
    was compiled with of its modules, and must still be there; of: the kernel, kept alive, since a key has its id."""

    run: Any
    function: int
    metadata: Any
    constants: tuple[Any, ...]
    globals: tuple[tuple[str, Any, dict[str, Any]], ...]
    of: JITFunction

    def is_outdated(self) -> bool:
        """Whether one of the globals is another now, which Triton makes an error."""
        for name, value, here in self.globals:  # noqa: SIM110  (a third of the time that any() takes)
            if here.get(name) is not value:
                return True
        return False


_plans: dict[Key, Plan] = {}


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """kernel[grid](*args, **meta) on the current device."""
    if type(kernel) is not JITFunction or not _KNOWN or _is_watched(kernel):
        _say_unknown()
        kernel[grid](*args, **meta)
        return
    active = driver.active
    device = active.get_current_device()
    compilation = (kernel.debug, knobs.runtime.debug, knobs.compilation.instrumentation_mode)
    described = [id(kernel), active, device, *compilation, *meta, *meta.values()]
    key = tuple(described) if _describe(args, described) else None
    plan = _plans.get(key)
    if plan is None or plan.is_outdated():
        compiled = kernel[grid](*args, **meta)
        if key is not None:
            _keep(key, kernel, compiled, args, meta)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    plan.run(x, y, z, stream, plan.function, plan.metadata, None, None, None, *args, *plan.constants)


def _is_watched(kernel: JITFunction) -> bool:
    """Whether anybody wants to see its launch or what it is compiled for."""
    runtime = knobs.runtime
    return bool(
        kernel.pre_run_hooks
        or _calls(runtime.launch_enter_hook)
        or _calls(runtime.launch_exit_hook)
        or runtime.add_stages_inspection_hook
    )


def _calls(hook: Any) -> Any:
    """Whether it does anything: Triton's own is a chain of `calls`, empty unless a profiler adds one."""
    return hook is not None and getattr(hook, "calls", True)


def _describe(args: tuple[Any, ...], key: list[Any]) -> bool:
    """Append all that Triton may compile a kernel for; False if there is an argument of a kind not known."""
    append = key.append
    waiting = list(args)
    for arg in waiting:  # and what a tuple adds to it
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            append(arg.dtype)
            append(arg.data_ptr() % 16)
        elif kind is int or arg is None or (kind is tuple and _INTEGERS.issuperset(map(type, arg))):
            append(arg)
        elif isinstance(arg, tuple):
            append(kind)
            append(len(arg))
            waiting += arg
        elif kind is float:
            append(float)  # their values are never compiled in
        elif kind is bool:
            append((bool, arg))  # not the integer that it equals
        elif kind is TensorDescriptor:
            append(kind)
            append((arg.base.dtype, *arg.block_shape, arg.padding))
        else:
            return False
    return True


_INTEGERS = frozenset((int,))


def _keep(key: Key, kernel: JITFunction, compiled: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Make a plan of what a launch by Triton gave back; of a kernel that it did not compile, or for no GPU of NVIDIA's,
    none."""
    if not isinstance(compiled, triton.compiler.CompiledKernel) or compiled.metadata.target.backend != "cuda":
        return
    parameters = list(kernel.signature.parameters.values())[len(args) :]
    constants = tuple(meta.get(parameter.name, parameter.default) for parameter in parameters)
    read = tuple((name, here[name], here) for (name, _), (_, here) in kernel.used_global_vals.items())
    if len(_plans) >= _MOST:
        _plans.clear()
    _plans[key] = Plan(compiled.run, compiled.function, compiled.packed_metadata, constants, read, kernel)


@cache
def _say_unknown() -> None:
    if not _KNOWN:
        log.warning("Triton %s launches every kernel itself, 10 µs slower: plans know 3.6, 3.7", triton.__version__)
