"""Tensors, written to disk as videos and images."""

from fractions import Fraction
from os import PathLike
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace
from PIL import Image
from torch import Tensor

H264_QUALITY = "16"  # x264's crf: no artefact to be seen even on tiny frames, whose files are small anyway


def write_media(path: str | PathLike[str], video: Tensor, *, fps: float = 8, scale: int = 1) -> Path:
    """Writes a video or image as the suffix of `path` says: .mp4 (H.264), .gif (loops), or .png (one frame).

    Args:
        video: (C, T, H, W) float in [-1, 1], clamped; C is 1 or 3.
        fps: frames per second (a GIF counts in hundredths of a second and merges equal frames).
        scale: every pixel becomes scale × scale pixels; small frames are hard to look at otherwise.

    Returns:
        The path. Folders on the way are made. H.264 needs even sides: an odd one has its last row or column repeated.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise ValueError(f"path must end in {', '.join(_WRITERS)}; got {path.name!r}")
    if fps <= 0:
        raise ValueError(f"fps must be positive, got {fps}")
    if scale < 1:
        raise ValueError(f"scale must be a whole number of at least 1, got {scale}")
    frames = to_pixels(video).repeat(scale, axis=1).repeat(scale, axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer(path, frames, fps)
    return path


def to_pixels(video: Tensor) -> np.ndarray:
    """(C, T, H, W) float in [-1, 1], C 1 or 3, → (T, H, W, C) uint8. Values outside are clamped; NaN is an error."""
    if video.ndim != 4 or video.shape[0] not in (1, 3) or 0 in video.shape:
        raise ValueError(f"video must be (C, T, H, W) with C = 1 or 3, none of them empty; got {tuple(video.shape)}")
    video = video.detach().to("cpu", torch.float32)
    if video.isnan().any():
        raise ValueError(f"video holds {int(video.isnan().sum())} NaN among its {video.numel()} values")
    levels = (video.clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous().numpy()


# Writing. `frames` is (T, H, W, C) uint8.


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    frames = np.broadcast_to(frames, (*frames.shape[:3], 3))
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1001), options={"crf": H264_QUALITY})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.colorspace = Colorspace.ITU709  # said aloud, since players guess by size when it is not
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    first, *others = _images(frames)
    first.save(path, save_all=True, append_images=others, duration=1000 / fps, loop=0)


def _write_png(path: Path, frames: np.ndarray, fps: float) -> None:
    if len(frames) != 1:
        raise ValueError(f"a .png holds one frame, got {len(frames)}; write a .gif or an .mp4")
    _images(frames)[0].save(path)


def _images(frames: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame.squeeze(-1) if frame.shape[-1] == 1 else frame) for frame in frames]


_WRITERS = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_png}
