"""A model for many calls with one layout: what follows from the layout alone is made once."""

from collections.abc import Callable
from functools import partial

from sora_fast.packing import PackedLayout, RaggedLatents


def scheduled(
    model: Callable[..., RaggedLatents], layout: PackedLayout, text_layout: PackedLayout | None = None
) -> Callable[..., RaggedLatents]:
    """`model` with the schedules of these layouts bound, if it has any: SoraDiT does (see its `schedules_for`),
    compiled or not; any other is given back as it is.
    """
    make = getattr(model, "schedules_for", None)
    return model if make is None else partial(model, schedules=make(layout, text_layout))
