import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sora_fast.models.codecs.vae import VAECodec
from sora_fast.models.video_vae import CausalVideoVAE, VAEConfig

SMALL = {"widths": (4, 6, 8), "blocks": (1, 1, 1)}


def codec(config: VAEConfig | None = None, **options: object) -> VAECodec:
    """Of random weights, none of them zero."""
    torch.manual_seed(0)
    network = CausalVideoVAE(config or VAEConfig(1, **SMALL))
    for name, weight in network.named_parameters():
        if name.endswith("out.weight"):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return VAECodec(network, mean=(0.1, 0.2, 0.3, 0.4), std=(1.0, 2.0, 0.5, 1.5), **options)


def clip(frames: int, height: int = 12, width: int = 16, seed: int = 0) -> Tensor:
    return torch.rand((1, frames, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def close(one: Tensor, other: Tensor, bound: float) -> bool:
    """Beside what rounds off, all of it."""
    return one.shape == other.shape and bool((one - other).abs().max() <= bound * max(1, other.abs().max()))


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 5, 7), (16, 12, 18), (17, 16, 16), (42, 4, 4)])
def test_any_size_comes_back(frames: int, height: int, width: int) -> None:
    vae, video = codec(), clip(frames, height, width)
    latents = vae.encode(video)
    assert latents.shape == vae.spec.latent_shape(frames, height, width)
    assert vae.decode(latents, (frames, height, width)).shape == video.shape


def test_the_first_frame_is_an_image() -> None:
    vae, video = codec(), clip(33)
    assert close(vae.encode(video[:, :1]), vae.encode(video)[:, :1], 1e-5)
    # And no latent frame knows what comes after it.
    other = torch.cat([video[:, :21], clip(12, seed=1)], dim=1)
    one, changed = vae.encode(video), vae.encode(other)
    assert close(one[:, :6], changed[:, :6], 1e-5) and not close(one[:, 6], changed[:, 6], 1e-2)
    seen = vae.decode(one), vae.decode(torch.cat([one[:, :6], one[:, 6:].flip(1)], dim=1))
    assert close(seen[0][:, :21], seen[1][:, :21], 1e-5) and not close(seen[0][:, 21:], seen[1][:, 21:], 1e-2)


def test_whole_is_the_loop_over_chunks() -> None:
    vae, video = codec(), clip(70)
    latents = vae.encode(video)
    pieces = list(vae.stream(latents, (70, 12, 16)))
    assert [piece.shape[1] for piece in pieces] == [13, 16, 16, 16, 9]
    whole = vae.decode(latents, (70, 12, 16))
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    for chunk in (1, 3, 7, 100):
        other = codec(chunk=chunk)
        assert close(other.encode(video), latents, 1e-5)
        assert close(other.decode(latents, (70, 12, 16)), whole, 1e-5)


def test_ragged_videos_are_exact() -> None:
    vae = codec()
    videos = [clip(9), clip(50, seed=1), clip(1, seed=2), clip(14, 8, 8, seed=3), clip(22, seed=4)]
    latents = vae.encode_all(videos)
    for one, video in zip(latents, videos, strict=True):
        assert close(one, vae.encode(video), 1e-5)
    sizes = [tuple(video.shape[1:]) for video in videos]
    for decoded, one, size in zip(vae.decode_all(latents, sizes), latents, sizes, strict=True):
        assert close(decoded, vae.decode(one, size), 1e-5)


def test_an_end_is_encoded_as_what_it_is() -> None:
    """Behind frames that stand still, which is all that copies can know: then it is exact, and one frame off is not."""
    vae, moving = codec(), clip(12)
    still = torch.cat([moving[:, :1].expand(-1, 9, -1, -1), moving], dim=1)
    whole = vae.encode(still)
    assert close(vae.encode_end(moving, 9), whole[:, 3:], 1e-5)
    assert not close(vae.encode_end(torch.cat([moving[:, :1], moving[:, :-1]], dim=1), 9), whole[:, 3:], 1e-2)


@pytest.mark.parametrize("stride", [4, 8])
def test_tiles_are_what_the_whole_is(stride: int) -> None:
    config = VAEConfig(1, spatial_stride=stride, **SMALL)
    video = clip(6, 132, 100)
    whole, tiled = codec(config, tile=1024), codec(config, tile=64)
    latents = whole.encode(video)
    assert close(tiled.encode(video), latents, 1e-4)
    decoded = whole.decode(latents, (6, 132, 100))
    assert close(tiled.decode(latents, (6, 132, 100)), decoded, 1e-4)
    # What a tile does not see does matter where the reach is taken for less than it is.
    short = codec(config, tile=64)
    object.__setattr__(short.network, "config", _Short(**vars(config)))
    assert not close(short.encode(video), latents, 1e-4)


class _Short(VAEConfig):
    reach = 1


def test_memory_does_not_grow_with_the_length() -> None:
    vae = codec()

    def above(frames: int) -> tuple[int, int]:
        video = clip(frames, 30, 34)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as first:
            latents = vae.encode(video)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as second:
            decoded = vae.decode(latents, (frames, 30, 34))
        return _peak(first) - 4 * latents.numel(), _peak(second) - 4 * decoded.numel()

    for short, long in zip(above(64), above(960), strict=True):
        assert 0 < long <= 1.1 * short


def _peak(run: profile) -> int:
    """Bytes that were allocated at once, at the most."""
    now = most = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_other_precisions() -> None:
    vae, video = codec(), clip(9)
    latents = vae.encode(video)
    assert close(vae.encode(video.half()), latents, 1e-2) and vae.encode(video.half()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.encode(video), latents)
    low = VAECodec(codec().network.bfloat16())
    assert low.decode(low.encode(video)).isfinite().all()
    with pytest.raises(TypeError, match=r"network: torch\.float16; it must be float32 or bfloat16"):
        VAECodec(codec().network.half())


def test_data_workers_can_have_it() -> None:
    vae = codec()
    assert torch.equal(pickle.loads(pickle.dumps(vae)).encode(clip(5)), vae.encode(clip(5)))
