"""A model for many calls with one layout: what follows from the layout alone is made once."""

from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature

from torch.nn import Module

from sora_fast.packing import PackedLayout, RaggedLatents


def scheduled(
    model: Callable[..., RaggedLatents], layout: PackedLayout, text_layout: PackedLayout | None = None
) -> Callable[..., RaggedLatents]:
    """`model` with the schedules of these layouts bound, if it has any and takes them: SoraDiT does (see its
    `schedules_for`), compiled or not; any other is given back as it is.
    """
    make = getattr(model, "schedules_for", None)
    if make is None or not _takes_schedules(model) or not _takes_schedules(make.__self__):
        return model
    return partial(model, schedules=make(layout, text_layout))


def _takes_schedules(model: Callable[..., RaggedLatents]) -> bool:
    """A subclass may have a forward of its own, and a wrapper lend the method of what it wraps."""
    parameters = signature(model.forward if isinstance(model, Module) else model).parameters
    return "schedules" in parameters or any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())
