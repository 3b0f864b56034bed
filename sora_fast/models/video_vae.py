"""CausalVideoVAE: a small network that compresses videos, 4×4×4 or 4×8×8 (frames, rows, columns), and gives them back.

Two-dimensional convolutions over frames, of which each block sees one and the one before it; 1×1 convolutions pool and
grow time (the design of TAEHV, https://github.com/madebyollin/taehv). What mixes frames is a gather, so that videos of
one height and width are one batch, whatever their lengths, and a long one is a few frames at a time (see `Past`). No
normalisation looks beyond a pixel: what is far away changes nothing, and a frame may be cut into tiles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pixel_shuffle, pixel_unshuffle, silu

# Frames a latent frame: two halvings.
TEMPORAL_STRIDE = 4
# What the standard deviation of a latent number may be, as log variances.
_LOG_VARIANCES = (-30.0, 20.0)


@dataclass(frozen=True)
class VAEConfig:
    """Everything that the shape of a CausalVideoVAE depends on.

    video_channels: 3 for RGB, 1 for grey. channels: of the latents. spatial_stride: pixels a latent pixel, 4 or 8.
    widths, blocks: of the stages, which see every frame at half its size, every other one, and every fourth; the
        decoder has the same, the other way round. The small form has under a million weights.
    """

    video_channels: int = 3
    channels: int = 4
    spatial_stride: int = 4
    widths: tuple[int, int, int] = (32, 56, 64)
    blocks: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        if self.spatial_stride not in (4, 8):
            raise ValueError(f"spatial_stride: {self.spatial_stride}; it must be 4 or 8")
        if self.video_channels not in (1, 3):
            raise ValueError(f"video_channels: {self.video_channels}; it must be 1 (grey) or 3 (RGB)")
        for name in ("widths", "blocks"):
            if len(getattr(self, name)) != 3 or min(getattr(self, name)) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; it must be three positive numbers")
        if self.channels < 1:
            raise ValueError(f"channels: {self.channels}; it must be positive")

    @property
    def shrinks(self) -> tuple[int, int]:
        """By how much the sides shrink from a stage to the next."""
        return (2, 1) if self.spatial_stride == 4 else (2, 2)

    @property
    def reach(self) -> int:
        """How many latent pixels away, at the most, something changes a result: in either direction, of either half."""
        sizes = [2, 4, self.spatial_stride]  # pixels of the frame that a stage's pixel has a side
        # Two 3×3 convolutions a block, and one at each end of a half.
        pixels = sum(2 * blocks * size for blocks, size in zip(self.blocks, sizes, strict=True))
        return math.ceil((pixels + sizes[0] + sizes[-1]) / self.spatial_stride)


class Past:
    """The frames before those of a batch, for each block in turn.

    lengths: latent frames of each of the V videos, whose frames follow each other. states: `kept` of the chunk before,
    where these frames go on with those; None: they are the first, and before them lie copies of the first frame.
    kept: of each block so far, the last frame of every video, [V, C, H, W].
    """

    def __init__(self, lengths: Sequence[int], states: Sequence[Tensor] | None = None) -> None:
        self.lengths = np.array(lengths)
        self.kept: list[Tensor] = []
        self._begins = states is None
        self._states = repeat(None) if states is None else iter(states)
        self._places: dict[int, tuple[Tensor, Tensor]] = {}

    def before(self, x: Tensor) -> Tensor:
        """[F, C, H, W] → the same, one frame later. F: some multiple of the latent frames."""
        if x.shape[0] not in self._places:
            self._places[x.shape[0]] = tuple(place.to(x.device, non_blocking=True) for place in self._found(x.shape[0]))
        previous, last = self._places[x.shape[0]]
        self.kept.append(x.detach()[last])
        state = next(self._states)
        return (x if state is None else torch.cat([state, x])).index_select(0, previous)

    def _found(self, frames: int) -> tuple[Tensor, Tensor]:
        """Where the frame before each is, in x or, behind the states, in both; and where the videos' last are."""
        ends = np.cumsum(self.lengths) * (frames // self.lengths.sum())
        starts = np.concatenate([[0], ends[:-1]])
        previous = np.arange(frames) - 1
        if self._begins:
            previous[starts] = starts
        else:
            previous += len(starts)
            previous[starts] = np.arange(len(starts))
        return torch.from_numpy(previous), torch.from_numpy(ends - 1)


class Conv(nn.Module):
    """A convolution that keeps the size. Its weight is a matrix, which Muon takes: [out, width · side · side]."""

    def __init__(self, width: int, out_width: int, side: int = 3) -> None:
        super().__init__()
        self.shape = (out_width, width, side, side)
        bound = (width * side**2) ** -0.5
        self.weight = nn.Parameter(torch.empty(out_width, width * side**2).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_width))

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight.view(self.shape), self.bias, padding=self.shape[-1] // 2)


