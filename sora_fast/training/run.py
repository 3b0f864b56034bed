"""A run: everything that is needed to train a model, continue it, or sample from it, in one folder.

RUN/config.json       RunConfig
RUN/log.jsonl         one line a step
RUN/checkpoints/…     see checkpoint.py
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import nn

from sora_fast.diffusion.paths import DDPM, SPACINGS, RectifiedFlow
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.models.codecs import Codec
from sora_fast.models.text import ByteTextEncoder, TransformersTextEncoder
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.training.codec import CodecConfig
from sora_fast.training.compiling import SCOPES
from sora_fast.training.config import read_config, write_config
from sora_fast.training.data.batches import BatchConfig, Prompts
from sora_fast.training.data.sources import DataConfig
from sora_fast.training.precision import PRECISIONS
from sora_fast.training.recompute import HOW

log = logging.getLogger(__name__)

CONFIG, LOG, CHECKPOINTS = "config.json", "log.jsonl", "checkpoints"


@dataclass(frozen=True)
class TextConfig:
    """The text encoder: a frozen CLIP or T5 from `folder`, or a small one of bytes that is trained along.

    dim, layers, max_bytes: of the byte encoder.
    fingerprint: of what is in the folder; None: not known yet. A run's config.json always has it.
    """

    folder: str | None = None
    dim: int = 128
    layers: int = 3
    max_bytes: int = 255
    fingerprint: str | None = None

    @property
    def width(self) -> int:
        """Width of its tokens and pooled vectors."""
        return self.dim if self.folder is None else TransformersTextEncoder.width(self.folder)

    def located(self) -> "TextConfig":
        """With an absolute folder and its fingerprint. ValueError if it is not there, or holds another encoder."""
        if self.folder is None:
            return self
        folder = Path(self.folder).resolve()
        if not folder.is_dir():
            raise ValueError(
                f"text.folder: {folder} is not there; if the text encoder is elsewhere now, say where "
                "(--text-encoder FOLDER)"
            )
        found = TransformersTextEncoder.fingerprint(folder)
        if self.fingerprint not in (None, found):
            raise ValueError(
                f"text.folder: {folder} holds another text encoder ({found}) than the one that the run was begun with "
                f"({self.fingerprint}); say where that is now (--text-encoder FOLDER)"
            )
        return replace(self, folder=str(folder), fingerprint=found)

    def build(self) -> ByteTextEncoder | TransformersTextEncoder:
        """ValueError if the folder does not hold what it should."""
        if self.folder is not None:
            return TransformersTextEncoder(self.located().folder)
        return ByteTextEncoder(self.dim, layers=self.layers, max_bytes=self.max_bytes)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Exactly one of `steps` and `minutes` limits the run.

    minutes: wall-clock time, compilation included; the learning rate decays with it. Such a run can be resumed, but
        only one that is limited by steps gives the same bits again.
    optimizer: "adamw", or "muon" for the blocks' matrices, at `muon_ratio` times `lr`, and AdamW for the rest.
    warmup: steps. decay: "cosine", "linear" or "constant".
    clean_share: of the clips have their first frames, last frames or both given clean, which is what image-to-video,
        extension and joining need.
    precision: "float32", or "bfloat16" (autocast).
    compile: the backend of torch.compile, which compiles once for the whole run; None: eager.
    compile_scope: of what, "blocks", or "model", with the text encoder and the loss (see compiling.py).
    graph: launch a step as one CUDA graph, from the third on: of one worker, on a GPU; not of a distillation, whose
        steps are not alike.
    recompute: None, "block" or "selective" (see recompute.py): less memory for more time.
    accumulate: packs a step, of each worker; the gradient is that of the mean over all their pixels.
    nonfinite_limit: steps in a row whose loss or gradient is not finite, and which are left out, before the run stops.
    save_every, log_every: steps. keep: checkpoints.
    workers: processes that make batches; 0: a thread. Changes no bit.
    """

    steps: int | None = None
    minutes: float | None = None
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: str = "adamw"
    lr: float = 1e-3
    muon_ratio: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int = 100
    decay: str = "cosine"
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    clean_share: float = 0.5
    precision: str = "float32"
    compile: str | None = "inductor"
    compile_scope: str = "blocks"
    graph: bool = False
    recompute: str | None = None
    accumulate: int = 1
    nonfinite_limit: int = 3
    seed: int = 0
    save_every: int = 500
    log_every: int = 10
    keep: int = 2
    workers: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"steps, minutes: {self.steps}, {self.minutes}; exactly one must be given")
        positive = ("steps", "minutes", "lr", "muon_ratio", "clip_norm", "save_every", "log_every", "keep")
        for name in (*positive, "accumulate", "nonfinite_limit"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: {value}; it must be positive")
        if self.workers < 0:
            raise ValueError(f"workers: {self.workers}; it must be 0 or more")
        choices = {"precision": PRECISIONS, "compile_scope": SCOPES, "recompute": (None, *HOW)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r}; it must be one of {', '.join(map(str, allowed))}")


@dataclass(frozen=True)
class Distilled:
    """How a run's model became a flow map, and how it is sampled; see distill.py.

    steps: of the sampler, where no others are asked for. guidance: of the teacher, which is part of the model now;
    guidance_given: likewise, where frames are given. spacing: of the levels that it was taught, see
    `RectifiedFlow.sigmas`; runs of before have none to say.
    """

    steps: int = 4
    guidance: float = 3.0
    guidance_given: float = 3.0
    spacing: str = "trailing"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps}; it must be at least 1")
        if self.spacing not in SPACINGS:
            raise ValueError(f"spacing: {self.spacing!r}; it must be one of {', '.join(SPACINGS)}")

    @property
    def teacher_steps(self) -> int:
        """Of the trajectories that are learned from: a multiple of `steps`, twice as many at least, and 8."""
        return self.steps * max(2, math.ceil(8 / self.steps))


