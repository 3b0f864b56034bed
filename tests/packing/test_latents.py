import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_fast.packing import RaggedLatents

SHAPES = st.lists(st.tuples(*[st.integers(1, 4)] * 4), max_size=5)


@given(SHAPES, st.integers(0, 9), st.integers(0, 3))
def test_round_trip(shapes: list, spare: int, unused: int) -> None:
    videos = [torch.randn(shape) for shape in shapes]
    total = sum(video.numel() for video in videos)
    latents = RaggedLatents.from_list(videos, capacity=total + spare, max_segments=len(videos) + unused)
    assert latents.flat.shape == (total + spare,) and not latents.flat[total:].any()
    assert latents.shapes.shape == (len(videos) + unused, 4)
    assert latents.offsets.dtype == torch.int64 and latents.shapes.dtype == torch.int32
    assert (latents.offsets[len(videos) :] == total).all()
    back = latents.to_list()
    assert len(back) == len(videos)
    assert all(torch.equal(a, b) for a, b in zip(back, videos, strict=True))


def test_videos_are_views_that_carry_gradients() -> None:
    latents = RaggedLatents.from_list([torch.ones(1, 2, 2, 2), torch.ones(3, 1, 1, 1)])
    flat = latents.flat.clone().requires_grad_()
    second = latents.with_flat(flat).to_list()[1]
    second.sum().backward()
    assert flat.grad.tolist() == [0] * 8 + [1] * 3


def test_permuted_videos_are_stored_in_their_own_order() -> None:
    video = torch.randn(3, 4, 2, 5).permute(3, 1, 0, 2)
    assert torch.equal(RaggedLatents.from_list([video]).to_list()[0], video)


@pytest.mark.parametrize(
    ("videos", "options", "error", "message"),
    [
        ([torch.ones(2, 2)], {}, ValueError, "videos: number 0 has shape"),
        ([torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1).half()], {}, TypeError, "videos: number 1 is torch.float16"),
        ([torch.ones(1, 1, 2, 2)], {"capacity": 3}, ValueError, "capacity: 3 elements"),
        ([torch.ones(1, 1, 2, 2)] * 2, {"max_segments": 1}, ValueError, "max_segments: 1"),
    ],
)
def test_bad_input_is_named(videos: list, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        RaggedLatents.from_list(videos, **options)
