"""DiT (Peebles & Xie 2023, arXiv:2212.09748): its checkpoints, read into a SoraDiT and written back, and its call.

The names of the weights are the same on both sides. Only two entries differ: the patch embedding's kernel, which has
four dimensions in a checkpoint, and the fixed positions, which a checkpoint keeps for one square grid.
"""

import argparse
import math
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sora_fast.diffusion import DDPM, Ancestral, Guided
from sora_fast.diffusion.noise import Generators
from sora_fast.diffusion.sampling import sample as run_sampler
from sora_fast.diffusion.scheduled import scheduled
from sora_fast.files import is_text, read_tensors, replacing
from sora_fast.masks import SpacetimeMask
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.models.sora_dit import SIZES
from sora_fast.nn.positions import SinCosPosition
from sora_fast.ops._checks import may_read
from sora_fast.ops.patch_embed import FactorisedPosition
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.packing.layout import token_grid

_KERNEL, _POSITIONS, _OUTPUT = "x_embedder.proj.weight", "pos_embed", "final_layer.linear.weight"
_LABELS = "y_embedder.embedding_table.weight"
_TIMESTEPS = 1000
_IMAGENET = 1000  # classes; a table of so many rows was trained without label dropout, and has no row for "no class"
# Names that torch.compile, data parallelism, FSDP and checkpointing put into those of the weights, in any order.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# A file of another kind has hundreds of wrong entries; the first ones tell.
_MOST_NAMED = 8

# What makes a SoraDiT a DiT, beside square patches of one frame and class labels.
_DIT = {
    "qk_norm": False,
    "position": "sincos",
    "discrete_time": True,
    "mlp": "gelu",
    "mlp_ratio": 4.0,
    "text_dim": None,
    "pooled_dim": None,
    "mask": SpacetimeMask.full(),
}

State = dict[str, Tensor]


def config(
    size: str,
    patch: int,
    *,
    in_channels: int = 4,
    num_classes: int = 1000,
    null_class: bool = True,
    learned_sigma: bool = True,
) -> SoraDiTConfig:
    """The configuration that makes SoraDiT a DiT: `config("XL", 2)` is DiT-XL/2 as published."""
    return SoraDiTConfig.of_size(
        size,
        in_channels=in_channels,
        patch_size=(1, patch, patch),
        num_classes=num_classes,
        null_class=null_class,
        learned_sigma=learned_sigma,
        **_DIT,
    )


def load(path: Path | str, *, num_classes: int | None = None) -> SoraDiT:
    """Read a DiT of any published size (S, B, L, XL), patch size and number of channels and classes; on the CPU.

    path: `.safetensors`, or a file of torch.save, of which tensors and plain values are read and nothing is executed.
        It holds the weights, or a dictionary that has them as "ema" (taken first) or "model". What torch.compile or
        data parallelism wrote before or into their names ("_orig_mod.", "module.") is left out.
    num_classes: classes that it was trained on. The table has one row more, for "no class", or it has not: then it was
        trained without label dropout, and `sample` has no guidance. None: as the file's own command line says; without
        one, 1000 rows are ImageNet's classes alone, and in any other number the last row is "no class".
    The model has the dtype of the checkpoint. Its positions are those of every image's own grid; the checkpoint's are
    checked against them and kept, so that `save` gives back the same bits.
    Raises ValueError with the names of the entries that are missing, unknown, or not of the right shape or dtype, or
    with the path of a file that cannot be read.
    """
    content = _read(Path(path))
    state = _weights(content, Path(path))
    dit = _inferred(state, num_classes, told=getattr(content.get("args"), "num_classes", None))
    with torch.device("meta"):
        model = SoraDiT(dit)
    _check_entries(state, _shapes(model, grid=max(1, math.isqrt(state[_POSITIONS].shape[1]))))
    model.pos_embed = _CheckpointPosition(dit.dim, state.pop(_POSITIONS))
    # Copies, since what was read may be a mapped file, which can change; one at a time, since they are large.
    weights = {name: state.pop(name).clone() for name in list(state)}
    weights[_KERNEL] = weights[_KERNEL].flatten(1)
    model.load_state_dict(weights, assign=True)
    return model


