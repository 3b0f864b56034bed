import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_fast.demo.detector import DigitDetector, brightness, direction_of, locate
from sora_fast.demo.digits import DIRECTIONS, MovingDigits, load_scans
from sora_fast.demo.metrics import prompts

SOURCE = MovingDigits(seed=1)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(4, 16, 16), (8, 20, 20), (24, 20, 24), (8, 16, 40)])
def test_it_reads_real_clips_of_scans_it_never_saw(
    detector: DigitDetector, shape: tuple[int, int, int], noise: float
) -> None:
    scenes = [SOURCE.scene(index, shape=shape, caption=caption) for index, caption in enumerate(prompts() * 2)]
    generator = torch.Generator().manual_seed(0)
    seen = []
    for scene in scenes:
        video = SOURCE.render(scene)
        seen.append(detector(video + noise * torch.randn(video.shape, generator=generator)))
    pairs = list(zip(seen, (scene.movers[0] for scene in scenes), strict=True))
    assert np.mean([found.digit == mover.digit for found, mover in pairs]) >= 0.97
    assert np.mean([found.direction == mover.direction for found, mover in pairs]) >= 0.99


def test_it_reads_stills_and_finds_them_still(detector: DigitDetector) -> None:
    scenes = [
        SOURCE.scene(index, shape=(1, 20, 28), caption=f"a {'two' if index % 2 else 'six'}") for index in range(80)
    ]
    seen = [detector(SOURCE.render(scene)) for scene in scenes]
    assert np.mean([found.digit == scene.movers[0].digit for found, scene in zip(seen, scenes, strict=True)]) >= 0.97
    assert all(found.direction is None for found in seen)
    frozen = SOURCE.render(scenes[0]).expand(1, 8, 20, 28)
    assert detector(frozen).direction is None


@pytest.mark.parametrize("fill", [-1.0, -0.8, float("nan")])
def test_it_sees_nothing_in_the_dark(detector: DigitDetector, fill: float) -> None:
    found = detector(torch.full((1, 8, 20, 28), fill))
    assert found.digit is None and found.direction is None
    assert np.array_equal(found.centroids, np.full((8, 2), (9.5, 13.5)))


def test_a_digit_that_vanishes_halfway_does_not_count(detector: DigitDetector) -> None:
    video = SOURCE.render(SOURCE.scene(0, shape=(8, 20, 20), caption="a four moving left"))
    video[:, 3:] = -1
    assert detector(video).digit is None
    video[:, :3] = float("nan")
    assert detector(video).digit is None


def test_colours_are_read_as_grey(detector: DigitDetector) -> None:
    video = SOURCE.render(SOURCE.scene(0, shape=(8, 20, 20), caption="a four moving left"))
    found = detector(video.expand(3, -1, -1, -1))
    assert (found.digit, found.direction) == (4, "left")


@given(st.integers(0, 800), st.integers(0, 12), st.integers(0, 20))
def test_the_centroid_is_that_of_the_scan_wherever_it_lies(row: int, y: int, x: int) -> None:
    scan = load_scans("model")[0][row]
    frame = np.zeros((1, 20, 28), dtype=np.float32)
    frame[0, y : y + 8, x : x + 8] = scan
    lit = np.where(scan > 0.25, scan, 0)
    expected = (np.stack(np.mgrid[:8, :8]) * lit).sum(axis=(1, 2)) / lit.sum() + (y, x)
    centroids, light = locate(frame)
    assert centroids[0] == pytest.approx(expected, abs=1e-4)
    assert light[0] == pytest.approx(lit.sum(), rel=1e-5)


@pytest.mark.parametrize("speed", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_directions_are_those_of_the_first_steps(direction: str, speed: float) -> None:
    steps = np.arange(4)[:, None] * np.array(DIRECTIONS[direction]) * speed + (10, 10)
    jitter = np.random.default_rng(0).uniform(-0.1, 0.1, steps.shape)
    assert direction_of(steps + jitter) == direction
    assert direction_of(np.concatenate([steps + jitter, steps[::-1] - 50])) == direction
    assert direction_of(steps * 0.3) is (None if speed < 1.5 else direction)
    assert direction_of(steps[:1]) is None


def test_shapes_it_cannot_look_at_are_named() -> None:
    for shape in [(8, 20, 20), (1, 8, 7, 20), (1, 0, 20, 20)]:
        with pytest.raises(ValueError, match="video"):
            brightness(torch.zeros(shape))
