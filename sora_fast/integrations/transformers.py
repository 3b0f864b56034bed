"""Packed attention as an attention implementation of transformers, by name: `attn_implementation="sora_fast"`."""

from typing import Any

import torch
from torch import Tensor, nn

from sora_fast.integrations.flash_attn import flash_attn_varlen_func
from sora_fast.integrations.lines import ending_together
from sora_fast.integrations.padded import PaddedBatch, padded_attention
from sora_fast.masks import SpacetimeMask
from sora_fast.ops._checks import may_read
from sora_fast.ops.packed_attention import packed_attention

# What models hand on to their attention that would change its result, and is not done here.
_ABSENT = ("softcap", "s_aux", "position_bias", "head_mask", "block_table", "alibi")


def register(name: str = "sora_fast") -> None:
    """Let every model of this process take it: `model.set_attn_implementation(name)`, or when it is loaded.

    Nothing changes for models that do not ask for it. Needs transformers ≥ 4.56.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    AttentionInterface.register(name, attention)
    # Without one of this name transformers would make no mask at all, and padding would be attended.
    AttentionMaskInterface.register(name, flash_attention_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it (`AttentionInterface`); never waits for the device.

    query: [B, H, L, D]; key, value: [B, Hk, Lk, D] → [B, L, H, D], and None in place of the weights.
    attention_mask: None, or [B, Lk], True for real tokens. Queries are the last L of the Lk tokens, as of a cache.
    cu_seq_lens_q, cu_seq_lens_k: of sequences packed into a batch of one, as `DataCollatorWithFlattening` gives them
        with return_flash_attn_kwargs=True. Without them position ids must not start again within a row.
    sliding_window: tokens that a query sees, itself included, of segments up to 1,022 tokens.

    Raises ValueError for what would change the result and is not done here: dropout, a mask of four dimensions, weights
    to be returned, soft caps, sinks, biases.
    """
    _check(query, value, attention_mask, dropout, kwargs)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if cu_seq_lens_q is None:
        _check_unpacked(position_ids, q)
    if attention_mask is not None:
        _check_no_window(sliding_window, k)
        return _padded(q, k, v, attention_mask.bool(), causal, scaling), None
    offsets = _offsets(q, cu_seq_lens_q), _offsets(k, cu_seq_lens_k)
    if q.shape[1] == k.shape[1] and (cu_seq_lens_q is None or cu_seq_lens_k is None or cu_seq_lens_k is cu_seq_lens_q):
        offsets = offsets[0], offsets[0]
    longest = (q.shape[1], k.shape[1])
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
    out = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        *offsets,
        *longest,
        causal=causal,
        window_size=window,
        softmax_scale=scaling,
    )
    return out.unflatten(0, q.shape[:2]), None


def _padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool, scaling: float | None) -> Tensor:
    if q.shape[1] == k.shape[1]:
        return padded_attention(q, k, v, mask, causal=causal, scale=scaling)
    queries, keys = PaddedBatch.of(mask[:, mask.shape[1] - q.shape[1] :]), PaddedBatch.of(mask)
    layouts = ending_together(queries.layout, keys.layout) if causal else (queries.layout, keys.layout)
    out = packed_attention(
        *(queries.pack(q), keys.pack(k), keys.pack(v), layouts[0]),
        SpacetimeMask.token_causal() if causal else None,
        kv_layout=layouts[1],
        scale=scaling,
    )
    return queries.unpack(out)


def _offsets(x: Tensor, given: Tensor | None) -> Tensor:
    """Of the segments of x [B, L, …], flattened."""
    if given is not None:
        return given.to(torch.int32)
    batch, length = x.shape[:2]
    return torch.arange(batch + 1, dtype=torch.int32, device=x.device) * length


def _check(query: Tensor, value: Tensor, mask: Tensor | None, dropout: float, others: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(f"dropout: {dropout}; there is none here, so the model's attention_dropout must be 0")
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"attention_mask: {mask.dim()} dimensions; it must be [B, Lk], of the real tokens, or None")
    if value.shape[-1] != query.shape[-1]:
        raise ValueError(f"value: {value.shape[-1]} channels a head; they must be the {query.shape[-1]} of query")
    if others.get("output_attentions"):
        raise ValueError("output_attentions: True; the weights are never held, so it must be False")
    for name in _ABSENT:
        if others.get(name) is not None:
            raise ValueError(f"{name}: given, but not done here; take another attn_implementation for this model")


def _check_no_window(sliding_window: int | None, k: Tensor) -> None:
    if sliding_window is not None and sliding_window < k.shape[1]:
        raise ValueError(
            f"sliding_window: {sliding_window} tokens with a padded batch of {k.shape[1]}; pack the batch "
            "(DataCollatorWithFlattening) or leave out its padding"
        )


def _check_unpacked(position_ids: Tensor | None, q: Tensor) -> None:
    """Sequences that nobody has told of would attend each other."""
    if position_ids is None or position_ids.dim() != 2 or q.shape[0] != 1 or q.shape[1] == 1:
        return
    message = (
        "position_ids: they start again within the row, so sequences are packed there; give their bounds, too: "
        "DataCollatorWithFlattening(return_flash_attn_kwargs=True)"
    )
    increasing = (position_ids.diff(dim=1) > 0).all()
    if not may_read(position_ids):
        torch._assert_async(increasing, message)
    elif not increasing:
        raise ValueError(message)
