"""Activation checkpointing of a model's blocks, applied from outside: the model does not know.

Memory for time: what a block keeps for the backward pass is made again there, all of it or what is cheap.
"""

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sora_fast.ops._dispatch import asked_for, use_backend

HOW = ("block", "selective")

# Where the time of a forward pass goes; everything else is passes over memory.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "sora_fast::linear_of_tokens")
_ATTENTION = ("sora_fast::packed_attention", "sora_fast::packed_attention_plain", "aten::_flash_attention_forward")


def recompute(blocks: Iterable[nn.Module], how: str) -> None:
    """Let every block keep less for its backward pass; before anything is compiled.

    how: "block" keeps what goes into a block, and runs it a second time; "selective" keeps the results of matrix
        products and attention too, and makes the rest again. Gradients are the same to the bit, eagerly.
    The ops' backend is that of the forward pass in both, also where the backward pass runs in a thread of its own.
    """
    if how not in HOW:
        raise ValueError(f"how: {how!r}; it must be one of {', '.join(HOW)}")
    for block in blocks:
        block.forward = partial(_recomputed, block.forward, how)


def _recomputed(forward: Callable[..., Any], how: str, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
    if torch.compiler.is_compiling():  # a graph has its backends in it
        if how == "selective":
            options["context_fn"] = _selective
        return checkpoint(forward, *args, **options)
    return checkpoint(forward, *args, context_fn=partial(_contexts, how, asked_for()), **options)


def _contexts(how: str, backend: str | None) -> tuple[AbstractContextManager, AbstractContextManager]:
    first, again = _selective() if how == "selective" else (contextlib.nullcontext(), contextlib.nullcontext())
    return first, _both(again, backend)


@contextlib.contextmanager
def _both(again: AbstractContextManager, backend: str | None) -> Any:
    with use_backend(backend), again:
        yield


def _selective() -> tuple[AbstractContextManager, AbstractContextManager]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op.name().partition(".")[0] in (*_PRODUCTS, *_ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
