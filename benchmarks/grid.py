"""What is measured beside peers: per op, models × packs × masks. Nothing is built before it is asked for.

The grid of a GPU has the most telling work first, since time may run out; that of a CPU is small enough for two cores.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

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
# Of the ops that may be given less or more than DiT gives them: the first words of the labels in benchmarks/cases.py.
FORMS: Mapping[str, tuple[str, ...]] = {
    "adaln": ("no shift", "norm alone", "pair"),
    "gated_residual": ("no gate", "rms branch"),
    "gated_residual_adaln": ("no gate",),
    "mlp_activation": ("gelu_erf", "swiglu,second"),
    "unpatchify": ("cthw", "hwtc"),
}
# What the ops make together; there are no tests and no kernels of their own to it.
WHOLES = ("dit_block",)


@dataclass(frozen=True)
class Plan:
    """A case to be. pack, mask: names in benchmarks/shapes.py; mask: of attention and schedules only. clean: the first
    frame of every video is given, which only what is modulated feels. order: "raster" in place of the tiled one, which
    only patches feel: their peers know no other. form: what the label of the case in benchmarks/cases.py begins with,
    of an op that is given other arguments than usual."""

    op: str
    model: Model
    pack: str
    mask: str = ""
    clean: bool = False
    order: str = "tiled"
    form: str = ""

    @property
    def _parts(self) -> tuple[str, ...]:
        if self.op == "schedule":
            return (self.mask,)
        if self.op in ("packed_attention", "qk_norm_rope"):
            return tuple(filter(None, (self.mask, f"D{self.model.head_dim}×{self.model.heads}")))
        special = (["clean first frames"] if self.clean else []) + ([self.order] if self.order != "tiled" else [])
        special += [self.form] if self.form else []
        return (f"C{self.model.width}", *special)

    @property
    def label(self) -> str:
        return ", ".join((*self._parts, self.pack))

    @property
    def name(self) -> str:
        return f"{self.op}[{self.label}]"

    @property
    def series(self) -> str:
        """Shared by plans that differ in their number of tokens alone."""
        return ", ".join((*self._parts, self.pack.split(" ")[-1]))

    @property
    def tokens(self) -> int:
        return PACKS[self.pack].tokens

    def build(self, device: torch.device, dtype: torch.dtype | None = None) -> Case:
        """dtype: None: bf16 on a GPU and fp32 on a CPU."""
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
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
        named = (case for case in family(setting) if case.op.__name__ == self.op)
        return next(case for case in named if case.label.startswith(self.form))


def rounds(ops: Sequence[str]) -> list[Plan]:
    """Everything of `ops` on a GPU, the headline first, then round by round over them: time may run out."""
    lists = zip_longest(*(plans(op, on_gpu=True) for op in ops))
    first = [plan for plan in headline() if plan.op in ops]
    return list(dict.fromkeys([*first, *(plan for plans in lists for plan in plans if plan)]))


def plans(op: str, *, on_gpu: bool) -> list[Plan]:
    """Every plan of `op`, the most telling first."""
    found = (_on_gpu if on_gpu else _on_cpu)(op)
    return list(dict.fromkeys(found))


# What the suite's clock is for: entrants of these plans alone, by op. FlexAttention takes part once, in a mask that the
# others do not have.
HEADLINERS: Mapping[str, tuple[str, ...]] = {
    "packed_attention": ("cuda", "triton", "SDPA flash", "SDPA cuDNN", "varlen"),
    "dit_block": ("triton", "compiled"),
}
_OF_OTHER_OPS = ("triton", "compiled")
_WITH_FLEX = Plan("packed_attention", Model(16 * 128, 16), "32k ragged", "frame_causal")


def headliners(plan: Plan) -> tuple[str, ...]:
    """Who is timed in a plan of the headline."""
    if plan == _WITH_FLEX:
        return ("triton", "FlexAttention")
    return HEADLINERS.get(plan.op, _OF_OTHER_OPS)


def headline() -> list[Plan]:
    """What a GPU is asked first of all: the work that the project is judged by."""
    wide, narrow = MODELS["5B"], MODELS["DiT-XL"]
    attention = [Plan("packed_attention", _heads(head_dim), "32k ragged", "full") for head_dim in (128, 64, 72)]
    modulation = [Plan(op, wide, "32k ragged") for op in ("gated_residual_adaln", "adaln", "gated_residual")]
    return [
        *attention,
        *modulation,
        Plan("qk_norm_rope", wide, "32k ragged"),
        Plan("dit_block", narrow, "32k ragged"),
        _WITH_FLEX,
        Plan("packed_attention", _heads(128), "8k ragged", "full"),
        Plan("gated_residual_adaln", wide, "8k ragged"),
    ]


def tiny() -> list[Plan]:
    """In its place for a dry walk, interpreted in seconds: it shows that everything runs, and its times say nothing."""
    model = Model(64, 1)
    return [Plan("packed_attention", model, "tiny", "frame_causal"), Plan("gated_residual_adaln", model, "tiny")]


def _heads(head_dim: int) -> Model:
    """16 heads: what decides is the head dim, and more heads are more of the same."""
    return Model(16 * head_dim, 16)


def _on_gpu(op: str) -> Iterator[Plan]:
    yield from (plan for plan in headline() if plan.op == op)
    if op == "gated_residual_adaln":
        yield Plan(op, MODELS["5B"], "32k ragged", clean=True)
    if op == "schedule":
        yield Plan(op, MODELS["5B"], "32k ragged", "small window")
        for pack in ("32k ragged", "8k ragged", "128k ragged"):
            yield from (Plan(op, MODELS["5B"], pack, mask) for mask in ("small window", "full", "frame_causal"))
        yield Plan(op, MODELS["5B"], "115k video", "window")
        return
    if op != "packed_attention":
        for size in ("32k", "8k", "128k"):
            yield from (Plan(op, model, f"{size} ragged") for model in MODELS.values())
            yield from (Plan(op, MODELS["5B"], f"{size} ragged", form=form) for form in FORMS.get(op, ()))
        return
    yield Plan(op, _heads(128), "32k uniform", "full")
    yield from (Plan(op, _heads(128), "115k video", mask) for mask in ("window", "window strided", "full"))
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
        yield from (Plan(op, MODELS["DiT-XL"], "2k ragged", form=form) for form in FORMS.get(op, ()))
        if op in _OF_PATCHES:
            yield from (Plan(op, small, pack, order="raster") for pack in ("2k ragged", "8k ragged"))
            yield Plan(op, MODELS["DiT-XL"], "2k ragged", order="raster")
        if op == "gated_residual_adaln":
            yield Plan(op, MODELS["DiT-XL"], "2k ragged", clean=True)