class Block(nn.Module):
    """A residual of two 3×3 convolutions; the first sees the frame before, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = Conv(width, 2 * width)
        self.out = Conv(width, width)
        nn.init.zeros_(self.out.weight)  # at first each block lets its input through

    def forward(self, x: Tensor, past: Past) -> Tensor:
        own, before = self.both(x).chunk(2, dim=1)
        return x + self.out(silu(own + past.before(before)))


class Shrink(nn.Module):
    """Two frames become one, and `side` × `side` pixels; all that is in them, by a 1×1 convolution."""

    def __init__(self, width: int, out_width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.mix = Conv(2 * side**2 * width, out_width, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.mix(pixel_unshuffle(x.unflatten(0, (-1, 2)).flatten(1, 2), self.side))


class Grow(nn.Module):
    """The other way round."""

    def __init__(self, width: int, out_width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.mix = Conv(width, 2 * side**2 * out_width, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return pixel_shuffle(self.mix(x), self.side).unflatten(1, (2, -1)).flatten(0, 1)


class Half(nn.Module):
    """Encoder or decoder: blocks, among them those that change the size. (Muon takes what is in `blocks`.)"""

    def __init__(self, begin: Conv, blocks: Sequence[nn.Module], end: Conv) -> None:
        super().__init__()
        self.begin, self.end = begin, end
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, past)
        return self.end(x)


class CausalVideoVAE(nn.Module):
    """Frames to a normal distribution of latents and back; see the top of the file, and `VAECodec` for videos.

    Four frames are a latent frame. That of a video's first frame alone has three copies of it before it.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = c = config
        (first, second), (fine, middle, coarse) = c.shrinks, c.widths
        one, two, three = _stages(c)
        encoder = [*one, Shrink(fine, middle, first), *two, Shrink(middle, coarse, second), *three]
        self.encoder = Half(Conv(4 * c.video_channels, fine), encoder, Conv(coarse, 2 * c.channels))
        one, two, three = _stages(c)
        decoder = [*three, Grow(coarse, middle, second), *two, Grow(middle, fine, first), *one]
        self.decoder = Half(Conv(c.channels, coarse), decoder, Conv(fine, 4 * c.video_channels))

    def encode(self, frames: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """[4L, video_channels, H, W] in [−1, 1], sides that the stride divides → mean and log variance of the latents,
        [L, channels, H / stride, W / stride]."""
        mean, log_variance = self.encoder(pixel_unshuffle(frames, 2), past).chunk(2, dim=1)
        return mean, log_variance.clamp(*_LOG_VARIANCES)

    def decode(self, latents: Tensor, past: Past) -> Tensor:
        """The other way round, without bounds: what [−1, 1] does not hold is the caller's to clamp."""
        return pixel_shuffle(self.decoder(latents, past), 2)


def _stages(config: VAEConfig) -> list[list[Block]]:
    return [[Block(width) for _ in range(count)] for width, count in zip(config.widths, config.blocks, strict=True)]
