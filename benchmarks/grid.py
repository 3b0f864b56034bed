"""What is measured beside peers: per op, models × packs × masks. Nothing is built before it is asked for.

The grid of a GPU has the most telling work first, since time may run out; that of a CPU is small enough for two cores.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks import cases
from benchmarks.cases import Case, Setting
from benchmarks.shapes import MASKS, MODELS, PACKS, Model

OPS = (
    "packed_attention",
    "gated_residual_adaln",
    "adaln",
    "qk_norm_rope",
    "patch_embed",
    "unpatchify",
    "gated_residual",
    "linear_unpatchify",
    "mlp_activation",
    "schedule",
    "segment_mean",
)
_OF_PATCHES = ("patch_embed", "unpatchify", "linear_unpatchify")
# What the ops make together; there are no tests and no kernels of their own to it.
WHOLES = ("dit_block",)


@dataclass(frozen=True)
class Plan:
    """A case to be. pack, mask: names in benchmarks/shapes.py; mask: of attention and schedules only. clean: the first
    frame of every video is given, which only what is modulated feels. order: "raster" in place of the tiled one, which
    only patches feel: their peers know no other."""

    op: str
    model: Model
    pack: str
    mask: str = ""
    clean: bool = False
    order: str = "tiled"

    @property
    def _parts(self) -> tuple[str, ...]:
        if self.op == "schedule":
            return (self.mask,)
        if self.op in ("packed_attention", "qk_norm_rope"):
            return tuple(filter(None, (self.mask, f"D{self.model.head_dim}×{self.model.heads}")))
        special = (["clean first frames"] if self.clean else []) + ([self.order] if self.order != "tiled" else [])
        return (f"C{self.model.width}", *special)

    @property
    def label(self) -> str:
        return ", ".join((*self._parts, self.pack))

    @property
    def series(self) -> str:
        """Shared by plans that differ in their number of tokens alone."""
        return ", ".join((*self._parts, self.pack.split(" ")[-1]))

    @property
    def tokens(self) -> int:
        return PACKS[self.pack].tokens

    def build(self, device: torch.device) -> Case:
        """In bf16 on a GPU and fp32 on a CPU."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, grids = self.model, PACKS[self.pack].grids
        setting = Setting(device, dtype, grids, (model.width,), (model.head_dim,), model.heads, self.clean, self.order)
        torch.manual_seed(0)
        return replace(self._case(setting), label=self.label)

    def _case(self, setting: Setting) -> Case:
        if self.op == "packed_attention":
            return cases.self_attention(setting, self.model.head_dim, self.mask, MASKS[self.mask])
        if self.op == "dit_block":
            return cases.dit_block_case(setting)
        if self.op == "schedule":
            return cases.schedule_case(setting, self.mask, MASKS[self.mask])
        families = {
            "qk_norm_rope": cases.qk_norm_rope_cases,
            "patch_embed": cases.patch_cases,
            "unpatchify": cases.patch_cases,
            "segment_mean": cases.segment_mean_cases,
            "linear_unpatchify": cases.final_layer_cases,
            "mlp_activation": cases.mlp_activation_cases,
        }
        family = families.get(self.op, cases.modulation_cases)
        return next(case for case in family(setting) if case.op.__name__ == self.op)


def plans(op: str, *, on_gpu: bool) -> list[Plan]:
    """Every plan of `op`, the most telling first."""
    found = (_on_gpu if on_gpu else _on_cpu)(op)
    return list(dict.fromkeys(found))


def headline() -> Iterator[Plan]:
    """What a GPU is asked first of all: a round over the ops, with the work that the project is judged by."""
    wide, narrow = MODELS["5B"], MODELS["DiT-XL"]
    for pack, mask in (
        ("32k ragged", "full"),
        ("32k uniform", "full"),
        ("32k ragged", "frame_causal"),
        ("115k video", "window"),
        ("115k video", "window strided"),
    ):
        yield Plan("packed_attention", _heads(128), pack, mask)
    yield from (Plan("gated_residual_adaln", MODELS[name], "32k ragged") for name in ("DiT-XL", "1.3B", "5B", "14B"))
    yield Plan("gated_residual_adaln", wide, "32k ragged", clean=True)
    yield Plan("qk_norm_rope", wide, "32k ragged")
    yield Plan("dit_block", narrow, "32k ragged")
    yield Plan("schedule", wide, "32k ragged", "small window")
    yield Plan("packed_attention", narrow, "32k ragged", "full")
    yield Plan("packed_attention", _heads(64), "32k ragged", "full")
    yield Plan("packed_attention", _heads(128), "115k video", "full")
    yield from (
        Plan(op, wide, "32k ragged")
        for op in ("adaln", "patch_embed", "mlp_activation", "unpatchify", "gated_residual")
    )
    yield from (Plan("packed_attention", _heads(128), "32k ragged", mask) for mask in ("spatial", "temporal"))


def _heads(head_dim: int) -> Model:
    """16 heads: what decides is the head dim, and more heads are more of the same."""
    return Model(16 * head_dim, 16)


def _on_gpu(op: str) -> Iterator[Plan]:
    yield from (plan for plan in headline() if plan.op == op)
    if op == "schedule":
        for pack in ("32k ragged", "8k ragged", "128k ragged"):
            yield from (Plan(op, MODELS["5B"], pack, mask) for mask in ("small window", "full", "frame_causal"))
        yield Plan(op, MODELS["5B"], "115k video", "window")
        return
    if op != "packed_attention":
        for size in ("32k", "8k", "128k"):
            yield from (Plan(op, model, f"{size} ragged") for model in MODELS.values())
        return
    for size in ("32k", "8k", "128k"):
        for head_dim in (128, 72, 64):
            for kind in ("ragged", "uniform"):
                for mask in ("full", "frame_causal", "spatial", "temporal"):
                    yield Plan(op, _heads(head_dim), f"{size} {kind}", mask)
    for head_dim in (128, 72, 64):
        yield from (Plan(op, _heads(head_dim), "115k video", mask) for mask in ("full", "window", "window strided"))


def _on_cpu(op: str) -> Iterator[Plan]:
    small = MODELS["DiT-S"]
    if op == "schedule":
        yield from (Plan(op, small, "8k ragged", mask) for mask in ("full", "frame_causal", "small window"))
    elif op == "packed_attention":
        yield from (Plan(op, small, pack, "full") for pack in ("2k ragged", "2k uniform", "8k ragged"))
        for mask in ("frame_causal", "spatial", "temporal", "small window"):
            yield Plan(op, small, "2k ragged", mask)
    else:
        yield from (Plan(op, small, pack) for pack in ("2k ragged", "8k ragged"))
        yield Plan(op, MODELS["DiT-XL"], "2k ragged")
        if op in _OF_PATCHES:
            yield from (Plan(op, small, pack, order="raster") for pack in ("2k ragged", "8k ragged"))
            yield Plan(op, MODELS["DiT-XL"], "2k ragged", order="raster")
        if op == "gated_residual_adaln":
            yield Plan(op, MODELS["DiT-XL"], "2k ragged", clean=True)
