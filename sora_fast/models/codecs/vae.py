"""Videos through a CausalVideoVAE: a few frames at a time, and large ones in tiles. What is whole is that loop."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sora_fast.models.codecs.codec import Codec
from sora_fast.models.codecs.padding import Padded
from sora_fast.models.codecs.spec import LatentSpec, Numbers
from sora_fast.models.codecs.tiles import Tile, put_together, tiles_of
from sora_fast.models.video_vae import TEMPORAL_STRIDE, CausalVideoVAE, Past

# Latent frames of a video at a time, and pixels of a frame, a side. Of both: more of it, more memory.
CHUNK, TILE = 4, 512
# Latent pixels at a time, over all videos: as many as one of the largest has.
_AT_ONCE = CHUNK * (TILE // 4) ** 2

Take = Callable[[int, int, int, Tile], Tensor]
Half = Callable[[Tensor, Past], Tensor]


class VAECodec(Codec):
    """A trained network, and the mean and deviation of its latents.

    Computes in float32 or bfloat16, whichever its weights have, and gives float32, whatever it is given; latents are
    the distribution's mean. The network goes to the device of what it is given. Videos of one height and width, of any
    lengths, are one batch. Memory is that of `chunk` latent frames and tiles of `tile` pixels a side, beside what is
    given and made, however long a video is. Another tile changes results by rounding, as another chunk does.
    """

    def __init__(
        self, network: CausalVideoVAE, *, mean: Numbers = 0.0, std: Numbers = 1.0, chunk: int = CHUNK, tile: int = TILE
    ) -> None:
        if (dtype := next(network.parameters()).dtype) not in (torch.float32, torch.bfloat16):
            raise TypeError(f"network: {dtype}; it must be float32 or bfloat16, whose range does not overflow")
        c = network.config
        self.network = network.eval().requires_grad_(False)
        self.chunk, self.tile = chunk, max(1, tile // c.spatial_stride)
        self._spec = LatentSpec(
            c.channels, c.spatial_stride, TEMPORAL_STRIDE, True, mean=mean, std=std, video_channels=c.video_channels
        )

    @property
    def spec(self) -> LatentSpec:
        return self._spec

    def _encoded(self, videos: Sequence[Padded]) -> list[Tensor]:
        stride = self.spec.spatial_stride
        shapes = [self.spec.latent_shape(padded.video.shape[1], padded.height, padded.width) for padded in videos]
        places = [{"dtype": torch.float32, "device": padded.video.device} for padded in videos]
        latents = [torch.empty(shape, **place) for shape, place in zip(shapes, places, strict=True)]

        def take(number: int, start: int, stop: int, tile: Tile) -> Tensor:
            sides = (slice(seen.start * stride, seen.stop * stride) for seen in (tile.seen_rows, tile.seen_columns))
            frames = (TEMPORAL_STRIDE * time - _COPIES for time in (start, stop))
            return videos[number].frames(*frames, *sides).transpose(0, 1)

        for number, start, made in self._streamed(self._mean_code, take, shapes, 1):
            latents[number][:, start : start + made.shape[0]] = self.spec.normalized(made.float().transpose(0, 1))
        return latents

    def _decoded(self, latents: Sequence[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
        def take(number: int, start: int, stop: int, tile: Tile) -> Tensor:
            part = latents[number][:, start:stop, tile.seen_rows, tile.seen_columns]
            return self.spec.raw(part).transpose(0, 1)

        shapes = [tuple(one.shape) for one in latents]
        for number, start, made in self._streamed(self.network.decode, take, shapes, self.spec.spatial_stride):
            first = TEMPORAL_STRIDE * start - _COPIES
            yield number, max(first, 0), made[max(-first, 0) :].float().transpose(0, 1)

    def _mean_code(self, frames: Tensor, past: Past) -> Tensor:
        return self.network.encode(frames, past)[0]

    def _streamed(
        self, half: Half, take: Take, shapes: Sequence[tuple[int, ...]], scale: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """The loop. (Number of the video, first latent frame, what the half of the network made of the next ones).

        take: what that is given of a video, latent frames start … stop, for a tile. shapes: (C, T, H, W) of the
        latents. scale: pixels that are made, a latent pixel.
        """
        for group in self._groups(shapes):
            lengths = [shapes[number][1] for number in group]
            height, width = shapes[group[0]][2:]
            tiles = tiles_of(height, width, self.tile, self.network.config.reach)
            states: list[list[Tensor] | None] = [None] * len(tiles)
            for start in range(0, lengths[0], self.chunk):
                counts = [min(self.chunk, length - start) for length in lengths if length > start]
                parts = []
                for place, tile in enumerate(tiles):
                    given = [take(group[i], start, start + count, tile) for i, count in enumerate(counts)]
                    # Videos that are over, the last ones, have nothing to go on with.
                    before = states[place] and [state[: len(counts)] for state in states[place]]
                    past = Past(counts, before)
                    parts.append((tile, tile.inner(self._computed(half, torch.cat(given), past), scale)))
                    states[place] = past.kept
                whole = put_together(parts, height, width, scale)
                each = whole.split([count * whole.shape[0] // sum(counts) for count in counts])
                yield from ((group[i], start, made) for i, made in enumerate(each))

    def _groups(self, shapes: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """Numbers of videos that are one batch: of one height and width, the longest first, no more than fit."""
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, shape in enumerate(shapes):
            alike[shape[2:]].append(number)
        for (height, width), numbers in alike.items():
            numbers.sort(key=lambda number: -shapes[number][1])
            most = max(1, _AT_ONCE // (self.chunk * min(height, self.tile) * min(width, self.tile)))
            cuts = [*range(0, len(numbers), most), len(numbers)]
            yield from (numbers[start:stop] for start, stop in pairwise(cuts))

    @torch.no_grad()
    def _computed(self, half: Half, x: Tensor, past: Past) -> Tensor:
        weight = next(self.network.parameters())
        if weight.device != x.device:
            self.network.to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            return half(x.to(weight.dtype), past)


# Of the first frame, that go before it and fill its latent frame.
_COPIES = TEMPORAL_STRIDE - 1
