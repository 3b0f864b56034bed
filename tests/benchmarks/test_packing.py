"""Which samples come into which batch, and what of them counts as useful."""

import math
from dataclasses import astuple, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import test_packing as suite
from benchmarks.packing import MIXES, RATIOS, WAYS, Buckets, Grid, Mix, Tally, bucketed, packed, padded, useful_tokens

BUCKETS = Buckets(areas=(16, 64, 144), frames=(1, 2, 4))
GRIDS = st.lists(st.tuples(st.sampled_from([1, 1, 2, 3, 5]), st.integers(1, 14), st.integers(1, 14)), min_size=1)
BUDGET = 5 * 14 * 14


@pytest.mark.parametrize(
    ("grid", "bucket"),
    [
        pytest.param((1, 12, 12), (1, 12, 12), id="its own"),
        pytest.param((1, 40, 40), (1, 12, 12), id="larger than all"),
        pytest.param((1, 11, 11), (1, 12, 12), id="over 80% of the area"),
        pytest.param((1, 10, 11), (1, 8, 8), id="under 80% of the area"),
        pytest.param((2, 3, 3), None, id="smaller than all"),
        pytest.param((3, 8, 8), (2, 8, 8), id="frames at the end are cut off"),
        pytest.param((9, 8, 8), (4, 8, 8), id="longer than all"),
        pytest.param((4, 12, 12), (4, 8, 8), id="too many tokens of the largest area"),
        pytest.param((1, 6, 11), (1, 6, 11), id="a wide one"),
        pytest.param((1, 90, 10), (1, 17, 8), id="taller than all"),
    ],
)
def test_a_sample_goes_where_open_sora_puts_it(grid: Grid, bucket: Grid | None) -> None:
    assert BUCKETS.assign(grid, longest=400) == bucket


def test_a_video_is_no_image() -> None:
    images_only = replace(BUCKETS, frames=(1,))
    assert images_only.assign((2, 8, 8), longest=400) is None
    assert replace(BUCKETS, frames=(2,)).assign((1, 8, 8), longest=400) is None


@pytest.mark.parametrize(
    ("grid", "bucket", "useful"),
    [
        pytest.param((4, 8, 8), (4, 8, 8), 256, id="as it is"),
        pytest.param((4, 16, 16), (4, 8, 8), 256, id="shrunk: every token shows something"),
        pytest.param((5, 8, 8), (4, 8, 8), 256, id="frames cut off"),
        pytest.param((1, 8, 8), (1, 10, 10), 64, id="enlarged: what it had"),
        pytest.param((1, 8, 20), (1, 10, 10), 64, id="enlarged until it covers, then cut off"),
    ],
)
def test_what_a_bucket_shows(grid: Grid, bucket: Grid, useful: float) -> None:
    assert useful_tokens(grid, bucket) == pytest.approx(useful)


@given(grids=GRIDS)
@pytest.mark.parametrize("way", WAYS)
def test_batches_keep_to_the_budget_and_lose_no_sample(way: str, grids: list[Grid]) -> None:
    batches = list(WAYS[way](grids, BUDGET, BUCKETS))
    taken = [grid for grid in grids if way != "bucketing" or BUCKETS.assign(grid, longest=BUDGET)]
    assert sum(len(batch.grids) for batch in batches) == len(taken)
    for batch in batches:
        computed = sum(map(math.prod, batch.grids))
        assert 0 < batch.useful <= computed <= batch.capacity <= BUDGET
        assert way == "packing" or (computed == batch.capacity and len(set(batch.grids)) == 1)
    if way != "bucketing":
        assert sum(batch.useful for batch in batches) == sum(map(math.prod, grids))


def test_padding_goes_to_the_longest_of_a_batch() -> None:
    first, second = padded([(1, 2, 2), (1, 5, 2), (2, 5, 1), (1, 1, 1), (1, 4, 4)], 40, BUCKETS)
    assert (first.grids, first.capacity, first.useful) == (((1, 5, 2),) * 4, 40, 25)
    assert (second.grids, second.capacity, second.useful) == (((1, 4, 4),), 16, 16)


def test_a_batch_is_of_one_bucket() -> None:
    grids = [(1, 8, 8), (2, 8, 8), (1, 9, 9), (1, 8, 8), (1, 1, 1)]
    one, other, last = bucketed(grids, 128, BUCKETS)
    assert (one.grids, one.useful) == (((2, 8, 8),), 128)
    assert (other.grids, other.useful) == (((1, 8, 8),) * 2, 128)
    assert (last.grids, last.capacity) == (((1, 8, 8),), 64)
    assert astuple(Tally.of([one, other, last], grids)) == pytest.approx((0, 320 / 338, 0.2))


def test_a_pack_is_computed_whole() -> None:
    (batch,) = packed([(1, 3, 3), (1, 2, 2), (2, 2, 2)], 30, BUCKETS)
    assert (batch.grids, batch.capacity, batch.useful) == (((1, 2, 2), (2, 2, 2), (1, 3, 3)), 30, 21)


@pytest.mark.parametrize("mix", [*MIXES, MIXES[1].scaled(4, 2)], ids=lambda mix: f"{mix.name}, {mix.frames}")
def test_a_mix_is_as_declared(mix: Mix) -> None:
    longest = 2 * mix.image_area[1] * mix.frames[0]
    grids = mix.draw(2000, longest=longest)
    assert grids == mix.draw(2000, longest=longest) != mix.draw(2000, longest=longest, seed=1)
    images, videos = ([grid for grid in grids if (grid[0] == 1) == is_image] for is_image in (True, False))
    assert len(images) / len(grids) == pytest.approx(mix.images, abs=0.03)
    assert max(map(math.prod, grids)) <= longest
    assert {mix.frames[0], mix.frames[1]} <= {frames for frames, _, _ in videos} <= set(range(2, mix.frames[1] + 1))
    for some, (least, most) in ((images, mix.image_area), (videos, mix.video_area)):
        areas = [height * width for _, height, width in some]
        assert 0.8 * least < min(areas) < 2 * least and most / 2 < max(areas) < 1.1 * most
    ratios = [height / width for _, height, width in grids]
    assert RATIOS[0] * 0.8 < min(ratios) < 0.6 and 1.7 < max(ratios) < RATIOS[-1] * 1.25


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.name)
def test_all_ways_do_the_same_work_in_a_round(mix: Mix) -> None:
    setting = replace(suite.Setting.here(), samples=2000)
    for way in WAYS:
        batches, tally = setting.batches(mix, way)
        useful, computed = sum(batch.useful for batch in batches), sum(batch.capacity for batch in batches)
        assert useful == pytest.approx(setting.useful, rel=0.01), way
        assert 1 - useful / computed == pytest.approx(tally.padding, abs=0.01), way
        assert (tally.kept == 1) == (way != "bucketing"), way


def test_what_is_kept_for_the_backward_pass_is_counted() -> None:
    setting = replace(suite.Setting.here(), device=torch.device("cpu"), backend="torch", depth=1)
    model = setting.model(suite.MASKS["full"])
    kept = []
    for frames in (1, 3):
        grids = ((frames, 2, 4),)
        kept.append(suite.kept_bytes(setting.step(model, suite.PackedLayout.from_grids(grids), grids), model))
    # Most of it goes with the 8 and 24 tokens: of each at least ten widths of fp32, and not the weights.
    assert 16 * 10 * 384 * 4 < kept[1] - kept[0] < 16 * 200 * 384 * 4
    assert kept[1] < sum(parameter.nbytes for parameter in model.parameters()) / 2