@dataclass(frozen=True)
class RunConfig:
    """What `config.json` in a run's folder holds.

    text: None for a model without prompts. data: the folder that is trained on; None: a source made in Python.
    fps: frames per second that samples are written at. data_fps: those of the videos trained on; None: only stills, or
        not known.
    distilled: of a run whose model is a flow map; None: it is none.
    codec: what makes latents of videos; runs of before there was a choice had none but the pixels.
    """

    model: SoraDiTConfig
    train: TrainConfig
    text: TextConfig | None = None
    path: RectifiedFlow | DDPM = field(default_factory=RectifiedFlow)
    data: DataConfig | None = None
    fps: float = 8.0
    data_fps: float | None = None
    distilled: Distilled | None = None
    codec: CodecConfig = field(default_factory=CodecConfig)

    # What a run keeps: its checkpoints fit nothing else.
    FIXED: ClassVar = ("model", "text", "path", "data", "distilled", "codec")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """That the ops compute in, the main one first."""
        half = self.train.precision == "bfloat16"
        return (torch.bfloat16, torch.float32) if half else (torch.float32,)

    def located(self) -> "RunConfig":
        """With folders that are found from anywhere. ValueError if they do not hold what they did."""
        text = None if self.text is None else self.text.located()
        return replace(self, text=text, data=located(self.data), codec=self.codec.located())

    def anywhere(self) -> "RunConfig":
        """Without what its folders may differ in."""
        data, text = self.data, self.text
        if data is not None:
            data = replace(data, folder="")
        if text is not None and text.folder is not None:
            text = replace(text, folder="", fingerprint=None)
        return replace(self, data=data, text=text, codec=self.codec.anywhere())

    def check_folders(self, before: "RunConfig") -> None:
        """ValueError if they do not hold what those of a run were made with."""
        if before.text is not None and before.text.fingerprint is not None:
            replace(self.text, fingerprint=before.text.fingerprint).located()
        replace(self.codec, fingerprint=before.codec.fingerprint).located()

    @property
    def video_channels(self) -> int:
        """Of what is trained on, and made."""
        return self.build_codec().spec.pixel_channels if self.data is None else self.data.channels

    def build_codec(self) -> Codec:
        """ValueError if it is not what it was when the run was begun, or not of this model."""
        return self.codec.build(self.model.in_channels, self.model.patch_size)

    def __post_init__(self) -> None:
        ddpm = isinstance(self.path, DDPM)
        if self.model.discrete_time != ddpm:
            raise ValueError(f"model.discrete_time: {self.model.discrete_time}; it must be {ddpm} with this path")
        if self.model.learned_sigma != self.path.learned_variance:
            raise ValueError(
                f"model.learned_sigma: {self.model.learned_sigma}; it must be {self.path.learned_variance}, as "
                "path.learned_variance"
            )
        if self.model.sigma_end != (self.distilled is not None):
            raise ValueError(f"model.sigma_end: {self.model.sigma_end}; it must be True where `distilled` is given")
        if self.distilled is not None and ddpm:
            raise ValueError("distilled: a flow map needs a rectified flow, and the path is DDPM's")


