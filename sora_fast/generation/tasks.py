"""Every task is the same request: a video of some shape, of which some first or last frames may be given."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_fast.diffusion.clean import clean_frames
from sora_fast.models.codecs import Codec, LatentSpec
from sora_fast.packing import PackedLayout, RaggedLatents, token_grid
from sora_fast.packing._bundle import TensorBundle


@dataclass(frozen=True, eq=False)
class Request:
    """One video or image to make.

    frames, height, width: of the whole result; frames = 1 is an image.
    head, tail: (C, t, height, width) float in [-1, 1], frames that the result begins or ends with, unchanged.
    guidance: 1 is none; more follows the prompt more closely.
    guidance_interval: the noise levels (low, high) that guidance is limited to, both included; at others the network is
        not asked what it would make without the prompt (arXiv 2404.07724).
    steps: of the sampler; None: as many as the call says.
    seed: of the noise; the result does not depend on what else is made in the same pack.
    """

    prompt: str
    frames: int
    height: int
    width: int
    head: Tensor | None = None
    tail: Tensor | None = None
    guidance: float = 1.0
    seed: int = 0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    steps: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise TypeError(f'prompt: {self.prompt!r}; it must be a text, "" where there is none')
        for name in ("frames", "height", "width", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; it must be at least 1")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance: {self.guidance}; it must be finite")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"guidance_interval: {self.guidance_interval}; it must be two noise levels, 0 ≤ low ≤ high ≤ 1"
            )
        given = 0
        for name in ("head", "tail"):
            clip = getattr(self, name)
            if clip is None:
                continue
            if clip.ndim != 4 or tuple(clip.shape[2:]) != (self.height, self.width):
                raise ValueError(
                    f"{name}: shape {tuple(clip.shape)}; it must be (C, t, {self.height}, {self.width}), "
                    "as large as the video"
                )
            given += clip.shape[1]
        if given >= self.frames:
            raise ValueError(f"frames: {self.frames}, but {given} are given, and count too; there must be more")


def text_to_video(prompt: str, frames: int, size: tuple[int, int], *, guidance: float = 1.0, seed: int = 0) -> Request:
    """A video (or, with one frame, an image) of size (height, width) from a prompt alone."""
    return Request(prompt, frames, *size, guidance=guidance, seed=seed)


def image_to_video(image: Tensor, prompt: str, frames: int, *, guidance: float = 1.0, seed: int = 0) -> Request:
    """A video of `frames` frames that begins with the image (C, 1, H, W)."""
    if image.ndim != 4 or image.shape[1] != 1:
        raise ValueError(f"image: shape {tuple(image.shape)}; it must be (C, 1, H, W); extend() takes clips")
    return extend(image, prompt, frames - 1, guidance=guidance, seed=seed)


def extend(
    clip: Tensor, prompt: str, new_frames: int, *, backward: bool = False, guidance: float = 1.0, seed: int = 0
) -> Request:
    """The clip (C, T, H, W) with `new_frames` more frames after it, or before it."""
    frames, height, width = _clip_shape("clip", clip)
    ends = {"tail": clip} if backward else {"head": clip}
    return Request(prompt, frames + new_frames, height, width, guidance=guidance, seed=seed, **ends)


def join(
    first: Tensor, second: Tensor, prompt: str, new_frames: int, *, guidance: float = 1.0, seed: int = 0
) -> Request:
    """Two clips (C, T, H, W) of one size with `new_frames` frames made between them."""
    frames, height, width = _clip_shape("first", first)
    frames += _clip_shape("second", second)[0] + new_frames
    return Request(prompt, frames, height, width, first, second, guidance=guidance, seed=seed)


@dataclass(frozen=True, eq=False)
class PackedRequests(TensorBundle):
    """Requests, ready for a sampler.

    data: latents of every result, what is given in its place and zero elsewhere; layout: their tokens.
    clean: [N] bool, tokens that are given.
    heads, tails: [S] int64, how many first and last rows of patches in time are given. given: whether any is.
    """

    data: RaggedLatents
    layout: PackedLayout
    clean: Tensor
    heads: Tensor
    tails: Tensor
    given: bool

    def take(self, requests: Sequence[int]) -> "PackedRequests":
        """Some of them, in this order."""
        videos, grids = self.data.to_list(), self.layout.grids.tolist()
        layout = PackedLayout.from_grids(
            [grids[i] for i in requests], order="raster" if self.layout.is_raster else "tiled"
        )
        heads, tails = (counts[list(requests)] for counts in (self.heads, self.tails))
        layout = layout.to(self.layout.device)
        data = RaggedLatents.from_list([videos[i] for i in requests])
        return PackedRequests(data, layout, clean_frames(layout, heads, tails), heads, tails, self.given)


def pack_requests(
    requests: Sequence[Request], *, codec: Codec, patch_size: tuple[int, int, int], order: str = "tiled"
) -> PackedRequests:
    """Pack requests, one a segment. Given frames must fill whole patches in time: ValueError if they do not."""
    if not requests:
        raise ValueError("requests: empty; there must be at least one")
    placed = [_place(request, codec, patch_size[0]) for request in requests]
    latents, heads, tails = map(list, zip(*placed, strict=True))
    layout = PackedLayout.from_grids([token_grid(video.shape, patch_size) for video in latents], order=order)
    ends = [torch.tensor(counts, device="cpu") for counts in (heads, tails)]
    return PackedRequests(
        RaggedLatents.from_list(latents), layout, clean_frames(layout, *ends), *ends, any(heads + tails)
    )


def _place(request: Request, codec: Codec, patch_frames: int) -> tuple[Tensor, int, int]:
    """Latents of the result with what is given in its place, and how many first and last patches in time that is."""
    shape = codec.spec.latent_shape(request.frames, request.height, request.width)
    latents = torch.zeros(shape, dtype=torch.float32, device="cpu")
    frames, head, tail = latents.shape[1], 0, 0
    if request.head is not None:
        head = _boundary(codec.spec, "head", request.head.shape[1], patch_frames, frames)
        latents[:, :head] = codec.encode(request.head)
    if request.tail is not None:
        before = request.frames - request.tail.shape[1]
        start = _boundary(codec.spec, "tail", before, patch_frames, frames)
        latents[:, start:] = codec.encode_end(request.tail, before)
        tail = frames - start
    return latents, head // patch_frames, -(-tail // patch_frames)


def _boundary(spec: LatentSpec, name: str, before: int, patch_frames: int, latent_frames: int) -> int:
    """The latent frame that begins behind `before` frames, of the video. ValueError if there is none, or no patch."""
    if not spec.divides(before):
        raise ValueError(
            f"{name}: it ends inside a latent frame, behind {before} frames; {spec.nearest(before)} would not: "
            "give more or fewer frames"
        )
    boundary = spec.latent_frames(before)
    if boundary % patch_frames:
        raise ValueError(
            f"{name}: it ends inside a patch of {patch_frames} latent frames, at {boundary} of {latent_frames}; "
            "give more or fewer frames"
        )
    return boundary


def _clip_shape(name: str, clip: Tensor) -> tuple[int, int, int]:
    """(T, H, W) of a clip (C, T, H, W)."""
    if clip.ndim != 4:
        raise ValueError(f"{name}: shape {tuple(clip.shape)}; it must be (C, T, H, W)")
    return tuple(clip.shape[1:])
