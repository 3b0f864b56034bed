import numpy as np
import torch

from sora_fast.training.data.crops import CropConfig, crops_of
from sora_fast.training.data.sources import Sample


class Places:
    """Pixels that say where they are."""

    def __init__(self, *shapes: tuple[int, int, int]) -> None:
        self.shapes = shapes

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Sample:
        time, row, column = torch.meshgrid(*map(torch.arange, self.shapes[index]), indexing="ij")
        return Sample((time * 10_000 + row * 100 + column).float()[None], "unused", note="a note")


def test_parts_are_of_every_length_size_and_place() -> None:
    source = Places(*[(19, 40, 30)] * 200)
    crops = crops_of(source, CropConfig(max_frames=10, max_side=24), seed=0)
    assert len(crops) == 200
    shapes, places = set(), set()
    for index in range(200):
        sample = crops.draw(index, np.random.default_rng(index))
        assert tuple(sample.video.shape) == crops.shape(index) and (sample.caption, sample.note) == ("", "a note")
        _, frames, height, width = sample.video.shape
        first = int(sample.video[0, 0, 0, 0])
        place = first // 10_000, first // 100 % 100, first % 100
        expected = source[index].video[
            :, place[0] : place[0] + frames, place[1] : place[1] + height, place[2] : place[2] + width
        ]
        assert torch.equal(sample.video, expected)
        shapes.add((frames, height, width))
        places.add(place)
    assert {shape[0] for shape in shapes} == {1, 5, 9}
    assert {shape[1] for shape in shapes} == {shape[2] for shape in shapes} == {16, 20, 24}
    assert [max(place[axis] for place in places) for axis in range(3)] == [18, 24, 14]


def test_what_is_smaller_than_a_latent_is_filled_up() -> None:
    crops = crops_of(Places((3, 5, 1)), CropConfig(stride=8), seed=0)
    assert crops.shape(0)[2:] == (8, 8)
    video = crops[0].video
    assert torch.equal(video[..., :, 0], video[..., :, 7]) and torch.equal(video[..., 4, :], video[..., 7, :])


def test_a_short_video_is_filled_up_to_the_next_latent() -> None:
    """Else an autoencoder of such videos would see single frames only."""
    crops = crops_of(Places(*[(2, 16, 16)] * 20), CropConfig(max_frames=8), seed=0)
    longer = [crops[index].video for index in range(20) if crops.shape(index)[1] > 1]
    assert longer and all(video.shape[1] == 5 for video in longer)
    assert all(torch.equal(video[:, 1:], video[:, 1:2].expand(-1, 4, -1, -1)) for video in longer)
    assert all((video[:, 0] < video[:, 1]).all() for video in longer)


def test_an_endless_stream_stays_one() -> None:
    class Endless:
        def __getitem__(self, index: int) -> Sample:
            return Sample(torch.zeros(1, 1, 16, 16))

    assert not hasattr(crops_of(Endless(), CropConfig(), seed=0), "__len__")
