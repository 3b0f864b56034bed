"""Wan 2.1 and 2.2 (arXiv:2503.20314) as diffusers has them: the attention and the block around it.

Linear layers, and with them LoRA, are called as the modules that they are. What lies between them is ours. GELU stays:
without the bias of the Linear before it, which is that module's own, there is nothing to fuse.
"""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Generator, Tensor, nn

from sora_fast.integrations.diffusers.batches import flat, layout_of, rows_of, schedule_of
from sora_fast.integrations.diffusers.target import Target, bypassed
from sora_fast.ops import RopeTable, adaln, gated_residual, gated_residual_adaln, packed_attention, qk_norm_rope

_FILE = "diffusers.models.transformers.transformer_wan"
# Of the text, which stands behind the image's tokens and is always as long; so it is in diffusers.
_TEXT_TOKENS = 512


class FastWanAttention:
    """In place of a WanAttnProcessor, with its arguments."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, N, C] → [B, N, C]; encoder_hidden_states: [B, L, C] of cross-attention, the image's tokens first."""
        if attention_mask is not None:
            raise ValueError("attention_mask: given; Wan's blocks have none, and the replacement takes none")
        if encoder_hidden_states is None:
            out = _self_attention(attn, hidden_states, rotary_emb)
        elif rotary_emb is None:
            out = _cross_attention(attn, hidden_states, encoder_hidden_states)
        else:
            raise ValueError("rotary_emb: given for cross-attention; Wan's blocks turn self-attention only")
        out = out.flatten(1).unflatten(0, hidden_states.shape[:2])
        return attn.to_out[1](attn.to_out[0](out))

    @property
    def _attention_backend(self) -> None:
        """What diffusers sets on a processor: neither means anything here, and must not be taken in silence."""

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        if backend is not None:
            raise ValueError(f"attention backend: {backend}; sora_fast's attention is in place: revert(model) first")

    @property
    def _parallel_config(self) -> None:
        """As above."""

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        if config is not None:
            raise ValueError("context parallelism: the replaced attention has none; revert(model) first")


def _self_attention(attn: nn.Module, x: Tensor, rotary_emb: tuple[Tensor, Tensor] | None) -> Tensor:
    """[B, N, C] → [B · N, H, D]."""
    sizes = x.shape[0], x.shape[1]
    q, k, v = (_heads(part, attn) for part in _projected(attn, x, x))
    table = None if rotary_emb is None else _table(*rotary_emb, samples=sizes[0], dtype=q.dtype)
    weights = attn.norm_q.weight, attn.norm_k.weight
    schedule = schedule_of(*sizes, None, x.device)
    q, k = qk_norm_rope(q, k, *weights, schedule.layout, table, norm="rms_across_heads", eps=attn.norm_q.eps)
    return packed_attention(q, k, v, schedule.layout, schedule)