def save(model: SoraDiT, path: Path | str, *, grid: int | None = None) -> None:
    """Write the weights of `model` as a DiT checkpoint; the file appears whole or not at all.

    model: as `load` gave it, or any SoraDiT made from `config`. path: `.safetensors`, or `.pt` or `.pth`.
    grid: side of the square token grid whose fixed positions the file holds (image side / patch); None: those that the
        file had which the model was loaded from.
    """
    path = Path(path)
    if path.suffix.lower() not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"path: {path} ends in {path.suffix!r}; it must end in .safetensors, .pt or .pth")
    _check_is_dit(model.config)
    shape = (model.config.depth, model.config.dim, model.config.heads)
    if shape not in SIZES.values():
        raise ValueError(f"model: depth, width and heads are {shape}; they must be those of one of {SIZES}")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _, side, _ = model.config.patch_size
    state[_KERNEL] = state[_KERNEL].unflatten(1, (-1, side, side))
    state[_POSITIONS] = _positions_to_save(model, grid).cpu().contiguous()
    with replacing(path) as partial:
        (save_file if path.suffix.lower() == ".safetensors" else torch.save)(state, partial)


def forward(model: SoraDiT, images: Sequence[Tensor], t: Tensor, labels: Tensor) -> list[Tensor]:
    """DiT's own call: what the model says about noisy images, each of any size, all packed into one sequence.

    images: S latents (C, 1, H, W) of any floating dtype; t: [S] raw timesteps, int, 0 … 999; labels: [S] int, 0 …
    num_classes - 1, or num_classes for "no class", if the model has that.
    Returns S tensors (C, 1, H, W), or (2C, 1, H, W) with a learned sigma: the noise, then the variance's share.
    Values of t and labels are checked on a CPU; elsewhere, where looking would wait, they are not.
    """
    _check_is_dit(model.config)
    latents, layout = _packed(model, images, labels)
    _check_integers("t", t, len(images), _TIMESTEPS - 1)
    output = model(latents, layout, Conditioning.per_segment((t + 1) / _TIMESTEPS, layout), labels=labels)
    return _unpacked(output, images)


def sample(
    model: SoraDiT,
    noise: Sequence[Tensor],
    labels: Tensor,
    *,
    steps: int = 250,
    guidance: float | Tensor = 1.0,
    channels: int | None = 3,
    generator: Generators = None,
) -> list[Tensor]:
    """DiT's own sampling: its chain of 1000 respaced to `steps`, with the variance that the model learned, if it did.

    noise: S standard normal latents (C, 1, H, W), to start from, float32 for the chain to be that too, whatever the
    model's dtype; labels: [S] int. Returns S latents of the same shapes and dtype.
    guidance: 1 is none, and all there is for a model without "no class"; one number, or a tensor [S]. channels:
    guidance applies to so many first channels of the noise, 3 in DiT's published samples; None, or more than there are:
    to all, and never to the variance. generator: of the noise on the way; one, or one an image, whose sample then does
    not depend on what is packed with it.
    """
    _check_is_dit(model.config)
    latents, layout = _packed(model, noise, labels)
    _check_guidance(guidance, channels, len(noise))
    _check_generator(generator, len(noise))
    if isinstance(guidance, Tensor) or guidance != 1:
        _check_null_class(model.config, guidance)
        null_labels = torch.full_like(labels, model.config.num_classes)
        most = model.config.in_channels
        guided = most if channels is None else min(channels, most)
        denoiser = Guided(model, layout, scale=guidance, labels=labels, null_labels=null_labels, channels=guided)
    else:
        denoiser = partial(scheduled(model, layout), labels=labels)
    made = run_sampler(
        denoiser,
        latents,
        layout,
        DDPM(steps=_TIMESTEPS, learned_variance=model.config.learned_sigma),
        Ancestral(),
        steps=steps,
        patch_size=model.config.patch_size,
        generator=generator,
    )
    return _unpacked(made, noise)


def _packed(model: SoraDiT, images: Sequence[Tensor], labels: Tensor) -> tuple[RaggedLatents, PackedLayout]:
    _check_images(images, model.config.in_channels)
    _check_integers("labels", labels, len(images), model.config.num_classes - (not model.config.null_class))
    latents = RaggedLatents.from_list(images)
    grids = [token_grid(image.shape, model.config.patch_size) for image in images]
    return latents, PackedLayout.from_grids(grids, device=latents.flat.device)


def _unpacked(output: RaggedLatents, images: Sequence[Tensor]) -> list[Tensor]:
    """One tensor an image, of its size; unlike `to_list`, this knows the shapes and waits for no device."""
    multiple = output.flat.shape[0] // sum(image.numel() for image in images)
    parts = output.flat.split([multiple * image.numel() for image in images])
    return [part.view(-1, *image.shape[1:]) for part, image in zip(parts, images, strict=True)]


