import pytest
import torch

from sora_fast.ops.unpatchify import _plain_videos, _videos
from sora_fast.proof.rule import poisoned_scratch


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 7, 128, 300])  # a block of the kernel, and several
def test_places_are_those_of_plain_pytorch(count: int, dtype: torch.dtype, device: torch.device) -> None:
    from sora_fast.kernels._videos import videos

    torch.manual_seed(0)
    # Channels that are not read, a side of none now and then, and strides of a wider table.
    shapes = torch.randint(0, 40, (count, 8), dtype=dtype, device=device)[:, ::2]
    with poisoned_scratch():
        made = videos(shapes, 16)
    for own, plain in zip(made, _plain_videos(shapes, 16), strict=True):
        assert own.dtype == plain.dtype and torch.equal(own, plain)


def test_many_elements_do_not_overflow(device: torch.device) -> None:
    from sora_fast.kernels._videos import videos

    shapes = torch.tensor([[1, 1 << 10, 1 << 12, 1 << 12]] * 3, dtype=torch.int32, device=device)
    offsets, _ = videos(shapes, 16)
    assert offsets.tolist() == [place << 38 for place in range(4)]


def test_opcheck(device: torch.device) -> None:
    shapes = torch.tensor([[3, 2, 4, 5], [0, 0, 0, 0]], dtype=torch.int32, device=device)
    torch.library.opcheck(_videos.registered, (shapes, 4))