def _cross_attention(attn: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    """[B, N, C], [B, L, C'] → [B · N, H, D]; image and text are attended each by itself."""
    image = None
    if attn.add_k_proj is not None:
        tokens = context.shape[1] - _TEXT_TOKENS
        image, context = context[:, :tokens], context[:, tokens:]
    q, k, v = _projected(attn, x, context)
    q = _normed(q, attn.norm_q, attn)
    out = _attended(q, _normed(k, attn.norm_k, attn), v, x.shape[1], attn)
    if image is not None:
        k, v = _projected_image(attn, image)
        out = out + _attended(q, _normed(k, attn.norm_added_k, attn), v, x.shape[1], attn)
    return out


def _attended(q: Tensor, k: Tensor, v: Tensor, tokens: int, attn: nn.Module) -> Tensor:
    """q, k: [B · N, H, D], [B · L, H, D]; v: [B, L, C]; tokens: N. → [B · N, H, D]."""
    sizes = v.shape[0], tokens, v.shape[1]
    schedule = schedule_of(*sizes, v.device)
    return packed_attention(q, k, _heads(v, attn), schedule.layout, schedule, kv_layout=schedule.kv_layout)


def _normed(x: Tensor, norm: nn.Module, attn: nn.Module) -> Tensor:
    """[B, L, C] → [B · L, H, D]."""
    layout = layout_of(x.shape[0], x.shape[1], x.device)
    args = _heads(x, attn), None, norm.weight, None, layout, None
    return qk_norm_rope(*args, norm="rms_across_heads", eps=norm.eps)[0]


def _projected(attn: nn.Module, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of x, keys and values of the context, [B, N or L, C]; of one Linear where diffusers has fused them."""
    if not attn.fused_projections:
        return attn.to_q(x), attn.to_k(context), attn.to_v(context)
    if not attn.is_cross_attention:
        return attn.to_qkv(x).chunk(3, dim=-1)
    return attn.to_q(x), *attn.to_kv(context).chunk(2, dim=-1)


def _projected_image(attn: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    if attn.fused_projections:
        return attn.to_added_kv(image).chunk(2, dim=-1)
    return attn.add_k_proj(image), attn.add_v_proj(image)


def _heads(x: Tensor, attn: nn.Module) -> Tensor:
    """[B, N, C] → [B · N, H, D], a view."""
    return flat(x).unflatten(1, (attn.heads, -1))


def _table(cos: Tensor, sin: Tensor, *, samples: int, dtype: torch.dtype) -> RopeTable:
    """Of [1, N, 1, D], every cosine and sine twice. More samples than one take a copy of D / 2 numbers a token."""
    dtype = torch.promote_types(dtype, torch.float32)
    halves = (x[0, :, 0, start::2].to(dtype) for start, x in enumerate((cos, sin)))
    return RopeTable(*(half if samples == 1 else half.repeat(samples, 1) for half in halves))


def _fast_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor],
) -> Tensor:
    """The forward of a WanTransformerBlock, with its arguments.

    temb: [B, 6, C], or [B, N, 6, C] for timesteps of every token (Wan 2.2 5B), which are rows of their own: as many as
    diffusers makes of them, in fp32 as there.
    """
    shape = hidden_states.shape
    table = (self.scale_shift_table + temb.float()).view(-1, 6, shape[2])
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(1)
    rows = rows_of(len(table), 1 if temb.ndim == 4 else shape[1], temb.device)

    x = flat(hidden_states)
    y = adaln(x, shift, scale, rows, **_affine(self.norm1))
    branch = flat(self.attn1(y.view(shape), None, None, rotary_emb)).to(x.dtype)
    if isinstance(self.norm2, nn.Identity):
        y = x = gated_residual(x, branch, gate, rows)
    else:
        x, y = gated_residual_adaln(x, branch, gate, None, None, rows, **_affine(self.norm2))
    branch = flat(self.attn2(y.view(shape), encoder_hidden_states, None, None)).to(x.dtype)
    x, y = gated_residual_adaln(x, branch, None, ffn_shift, ffn_scale, rows, **_affine(self.norm3))
    branch = flat(self.ffn(y.view(shape))).to(x.dtype)
    return gated_residual(x, branch, ffn_gate, rows).view(shape)


def _affine(norm: nn.Module) -> dict[str, Any]:
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}


def _norms_of_heads(attn: nn.Module) -> dict[str, nn.Module]:
    names = ("norm_q", "norm_k", *(() if attn.add_k_proj is None else ("norm_added_k",)))
    return {name: getattr(attn, name) for name in names}


def _attention_sources(attn: nn.Module) -> list[Callable | None]:
    call = type(attn.processor).__call__
    names = ("_get_qkv_projections", "_get_added_kv_projections")
    return [type(attn).forward, call, *(getattr(call, "__globals__", {}).get(name) for name in names)]


def _attention_unsuited(attn: nn.Module) -> str | None:
    if attn.processor._parallel_config is not None:
        return "its processor shares the sequence among devices (context parallelism)"
    backend = attn.processor._attention_backend
    if backend is not None:
        return f"its attention backend is set to {backend}; model.reset_attention_backend() first"
    norms = _norms_of_heads(attn)
    for name, norm in norms.items():
        if type(norm) is not nn.RMSNorm or norm.weight is None or norm.eps is None:
            return f"{name} is {norm}; the replacement is for an RMSNorm with a weight and an eps"
    if attn.norm_q.eps != attn.norm_k.eps:
        return f"norm_q and norm_k have the eps {attn.norm_q.eps} and {attn.norm_k.eps}; it must be one"
    return bypassed(**norms)


def _block_sources(block: nn.Module) -> list[Callable | None]:
    kinds = dict.fromkeys(type(norm) for norm in (block.norm1, block.norm2, block.norm3))
    return [type(block).forward, *(kind.forward for kind in kinds if kind is not nn.Identity)]


def _block_unsuited(block: nn.Module) -> str | None:
    return bypassed(norm1=block.norm1, norm2=block.norm2, norm3=block.norm3)


# Samples and tokens of the batches that `check` tries: less than a tile, of more samples, more than a tile of 128.
_CHECKED = ((1, 6), (2, 35), (1, 131))


def _random(generator: Generator, like: Tensor, *shape: int) -> Tensor:
    """Standard normal; made on the CPU, so that all devices see the same."""
    return torch.randn(*shape, generator=generator).to(like)


def _attention_examples(attn: nn.Module, generator: Generator) -> Iterator[dict[str, Any]]:
    like, cross = attn.norm_q.weight, attn.is_cross_attention
    for samples, tokens in _CHECKED:
        x = _random(generator, like, samples, tokens, _width(attn.to_out[0], "out_features"))
        if cross:
            yield {"hidden_states": x, "encoder_hidden_states": _context(attn, generator, samples)}
        else:
            yield {"hidden_states": x, "rotary_emb": _turns(attn, generator, tokens)}


def _block_examples(block: nn.Module, generator: Generator) -> Iterator[dict[str, Any]]:
    like, width = block.attn1.norm_q.weight, block.scale_shift_table.shape[-1]
    for samples, tokens in _CHECKED:
        for timesteps in ((), (tokens,)):
            yield {
                "hidden_states": _random(generator, like, samples, tokens, width),
                "encoder_hidden_states": _context(block.attn2, generator, samples),
                "temb": _random(generator, like, samples, *timesteps, 6, width),
                "rotary_emb": _turns(block.attn1, generator, tokens),
            }


def _context(attn: nn.Module, generator: Generator, samples: int) -> Tensor:
    tokens = 7 if attn.add_k_proj is None else _TEXT_TOKENS + 3
    return _random(generator, attn.norm_q.weight, samples, tokens, _width(attn.to_k, "in_features"))


def _turns(attn: nn.Module, generator: Generator, tokens: int) -> tuple[Tensor, Tensor]:
    """In fp32, as from `WanRotaryPosEmbed`."""
    head_dim = attn.norm_q.weight.shape[0] // attn.heads
    angles = torch.randn(tokens, head_dim // 2, generator=generator).to(attn.norm_q.weight.device)
    return tuple(x.repeat_interleave(2, dim=1)[None, :, None] for x in (angles.cos(), angles.sin()))


def _width(linear: nn.Module, side: str) -> int:
    """Of a Linear, or of what LoRA has made of it."""
    return getattr(getattr(linear, "base_layer", linear), side)


ATTENTION = Target(
    path=f"{_FILE}.WanAttention",
    ops=("qk_norm_rope", "packed_attention"),
    attribute="processor",
    replacement=lambda attn: FastWanAttention(),
    sources=_attention_sources,
    known={"b31cf165b03377d0": "0.37.1 to 0.42.1"},
    unsuited=_attention_unsuited,
    examples=_attention_examples,
)
BLOCK = Target(
    path=f"{_FILE}.WanTransformerBlock",
    ops=("adaln", "gated_residual_adaln", "gated_residual"),
    attribute="forward",
    replacement=lambda block: MethodType(_fast_block, block),
    sources=_block_sources,
    known={"a72b329ae3442367": "0.36.0 to 0.42.1"},
    unsuited=_block_unsuited,
    examples=_block_examples,
)