class _CheckpointPosition(SinCosPosition):
    """Sin-cos positions that keep a checkpoint's own table [1, side², C].

    ValueError if it differs from them by more than rounding: the model was trained with other positions than DiT's.
    Thousands of roundings, that is: DiT's training averages the table as if it were a weight, which in fp32 takes it up
    to 1.6e-4 away.
    """

    def __init__(self, dim: int, table: Tensor) -> None:
        with torch.device(table.device):
            super().__init__(dim, dtype=table.dtype)
            ours = _positions(dim, math.isqrt(table.shape[1])).to(table.dtype)
        error = (table.double() - ours.double()).abs().max().item()
        if not error <= max(torch.finfo(table.dtype).eps, 1e-3):
            raise ValueError(
                f"{_POSITIONS}: it differs by {error:.2g} from DiT's sin-cos positions; they must be those"
            )
        self.register_buffer("table", table.clone(), persistent=False)


def _positions(dim: int, side: int) -> Tensor:
    """[1, side², dim] float32: DiT's fixed positions of a square grid."""
    tables = FactorisedPosition.sin_cos(dim, side, side)
    return (tables.h[:, None] + tables.w[None, :]).flatten(0, 1)[None]


def _positions_to_save(model: SoraDiT, grid: int | None) -> Tensor:
    if grid is not None and (not isinstance(grid, int) or grid < 1):
        raise ValueError(f"grid: {grid}; it must be an int of at least 1")
    if grid is not None:
        return _positions(model.config.dim, grid).to(model.x_embedder.proj.weight.dtype)
    if not isinstance(model.pos_embed, _CheckpointPosition):
        raise ValueError("grid: None, but the model was not loaded from a DiT checkpoint; give image side / patch")
    return model.pos_embed.table


