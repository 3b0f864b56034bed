import torch

from sora_fast.models.codecs.padding import Padded


def test_copies_lie_all_around() -> None:
    video = torch.arange(2 * 3 * 5 * 6.0).view(2, 3, 5, 6)
    padded = Padded.to_strides(video, 4)
    assert (padded.height, padded.width) == (8, 8)
    times = [0, 0, 0, 1, 2, 2]
    expected = video[:, times][:, :, [0, 1, 2, 3, 4, 4, 4, 4]][:, :, :, [0, 1, 2, 3, 4, 5, 5, 5]]
    assert torch.equal(padded.frames(-2, 4), expected)
    for start, stop in ((-2, -1), (-1, 2), (2, 4), (5, 7)):
        assert torch.equal(padded.frames(start, stop), expected[:, [min(max(t, 0), 2) + 2 for t in range(start, stop)]])
    for rows, columns in ((slice(0, 4), slice(4, 8)), (slice(4, 8), slice(0, 8)), (slice(6, 8), slice(7, 8))):
        assert torch.equal(padded.frames(-2, 4, rows, columns), expected[:, :, rows, columns])


def test_nothing_is_copied_where_all_fits() -> None:
    video = torch.zeros(1, 5, 8, 4)
    frames = Padded.to_strides(video, 4).frames(1, 3)
    assert frames.data_ptr() == video[:, 1:].data_ptr()
