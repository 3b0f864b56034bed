import pytest
import torch

from sora_fast.diffusion import clean_frames, random_clean_ends
from sora_fast.packing import PackedLayout


def test_clean_frames_are_the_first_and_last():
    layout = PackedLayout.from_grids([(3, 1, 2), (2, 2, 1), (1, 1, 1)], order="tiled", capacity=13, max_segments=4)
    clean = clean_frames(layout, torch.tensor([1, 0, 0, 5]), torch.tensor([1, 1, 0, 5]))
    frames = [(s, t) for s, (t, _, _) in zip(layout.segment_ids.tolist(), layout.coords.tolist(), strict=True)]
    assert clean.tolist() == [place in {(0, 0), (0, 2), (1, 1)} for place in frames]


def test_clean_frames_wants_one_number_a_segment():
    layout = PackedLayout.from_grids([(3, 1, 2)])
    with pytest.raises(ValueError, match="tail: shape"):
        clean_frames(layout, torch.tensor([1]), torch.tensor([1, 1]))


def test_random_ends_leave_a_noisy_frame_and_images_alone():
    grids = [(1 + i % 6, 1, 1) for i in range(6000)]
    layout = PackedLayout.from_grids(grids, max_segments=6001)
    head, tail = random_clean_ends(layout, torch.Generator().manual_seed(0), share=0.6, single=0.5)
    frames = layout.grids[:, 0]
    assert head.dtype == tail.dtype == torch.int32
    assert (head >= 0).all() and (tail >= 0).all()
    assert ((head + tail < frames) | (frames == 0)).all()
    assert not (head + tail)[frames <= 1].any()

    clips = frames > 2
    given = (head + tail > 0)[clips].float().mean().item()
    assert given == pytest.approx(0.6, abs=0.03)
    for kind in (tail == 0, head == 0, (head > 0) & (tail > 0)):
        assert (kind & (head + tail > 0))[clips].float().mean().item() == pytest.approx(0.2, abs=0.03)
    six = frames == 6
    assert set((head + tail)[six].tolist()) == {0, 1, 2, 3, 4, 5}
    assert set(head[six & (tail == 0)].tolist()) == {0, 1, 2, 3, 4, 5}
    two = frames == 2
    assert set(zip(head[two].tolist(), tail[two].tolist(), strict=True)) == {(0, 0), (1, 0), (0, 1)}


def test_single_frames_only():
    layout = PackedLayout.from_grids([(5, 1, 1)] * 200)
    head, tail = random_clean_ends(layout, torch.Generator().manual_seed(0), share=1, single=1)
    assert set(zip(head.tolist(), tail.tolist(), strict=True)) == {(1, 0), (0, 1), (1, 1)}


def test_nothing_clean_at_share_zero():
    layout = PackedLayout.from_grids([(5, 1, 1)] * 20)
    head, tail = random_clean_ends(layout, share=0)
    assert not head.any() and not tail.any()
    with pytest.raises(ValueError, match=r"share: 1\.5"):
        random_clean_ends(layout, share=1.5)
