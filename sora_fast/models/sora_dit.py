"""SoraDiT: a diffusion transformer over packed videos and images."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from sora_fast.masks import SpacetimeMask
from sora_fast.models.text import PackedText
from sora_fast.nn import BlockContext, DiTBlock, FinalLayer, LabelEmbedder, PatchEmbed3D, TimestepEmbedder
from sora_fast.nn.attention import KeysValues
from sora_fast.nn.patch import autocast_dtype
from sora_fast.nn.positions import FactorisedTables, FractionalPosition, SinCosPosition, SpacetimeSinCosPosition
from sora_fast.ops.adaln import adaln
from sora_fast.ops.patch_embed import FactorisedPosition
from sora_fast.ops.qk_norm_rope import Rope3D
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.packing._bundle import TensorBundle
from sora_fast.schedule import TileSchedule

POSITIONS = ("rope", "factorised", "fractional", "sincos", "sincos3d")
# Depth, width and heads of DiT's four sizes (Peebles & Xie 2023, Table 1).
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@dataclass(frozen=True)
class SoraDiTConfig:
    """Everything that the shape of a SoraDiT depends on.

    position: "rope" (3D, inside attention), or added to the patches: "factorised" (learned tables for t, h, w),
        "fractional" (place as a share of the side), "sincos" (DiT's, of row and column), "sincos3d"
        (of the frame too). "rope+sincos3d" and the like: both. Rotary positions know no edges of the frame and no first
        one; a small model learns much sooner where things are if it is told.
    rope_theta: of the rotary positions, and of sincos3d. The slowest pair of a head should turn about once over the
        longest grid: 10,000 suits hundreds of patches a side, 100 a dozen.
    position_bias: standard deviation at the start of one bias shared by the queries and keys of a block. Rotated, it
        makes every head prefer near places before it has learned anything; 0, as in DiT, leaves that to training.
    mlp: "gelu" or "swiglu".
    text_dim: width of the text tokens that cross-attention reads; None: no cross-attention.
    pooled_dim: width of a pooled text vector added to the timestep embedding; None: none.
    num_classes: classes of a label added to the timestep embedding; None: none.
    null_class: there is one class more, "no class", which labels that training leaves out become, and guidance needs.
    learned_sigma: predict 2 × in_channels, the second half for the variance (DDPM).
    sigma_end: the model is a flow map (see diffusion/flow_map.py): it sees, beside a level, the lower one that its
        prediction is to lead to. The layers for that start at zero: with the weights of a model that has none it says
        what that one says.
    eps: of every norm.
    discrete_time: the time embedded is DDPM's raw step, round(1000·σ) − 1, and not 1000·σ.
    mask: who attends whom.
    """

    dim: int
    depth: int
    heads: int
    in_channels: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    mlp: str = "gelu"
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    position: str = "rope"
    rope_theta: float = 10000.0
    position_bias: float = 0.0
    text_dim: int | None = None
    pooled_dim: int | None = None
    num_classes: int | None = None
    null_class: bool = True
    learned_sigma: bool = False
    sigma_end: bool = False
    discrete_time: bool = False
    eps: float = 1e-6
    mask: SpacetimeMask = field(default_factory=SpacetimeMask.full)

    def __post_init__(self) -> None:
        if self.position.removeprefix("rope+") not in POSITIONS or self.position == "rope+rope":
            raise ValueError(f'position: {self.position!r}; it must be one of {POSITIONS}, or "rope+" and another')
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size: {self.patch_size}; it must be three positive sizes (t, h, w)")
        for name in ("dim", "depth", "heads", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; it must be positive")

    @staticmethod
    def of_size(size: str, *, in_channels: int, **options: object) -> "SoraDiTConfig":
        """DiT's S, B, L or XL, with any other field in `options`."""
        if size not in SIZES:
            raise ValueError(f"size: {size!r}; it must be one of {tuple(SIZES)}")
        depth, dim, heads = SIZES[size]
        return SoraDiTConfig(dim=dim, depth=depth, heads=heads, in_channels=in_channels, **options)


@dataclass(frozen=True)
class Schedules:
    """Who attends whom in all blocks of a model, over one batch: itself, and its text if it reads any."""

    own: TileSchedule
    text: TileSchedule | None = None


Tables = tuple[Tensor, ...]
Trunk = Callable[[Tensor, Tensor, "Prepared"], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Prepared(TensorBundle):
    """All of a forward pass that does not depend on the latents; see `SoraDiT.prepare`.

    modulations: the tables [M, C] of every block, then the final layer's two.
    shared: what the blocks share. position: what is added to the patches, if anything.
    texts: keys and values of the text for every block; None: each makes its own.
    """

    modulations: tuple[Tables, ...]
    shared: BlockContext
    position: Tensor | FactorisedPosition | None = None
    texts: tuple[KeysValues, ...] | None = None


class SoraDiT(nn.Module):
    """patch_embed → blocks → final layer → unpatchify; every task is the same forward pass.

    A call is `prepare`, all that the latents do not matter for, then `denoise`, the network itself. Who calls often
    with the same layout, text and labels keeps what the first gave, as the engine does.
    """

    def __init__(self, config: SoraDiTConfig) -> None:
        super().__init__()
        self.config = config
        rope = Rope3D(theta=config.rope_theta) if config.position.startswith("rope") else None
        self.x_embedder = PatchEmbed3D(config.dim, config.in_channels, config.patch_size)
        self.pos_embed = _position(config)
        self.t_embedder = TimestepEmbedder(config.dim)
        self.end_embedder = TimestepEmbedder(config.dim) if config.sigma_end else None
        self.y_embedder = _label_embedder(config)
        self.text_embedder = None if config.pooled_dim is None else nn.Linear(config.pooled_dim, config.dim)
        self.blocks = nn.ModuleList(
            DiTBlock(
                config.dim,
                config.heads,
                mlp=config.mlp,
                mlp_ratio=config.mlp_ratio,
                qk_norm=config.qk_norm,
                rope=rope,
                context_dim=config.text_dim,
                eps=config.eps,
            )
            for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(
            config.dim, config.in_channels, config.patch_size, multiple=2 if config.learned_sigma else 1
        )
        self.apply(_init)
        _init_embedders(self)
        _init_position_bias(self)

    def forward(
        self,
        latents: RaggedLatents,
        layout: PackedLayout,
        conditioning: Conditioning,
        text: PackedText | None = None,
        labels: Tensor | None = None,
        *,
        schedules: Schedules | None = None,
    ) -> RaggedLatents:
        """Predict the path's target for every video.

        latents: S videos (in_channels, T, H, W) at the noise levels of `conditioning`; layout: their token grids,
        ceil(T/pt), ceil(H/ph), ceil(W/pw); text: packed text of the same S segments; labels: [S] int.
        Latents and text of any floating dtype: the model computes in its own, that of its weights or autocast's.
        schedules: what `schedules_for` gave for this layout and text; None makes them anew, in every call.
        Returns videos of the same sizes, in that dtype, with in_channels channels, twice as many with `learned_sigma`.
        """
        return self.denoise(latents, self.prepare(layout, conditioning, text, labels, schedules=schedules))

    def prepare(
        self,
        layout: PackedLayout,
        conditioning: Conditioning,
        text: PackedText | None = None,
        labels: Tensor | None = None,
        *,
        schedules: Schedules | None = None,
    ) -> Prepared:
        """The first half of `forward`; its arguments."""
        _check_inputs(self.config, layout, text, labels)
        text = self._own(text)
        modulations = self.modulations(
            conditioning.sigma, conditioning.segment, text, labels, sigma_end=conditioning.sigma_end
        )
        schedules = schedules or self.schedules_for(layout, None if text is None else text.layout)
        position = None if self.pos_embed is None else self.pos_embed(layout)
        return Prepared(modulations, self._shared(layout, conditioning, text, schedules), position)

    def denoise(self, latents: RaggedLatents, prepared: Prepared, *, trunk: Trunk | None = None) -> RaggedLatents:
        """The second half of `forward`: the network, from the latents to the prediction.

        trunk: in place of `self.trunk`, for what changes how the blocks are run.
        """
        shared = prepared.shared
        x = self.x_embedder(self._own_latents(latents), shared.layout, prepared.position)
        h = adaln(x, *prepared.modulations[0][:2], shared.rows, eps=self.config.eps)
        x, h = (trunk or self.trunk)(x, h, prepared)
        return self.final_layer(h, shared.layout, latents)

    def trunk(self, x: Tensor, h: Tensor, prepared: Prepared, blocks: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """All blocks, or some that follow each other: the pair (x, h) that `DiTBlock` takes, to that behind them."""
        texts = prepared.texts or [None] * len(self.blocks)
        layers = zip(self.blocks, prepared.modulations, prepared.modulations[1:], texts, strict=False)
        for block, modulation, following, text in list(layers)[blocks]:
            x, h = block(x, h, modulation, following[:2], prepared.shared, text)
        return x, h

    def modulations(
        self,
        sigma: Tensor,
        segment: Tensor,
        text: PackedText | None,
        labels: Tensor | None,
        *,
        sigma_end: Tensor | None = None,
    ) -> tuple[Tables, ...]:
        """The tables of every block, then the final layer's, for rows of noise level sigma [M] and segment [M]: those
        of any number of forward passes one after the other, in one product a layer. sigma_end: [M], of a flow map."""
        condition = self._condition(sigma, segment, self._own(text), labels)
        if sigma_end is not None and self.end_embedder is None:
            raise ValueError("sigma_end: given, but the model was built without; it leads to no level of choice")
        if self.end_embedder is not None:
            # The way to go, not its end: where the teacher is the target, it is none at all levels.
            way = torch.zeros_like(sigma) if sigma_end is None else sigma - sigma_end
            condition = condition + self.end_embedder(way * 1000)
        return tuple(layer.adaLN_modulation(condition) for layer in (*self.blocks, self.final_layer))

    def read(self, text: PackedText) -> tuple[KeysValues, ...]:
        """`Prepared.texts`: keys and values of the text for every block. For a model with `text_dim`."""
        tokens = self._own(text).tokens
        return tuple(block.cross.keys_values(tokens) for block in self.blocks)

    def schedules_for(self, layout: PackedLayout, text_layout: PackedLayout | None = None) -> Schedules:
        """What `forward` takes as `schedules`, for every call with these layouts: as in all steps of a sampler."""
        own = TileSchedule.build(layout, self.config.mask)
        if self.config.text_dim is None or text_layout is None:
            return Schedules(own)
        return Schedules(own, TileSchedule.build(layout, kv_layout=text_layout))

    def _own(self, text: PackedText | None) -> PackedText | None:
        """In the weights' dtype; under autocast as it is, since there each layer casts for itself."""
        if text is None or autocast_dtype(text.tokens.device.type) is not None:
            return text
        dtype = self.x_embedder.proj.weight.dtype
        pooled = None if text.pooled is None else text.pooled.to(dtype)
        return replace(text, tokens=text.tokens.to(dtype), pooled=pooled)

    def _own_latents(self, latents: RaggedLatents) -> RaggedLatents:
        """Likewise."""
        if autocast_dtype(latents.flat.device.type) is not None:
            return latents
        return latents.with_flat(latents.flat.to(self.x_embedder.proj.weight.dtype))

    def _condition(self, sigma: Tensor, segment: Tensor, text: PackedText | None, labels: Tensor | None) -> Tensor:
        timestep = sigma * 1000
        if self.config.discrete_time:
            timestep = timestep.round() - 1
        condition = self.t_embedder(timestep)
        segment = segment.clamp(min=0).long()
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(labels)[segment]
        if self.text_embedder is not None:
            condition = condition + self.text_embedder(text.pooled)[segment]
        return condition

    def _shared(
        self, layout: PackedLayout, conditioning: Conditioning, text: PackedText | None, schedules: Schedules
    ) -> BlockContext:
        if self.config.text_dim is None:
            return BlockContext(layout, schedules.own, conditioning.rows)
        return BlockContext(layout, schedules.own, conditioning.rows, text.tokens, text.layout, schedules.text)


def _position(config: SoraDiTConfig) -> nn.Module | None:
    modules = {
        "factorised": FactorisedTables,
        "fractional": FractionalPosition,
        "sincos": SinCosPosition,
        "sincos3d": partial(SpacetimeSinCosPosition, theta=config.rope_theta),
    }
    added = config.position.removeprefix("rope+")
    return None if added == "rope" else modules[added](config.dim)


def _label_embedder(config: SoraDiTConfig) -> LabelEmbedder | None:
    if config.num_classes is None:
        return None
    return LabelEmbedder(config.dim, config.num_classes, null_class=config.null_class)


def _init(module: nn.Module) -> None:
    # Zero-initialised layers (modulation, final Linear) are exactly zero and stay so. On the meta device, where a model
    # waits for its weights, nothing has a value.
    if isinstance(module, nn.Linear) and not module.weight.is_meta and module.weight.count_nonzero():
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _init_embedders(model: SoraDiT) -> None:
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)
    if model.end_embedder is not None:
        nn.init.normal_(model.end_embedder.mlp[0].weight, std=0.02)
        nn.init.zeros_(model.end_embedder.mlp[2].weight)
    if model.y_embedder is not None:
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)


@torch.no_grad()
def _init_position_bias(model: SoraDiT) -> None:
    for block in model.blocks:
        q, k, _ = block.attn.qkv.bias.chunk(3)
        k.copy_(q.normal_(std=model.config.position_bias))


def _check_inputs(config: SoraDiTConfig, layout: PackedLayout, text: PackedText | None, labels: Tensor | None) -> None:
    wants_text = config.text_dim is not None or config.pooled_dim is not None
    if wants_text and text is None:
        raise ValueError("text: None, but the model was built with text_dim or pooled_dim; pass a PackedText")
    if config.pooled_dim is not None and text.pooled is None:
        raise ValueError("text: it has no pooled vector, but the model was built with pooled_dim")
    if wants_text and text.layout.max_segments != layout.max_segments:
        raise ValueError(
            f"text: {text.layout.max_segments} segments, but the layout has {layout.max_segments}; they must agree"
        )
    if config.num_classes is not None and labels is None:
        raise ValueError("labels: None, but the model was built with num_classes; pass one label a segment")
    if labels is not None and tuple(labels.shape) != (layout.max_segments,):
        raise ValueError(f"labels: shape {tuple(labels.shape)}; it must be [{layout.max_segments}], one a segment")