def _read(path: Path) -> Mapping:
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} is no file")
    try:
        if path.suffix.lower() == ".safetensors":
            return read_tensors(path)
        # DiT's own training checkpoints carry their command line, in a class that is nothing but a dictionary.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            # Mapped, where the format and the name allow it: of a training checkpoint one part of four is needed.
            mapped = zipfile.is_zipfile(path) and is_text(path)
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(f"path: {path} is not made of tensors and plain values alone: {error}") from error
    except Exception as error:  # a damaged file makes the readers stumble in a dozen ways
        raise ValueError(f"path: {path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"path: {path} holds a {type(content).__name__}; it must hold a dictionary of tensors")
    return content


def _weights(content: Mapping, path: Path) -> State:
    """The weights among what a file holds, under DiT's own names."""
    found = next((content[key] for key in ("ema", "model") if isinstance(content.get(key), Mapping)), content)
    _raise_if_any(f"{name} is no tensor" for name, value in found.items() if not isinstance(value, Tensor))
    state: State = {}
    for wrapped, tensor in found.items():
        name = ".".join(part for part in str(wrapped).split(".") if part not in _WRAPPERS)
        if name in state:
            raise ValueError(f"path: {path} holds {name} twice, once as {wrapped}; it must hold one model")
        state[name] = tensor
    return state


def _inferred(state: State, num_classes: int | None, told: int | None) -> SoraDiTConfig:
    """The configuration that the shapes speak of; whether all the others agree is checked afterwards."""
    ranks = {_KERNEL: 4, _POSITIONS: 3, _OUTPUT: 2, _LABELS: 2}
    _raise_if_any(f"{name} is missing" for name in ranks if name not in state)
    _raise_if_any(
        f"{name} has the shape {tuple(state[name].shape)}; it must have {rank} dimensions"
        for name, rank in ranks.items()
        if state[name].ndim != rank
    )
    width, channels, patch, _ = state[_KERNEL].shape
    sizes = {dim: size for size, (_, dim, _) in SIZES.items()}
    if width not in sizes or min(channels, patch) < 1:
        raise ValueError(
            f"{_KERNEL}: shape {tuple(state[_KERNEL].shape)}; it must be [width, channels, patch, patch] with "
            f"a width of {', '.join(map(str, sizes))}"
        )
    rows = state[_LABELS].shape[0]
    num_classes = _classes(rows, num_classes, told)
    return config(
        sizes[width],
        patch,
        in_channels=channels,
        num_classes=num_classes,
        null_class=rows > num_classes,
        learned_sigma=state[_OUTPUT].shape[0] == 2 * channels * patch**2,
    )


def _classes(rows: int, asked: int | None, told: int | None) -> int:
    """Classes of a table of so many rows, one of which may be "no class"; told: by the file's command line."""
    if asked not in (None, rows, rows - 1):
        raise ValueError(
            f"num_classes: {asked}; the table of labels has {rows} rows, so it must be {rows}, or {rows - 1} if the "
            'last is "no class"'
        )
    if asked is not None:
        return asked
    if told in (rows, rows - 1):
        return told
    return rows if rows == _IMAGENET else rows - 1


def _shapes(model: SoraDiT, *, grid: int) -> dict[str, tuple[int, ...]]:
    """The entries of the checkpoint of a model with the given grid."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    dim, channels = model.config.dim, model.config.in_channels
    return {**shapes, _KERNEL: (dim, channels, *model.config.patch_size[1:]), _POSITIONS: (1, grid**2, dim)}


def _check_entries(state: State, shapes: Mapping[str, tuple[int, ...]]) -> None:
    dtype = state[_KERNEL].dtype
    wrong = [f"{name} is missing" for name in shapes if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in shapes]
    for name, shape in shapes.items():
        tensor = state.get(name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            wrong.append(f"{name} has the shape {tuple(tensor.shape)}; it must be {shape}")
        elif tensor.dtype != dtype or not dtype.is_floating_point:
            wrong.append(f"{name} is {tensor.dtype}, {_KERNEL} {dtype}; all must be of one floating point dtype")
    _raise_if_any(wrong)


def _raise_if_any(wrong: Iterable[str]) -> None:
    wrong = list(wrong)
    if wrong:
        more = f"; and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
        raise ValueError(f"not a DiT checkpoint: {'; '.join(wrong[:_MOST_NAMED])}{more}")


def _check_is_dit(given: SoraDiTConfig) -> None:
    frames, height, width = given.patch_size
    wrong = [f"{name} = {getattr(given, name)!r}" for name, value in _DIT.items() if getattr(given, name) != value]
    if frames != 1 or height != width:
        wrong.append(f"patch_size = {given.patch_size}")
    if given.num_classes is None:
        wrong.append("num_classes = None")
    if wrong:
        raise ValueError(f"model: it is no DiT, having {', '.join(wrong)}; see dit.config for one that is")


def _check_images(images: Sequence[Tensor], channels: int) -> None:
    if isinstance(images, Tensor):
        raise TypeError("images: a tensor; it must be a sequence of tensors, which may differ in size")
    if not images:
        raise ValueError("images: none; there must be at least one")
    for index, image in enumerate(images):
        shape = tuple(image.shape)
        if len(shape) != 4 or shape[:2] != (channels, 1) or not image.numel():
            raise ValueError(f"images: number {index} has the shape {shape}; it must be ({channels}, 1, H, W)")


def _check_guidance(guidance: float | Tensor, channels: int | None, count: int) -> None:
    if not isinstance(guidance, float | int | Tensor):
        raise TypeError(f"guidance: {type(guidance).__name__}; it must be a number, or a tensor [{count}]")
    if isinstance(guidance, Tensor) and tuple(guidance.shape) not in ((), (count,)):
        raise ValueError(f"guidance: shape {tuple(guidance.shape)}; it must be a number or [{count}], one an image")
    if channels is not None and channels < 1:
        raise ValueError(f"channels: {channels}; it must be at least 1, or None for all")


def _check_null_class(given: SoraDiTConfig, guidance: float | Tensor) -> None:
    if not given.null_class:
        raise ValueError(
            f'guidance: {guidance}; it must be 1, since the model has no "no class" to lead away from: its table has '
            f"{given.num_classes} rows for {given.num_classes} classes, so it was trained without label dropout"
        )


def _check_generator(generator: Generators, count: int) -> None:
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, Sequence):
        raise TypeError(f"generator: {type(generator).__name__}; it must be a torch.Generator, or one an image")
    if len(generator) != count:
        raise ValueError(f"generator: {len(generator)} for {count} images; it must be one, or one an image")


def _check_integers(name: str, values: Tensor, count: int, largest: int) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: {type(values).__name__}; it must be a tensor [{count}], one for every image")
    if tuple(values.shape) != (count,):
        raise ValueError(f"{name}: shape {tuple(values.shape)}; it must be [{count}], one for every image")
    if values.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: {values.dtype}; it must be int32 or int64")
    if may_read(values) and (values.min() < 0 or values.max() > largest):
        raise ValueError(f"{name}: {values.tolist()}; each must lie in 0 … {largest}")
