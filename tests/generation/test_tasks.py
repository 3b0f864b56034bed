import pytest
import torch

from sora_fast.generation.tasks import Request, extend, image_to_video, join, pack_requests, text_to_video
from sora_fast.models.codecs import IdentityCodec
from tests.models.codecs.means import Means

CODEC = IdentityCodec(1)


def _clip(frames: int, height: int = 8, width: int = 12, value: float = 0.5) -> torch.Tensor:
    return torch.full((1, frames, height, width), value)


def test_shapes_of_the_tasks() -> None:
    assert (r := text_to_video("a", 5, (8, 12))).head is None
    assert (r.frames, r.height, r.width) == (5, 8, 12)
    assert (r := image_to_video(_clip(1), "a", 5)).tail is None
    assert (r.frames, r.height, r.width, r.head.shape[1]) == (5, 8, 12, 1)
    assert (r := extend(_clip(3), "a", 4)).frames == 7
    assert r.head is not None
    assert (r := extend(_clip(3), "a", 4, backward=True)).head is None
    assert r.tail is not None
    assert (r := join(_clip(2), _clip(3), "a", 4)).frames == 9
    assert r.head.shape[1] == 2
    assert r.tail.shape[1] == 3


@pytest.mark.parametrize("patch_size", [(1, 4, 4), (2, 4, 4)])
def test_packed_data_and_clean_tokens(patch_size: tuple[int, int, int]) -> None:
    requests = [
        text_to_video("", 3, (6, 6)),
        extend(_clip(2, value=0.25), "", 4),
        extend(_clip(2, value=0.5), "", 4, backward=True),
        join(_clip(4, value=0.25), _clip(2, value=0.5), "", 2),
    ]
    packed = pack_requests(requests, codec=CODEC, patch_size=patch_size)
    videos = packed.data.to_list()
    assert [tuple(v.shape) for v in videos] == [(1, 3, 6, 6), (1, 6, 8, 12), (1, 6, 8, 12), (1, 8, 8, 12)]
    given = [[0] * 3, [0.25] * 2 + [0] * 4, [0] * 4 + [0.5] * 2, [0.25] * 4 + [0, 0, 0.5, 0.5]]
    for segment, (video, values) in enumerate(zip(videos, given, strict=True)):
        assert video.mean(dim=(0, 2, 3)).tolist() == values
        mine = packed.layout.segment_ids == segment
        frames = packed.layout.coords[mine, 0] * patch_size[0]
        assert torch.equal(packed.clean[mine], torch.tensor(values)[frames] != 0)


def test_an_image_begins_a_video_whatever_the_patch() -> None:
    codec = IdentityCodec.for_patches(1, (4, 4, 4))
    requests = [image_to_video(_clip(1), "", 6), join(_clip(5), _clip(4), "", 4)]
    packed = pack_requests(requests, codec=codec, patch_size=(4, 4, 4))
    first, second = (packed.layout.segment_ids == segment for segment in range(2))
    times = packed.layout.coords[:, 0]
    assert torch.equal(packed.clean[first], times[first] == 0)
    assert torch.equal(packed.clean[second], times[second] != 2)
    assert [codec.decode(video).shape[1] for video in packed.data.to_list()] == [6, 13]


def test_given_frames_must_fill_patches() -> None:
    for request in (extend(_clip(3), "", 5), extend(_clip(3), "", 5, backward=True)):
        with pytest.raises(ValueError, match="ends inside a patch of 2 latent frames"):
            pack_requests([request], codec=CODEC, patch_size=(2, 4, 4))
    # A last patch that the video itself does not fill is no such case.
    pack_requests([extend(_clip(1), "", 4, backward=True)], codec=CODEC, patch_size=(2, 4, 4))


def test_what_is_given_lies_where_a_strided_codec_has_it() -> None:
    """A tail encoded alone, or a frame too early or late, is off in all of its latent frames."""
    codec, video = Means(), torch.rand(1, 22, 8, 12) * 2 - 1
    whole = codec.encode(video)
    requests = [
        join(video[:, :5], video[:, 13:], "", 8),
        extend(video[:, 1:], "", 1, backward=True),
        extend(video[:, :21], "", 1),
    ]
    packed = pack_requests(requests, codec=codec, patch_size=(1, 2, 2))
    for segment, given in enumerate(([0, 1, 4, 5, 6], [1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5])):
        latents = packed.data.to_list()[segment]
        assert latents.shape == whole.shape and torch.equal(latents[:, given], whole[:, given])
        times = packed.layout.coords[packed.layout.segment_ids == segment, 0]
        clean = packed.clean[packed.layout.segment_ids == segment]
        assert torch.equal(clean, torch.isin(times, torch.tensor(given, dtype=times.dtype)))


def test_given_frames_must_fill_latent_frames() -> None:
    for request in (extend(_clip(7), "", 5), extend(_clip(5), "", 7, backward=True)):
        with pytest.raises(ValueError, match="ends inside a latent frame, behind 7 frames; 5 or 9 would not"):
            pack_requests([request], codec=Means(), patch_size=(1, 4, 4))


def test_errors() -> None:
    with pytest.raises(ValueError, match="frames: 0"):
        text_to_video("", 0, (8, 8))
    with pytest.raises(ValueError, match="2 are given, and count too; there must be more"):
        Request("", 2, 8, 12, head=_clip(2))
    with pytest.raises(ValueError, match=r"tail: shape \(1, 1, 8, 12\); it must be \(C, t, 8, 8\)"):
        Request("", 3, 8, 8, tail=_clip(1))
    with pytest.raises(ValueError, match="image: shape"):
        image_to_video(_clip(2), "", 5)
    with pytest.raises(ValueError, match="clip: shape"):
        extend(_clip(2)[0], "", 5)
    with pytest.raises(ValueError, match="requests: empty"):
        pack_requests([], codec=CODEC, patch_size=(1, 4, 4))
    with pytest.raises(ValueError, match="must be"):
        pack_requests([extend(_clip(1).expand(3, -1, -1, -1), "", 5)], codec=CODEC, patch_size=(1, 4, 4))


def test_a_prompt_is_a_text() -> None:
    with pytest.raises(TypeError, match='prompt: None; it must be a text, ""'):
        text_to_video(None, 4, (8, 8))  # type: ignore[arg-type]
