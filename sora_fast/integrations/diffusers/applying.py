"""Put replacements on a model, say what was done, and take them off again."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sora_fast.integrations.diffusers import wan
from sora_fast.integrations.diffusers.check import compare
from sora_fast.integrations.diffusers.report import ModuleReport, Report
from sora_fast.integrations.diffusers.target import Target, bind, covered, is_bound, unbind
from sora_fast.ops._dispatch import counts

log = logging.getLogger(__name__)

TARGETS = (wan.ATTENTION, wan.BLOCK)


def apply(model: nn.Module, *, check: bool = True) -> Report:
    """Run the blocks of a diffusers model on our ops, in place; `revert` takes them off without a trace.

    model: a WanTransformer3DModel (2.1 or 2.2; timesteps of every token too), or any module that holds its blocks.
        Only this instance changes: no class is patched, and names of weights, LoRA, hooks and gradient checkpointing
        stay. Before torch.compile, FSDP and offloading, which take the forward as it is. Norms inside a replaced
        module are read, not called: hooks that are put on them later do not run.
    check: run one module of each kind, original and replaced, forward and backward on random input of several shapes,
        both beside the original in fp64. It takes three copies of that module for a moment, one of them in fp64.
    Returns what was replaced, and why not the rest: a module whose source is not the one that the replacement was
    written for, or that fails the check, is left as it was. What is left is logged too, as one warning.
    Raises ValueError for a model that has no block that we know, is replaced already, or is compiled.
    """
    _check_ready(model)
    accepted: dict[nn.Module, Target] = {}
    verdicts: dict[Any, _Verdict] = {}
    reports = []
    # Inner modules first: a block is checked with its attention as it will be.
    for name, module, target in reversed(_known(model)):
        reason, ops = target.refusal(module), target.ops
        if reason is None and check:
            kind = _kind(module, target, accepted)
            if kind not in verdicts:
                verdicts[kind] = _verdict(module, target, accepted)
            reason, ops = verdicts[kind]
        if reason is None:
            accepted[module] = target
        reports.append(ModuleReport(name, type(module).__name__, () if reason else ops, reason))
    for module, target in accepted.items():
        bind(module, target)
    report = Report(tuple(reversed(reports)))
    if report.kept:
        log.warning(
            "%d of %d known modules are not replaced: %s", len(report.kept), len(report.modules), report.kept[0]
        )
    return report


def revert(model: nn.Module) -> None:
    """Take off what `apply` put on the model, or on the one that it was deep-copied from.

    What was compiled meanwhile may keep our ops: compile anew. Raises ValueError, and changes nothing, if something has
    been put over a replacement since.
    """
    bound = [(name, module) for name, module in model.named_modules() if is_bound(module)]
    for name, module in bound:
        attribute = covered(module)
        if attribute is not None:
            raise ValueError(
                f"model: the {attribute} of {name} has been set since apply, by a hook perhaps; take that off first"
            )
    for _, module in bound:
        unbind(module)


@contextmanager
def applied(model: nn.Module, *, check: bool = True) -> Iterator[Report]:
    """`apply` for the time of a with-block, at the end of which the model is as it was."""
    report = apply(model, check=check)
    try:
        yield report
    finally:
        revert(model)


def _known(model: nn.Module) -> list[tuple[str, nn.Module, Target]]:
    """In the model's order."""
    return [
        (name, module, target) for name, module in model.named_modules() for target in TARGETS if target.matches(module)
    ]


def _check_ready(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}; it must be a torch.nn.Module")
    for name, module in model.named_modules():
        if is_bound(module):
            raise ValueError(f"model: {name or 'it'} is replaced already; revert(model) first")
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            raise ValueError(f"model: {name or 'it'} is compiled; apply first, then compile")
    if not _known(model):
        known = ", ".join(target.path for target in TARGETS)
        raise ValueError(f"model: {type(model).__name__} holds nothing that can be replaced; known are {known}")


# Why a module fails its check, or None; and what ran in its place, with the backends.
_Verdict = tuple[str | None, tuple[str, ...]]


def _verdict(module: nn.Module, target: Target, accepted: dict[nn.Module, Target]) -> _Verdict:
    inside = {name: accepted[part] for name, part in module.named_modules() if part in accepted}

    def replace(copy: nn.Module) -> None:
        for name, inner in {**inside, "": target}.items():
            bind(copy.get_submodule(name), inner)

    before = counts()
    try:
        failed = [comparison for comparison in compare(module, target, replace) if not comparison.passed]
    except Exception as error:  # of a module as we have never seen one; it stays as it is, and the report says why
        return f"the check could not run it: {type(error).__name__}: {error}", ()
    if failed:
        return f"the check failed: {max(failed, key=lambda one: one.ours / one.limit)}", ()
    ran = [(op, backend) for (op, backend), count in counts().items() if count > before.get((op, backend), 0)]
    return None, tuple(f"{op}: {backend}" for wanted in target.ops for op, backend in ran if op == wanted)


def _kind(module: nn.Module, target: Target, accepted: dict[nn.Module, Target]) -> Any:
    """Equal for modules of which one is checked for all: of the same parts, settings, shapes and dtypes."""
    parts = tuple(name for name, part in module.named_modules() if part in accepted)
    tensors = tuple((name, x.shape, x.dtype, x.device) for name, x in module.state_dict().items())
    return target.path, repr(module), parts, tuple(map(_settings, module.modules())), tensors


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """The plain values that it holds, such as whether attention is across."""
    return tuple((name, x) for name, x in vars(module).items() if isinstance(x, bool | int | float | str | None))
