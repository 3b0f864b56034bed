import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_fast.training.curve import _apart, _smooth, loss_curve

BLUE = (31, 119, 180)


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def _count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(axis=-1).sum())


def test_a_loss_curve_is_drawn(tmp_path: Path) -> None:
    losses = (np.exp(-np.arange(300) / 50) + 0.1).tolist()
    plain = _pixels(loss_curve(losses, tmp_path / "a.png"))
    timed = _pixels(loss_curve(losses, tmp_path / "b.png", seconds=np.arange(300.0).tolist()))
    assert _count(plain, BLUE) > 500 and _count(timed, BLUE) > 500
    assert (plain[:60] != timed[:60]).any()  # the minutes above


@pytest.mark.parametrize("count", [1, 2, 30, 400])
def test_smoothing_is_the_mean_of_a_centred_window_without_its_gaps(count: int) -> None:
    values = np.random.default_rng(0).random(count)
    values[5:7], values[100:120] = np.nan, np.nan
    half = max(1, round(count / 100))
    smooth = _smooth(values)
    for place in range(count):
        window = values[max(place - half, 0) : place + half + 1]
        if np.isnan(window).all():
            assert np.isnan(smooth[place])
        else:
            assert smooth[place] == pytest.approx(np.nanmean(window))


@pytest.mark.parametrize("pause", [0.0, 90.0, 3000.0])
def test_minutes_do_not_overlap_where_a_run_paused(pause: float) -> None:
    steps = list(range(1, 401))
    minutes = np.linspace(0, 20, 400) + np.where(np.arange(400) < 200, 0, pause)
    marks = _apart(steps, minutes)
    places = np.interp(marks, minutes, steps)
    assert len(marks) >= 4 and np.diff(places).min() >= 399 / 12
    assert places[0] < 100 and places[-1] > 290, "on both sides of the pause"


@pytest.mark.parametrize("losses", [[1.0], [float("nan")] * 3, [0.0, -1.0, 2.0], [float("inf"), 1.0]])
def test_odd_losses_make_no_noise(tmp_path: Path, losses: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = loss_curve(losses, tmp_path / "a.png", steps=range(10, 10 + len(losses)), seconds=[60.0] * len(losses))
    assert path.stat().st_size > 0


def test_errors_name_the_argument(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="losses must not be empty"):
        loss_curve([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="2 losses, 1 steps"):
        loss_curve([1.0, 2.0], tmp_path / "a.png", steps=[1])