# A RunConfig, or that of a run of another kind (see vae.py), which has all that is asked of it here.
AnyConfig = TypeVar("AnyConfig")


class Networks(nn.Module):
    """The model and its text encoder as one module, with the codec and the noise path that belong to them.

    Born in float32 on the CPU, whatever the process's defaults are.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        self.path = config.path
        self.codec = config.build_codec()
        with _plain_defaults():
            self.text = None if config.text is None else config.text.build()
            self.model = SoraDiT(config.model)

    @property
    def patch_size(self) -> tuple[int, int, int]:
        return self.config.model.patch_size

    def forward(
        self,
        latents: RaggedLatents,
        layout: PackedLayout,
        conditioning: Conditioning,
        prompts: Prompts | None = None,
    ) -> RaggedLatents:
        """SoraDiT's forward pass, with the prompts of the same S segments."""
        text = None if self.text is None else self.text(prompts.ids, prompts.layout)
        return self.model(latents, layout, conditioning, text=text)

    def no_prompts(self, batch: BatchConfig) -> Prompts | None:
        """What stands for the prompts of a batch that has none: S texts of no tokens, of the sizes of all others, so
        that a compiled step is the same. None if no text is read."""
        if self.text is None:
            return None
        sizes = {"capacity": batch.text_capacity, "max_segments": batch.max_segments}
        ids, layout = self.text.tokenize([], **sizes)
        device = next(self.parameters()).device
        return Prompts(ids, layout).to(device)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name: what a checkpoint holds."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def _plain_defaults() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def check_new(folder: Path) -> None:
    """ValueError if there is a run in a folder already."""
    if (folder / CONFIG).exists():
        raise ValueError(f"{folder} already holds a run; resume it, or choose another folder")


def create_run(folder: Path, config: AnyConfig) -> None:
    """Make a run's folder. ValueError if there is a run in it already."""
    check_new(folder)
    config = config.located()
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder / CONFIG, config)


def update_run(folder: Path, config: AnyConfig) -> None:
    """Let a changed configuration take the place of a run's; see `check_resumable`."""
    write_config(folder / CONFIG, config.located())


def located(data: DataConfig | None) -> DataConfig | None:
    """With a folder that is found from anywhere."""
    return data and replace(data, folder=str(Path(data.folder).resolve()))


def moved(
    config: RunConfig,
    *,
    data: Path | str | None = None,
    text_encoder: Path | str | None = None,
    codec: Path | str | None = None,
) -> RunConfig:
    """The configuration of a run whose folders are elsewhere now. ValueError if it never had such a folder.

    What they hold is compared where it is read: data in `Batches.load_state_dict`, the encoder in `TextConfig.build`.
    """
    if data is not None:
        if config.data is None:
            raise ValueError(f"data: {data}; the run was trained on a source made in Python, not on a folder")
        config = replace(config, data=replace(config.data, folder=str(data)))
    if text_encoder is not None:
        if config.text is None or config.text.folder is None:
            raise ValueError(f"text_encoder: {text_encoder}; the run has no text encoder from a folder")
        if config.text.fingerprint is None:
            log.warning("whether %s is the text encoder that the run was begun with was not recorded", text_encoder)
        config = replace(config, text=replace(config.text, folder=str(text_encoder)))
    if codec is not None:
        if config.codec.folder is None:
            raise ValueError(f"codec: {codec}; the run is one of pixels, and has no codec from a folder")
        config = replace(config, codec=replace(config.codec, folder=str(codec)))
    return config


def check_resumable(folder: Path, config: AnyConfig) -> None:
    """ValueError if the run in a folder cannot go on with `config`: only how it is trained may change, and not all.

    Its folders may be elsewhere now, if they hold the same (see `moved`).
    """
    before = read_run(folder, type(config))
    now, then = config.anywhere(), before.anywhere()
    changed = [name for name in config.FIXED if getattr(now, name) != getattr(then, name)]
    changed += [
        name for name in ("batch", "optimizer", "seed") if getattr(config.train, name) != getattr(before.train, name)
    ]
    if changed:
        raise ValueError(f"{', '.join(changed)}: changed since {folder} was begun; its checkpoints do not fit")
    config.check_folders(before)


def read_run(folder: Path, kind: type[AnyConfig] = RunConfig) -> AnyConfig:
    """The configuration of a run. ValueError if the folder holds none, or one of another kind."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no run: there is no {CONFIG} in it")
    return read_config(folder / CONFIG, kind)
