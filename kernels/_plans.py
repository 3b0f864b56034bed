"""Launch plans: what Triton finds out anew for every launch, kept for the next one like it.

Triton's own launch binds and specialises the arguments, writes the options out as text, looks the compiled kernel up and
asks every hook: 7 to 20 µs a launch. A plan keeps the compiled kernel under a key that is at least as fine as Triton's
own (the integers themselves, for all that a value may mean to the compiler), and calls its launcher. Whatever is out of
the ordinary (a hook, a profiler, another kind of argument or of kernel) is left to Triton, and so is the first launch of
every key.

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

_KNOWN = ("3.6.", "3.7.")
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


_plans: dict[Key, Plan] = {}


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """kernel[grid](*args, **meta) on the current device."""
    key = _key(kernel, args, meta)
    if key is None:
        kernel[grid](*args, **meta)
        return
    plan = _plans.get(key)
    if plan is None or not all(here.get(name) is value for name, value, here in plan.globals):
        _keep(key, kernel, kernel[grid](*args, **meta), args, meta)
        return
    x, y, z = (*grid, 1, 1)[:3]
    active = driver.active
    stream = active.get_current_stream(active.get_current_device())
    plan.run(x, y, z, stream, plan.function, plan.metadata, None, None, None, *args, *plan.constants)


def _key(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Key | None:
    """What the compiled kernel follows from; None if that is not known, or somebody wants to see the launch."""
    if type(kernel) is not JITFunction or kernel.pre_run_hooks or not _is_known():
        return None
    runtime = knobs.runtime
    if _calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook) or runtime.add_stages_inspection_hook:
        return None
    active = driver.active
    compilation = (kernel.debug, runtime.debug, knobs.compilation.instrumentation_mode)
    key = [id(kernel), active, active.get_current_device(), *compilation, *meta, *meta.values()]
    return tuple(key) if _describe(args, key) else None


def _describe(args: tuple[Any, ...], key: list[Any]) -> bool:
    """Append all that Triton may compile a kernel for; False if there is an argument of a kind not known."""
    append = key.append
    for arg in args:
        kind = type(arg)
        if kind is int or arg is None:
            append(arg)
        elif kind is Tensor or kind is Parameter:
            append(arg.dtype)
            append(arg.data_ptr() % 16)
        elif kind is float:
            append(float)  # their values are never compiled in
        elif kind is bool:
            append((bool, arg))  # not the integer that it equals
        elif isinstance(arg, tuple):
            append(kind)
            append(len(arg))
            if not _describe(arg, key):
                return False
        elif kind is TensorDescriptor:
            append(kind)
            append((arg.base.dtype, *arg.block_shape, arg.padding))
        else:
            return False
    return True


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


def _calls(hook: Any) -> bool:
    return hook is not None and not (type(hook) is knobs.HookChain and not hook.calls)


@cache
def _is_known() -> bool:
    known = triton.__version__.startswith(_KNOWN)
    if not known:
        log.warning(
            "Triton %s launches every kernel itself, some 10 µs slower: plans know 3.6 and 3.7", triton.__version__
        )
    return known
