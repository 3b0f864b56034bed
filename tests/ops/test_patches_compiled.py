"""The compiled library's two ops: every way through its loops, and what it is given by callers of torch.ops."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given
from torch import Tensor

from sora_fast.ops import _library, _patches_torch
from sora_fast.ops._patches_compiled import _gather, _geometry, _scatter, cut, put
from sora_fast.packing import PackedLayout, RaggedLatents
from sora_fast.proof.rule import poisoned_scratch
from tests.ragged import RaggedCase, needs_library, ragged_cases

pytestmark = needs_library


@given(case=ragged_cases())
def test_random_cases_match_the_oracle(case: RaggedCase, device: torch.device) -> None:
    layout, latents = case.layout(), case.latents()
    expected = case.patches(latents.flat)
    rows = rearrange(expected, "n (c p) -> n (p c)", c=case.channels)
    restored = latents.flat.masked_fill(case.unread(), 0)
    videos = (latents.offsets.to(device), latents.shapes.to(device), layout.to(device), case.patch_size)
    with poisoned_scratch():
        assert torch.equal(cut(latents.flat.to(device), *videos, case.channels).cpu(), expected)
        assert torch.equal(put(rows.to(device), *videos, len(restored)).cpu(), restored)


# Each width of a run that has a loop of its own, two that have none, and both with rows that a strip is too long for.
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 16, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channel_last", [False, True])
def test_every_width_and_size(width: int, dtype: torch.dtype, channel_last: bool, device: torch.device) -> None:
    case = RaggedCase(shapes=((3, 2, 3, 40 * width), (3, 1, 4, 2 * width + 1)), patch_size=(1, 2, width), dtype=dtype)
    layout, latents = case.layout().to(device), case.latents().to(device)
    geometry = _geometry(latents.offsets, latents.shapes, layout, case.patch_size)
    expected = case.patches(latents.flat.cpu())
    if channel_last:
        expected = rearrange(expected, "n (c p) -> n (p c)", c=3)
    with poisoned_scratch():
        rows = _gather(latents.flat, *geometry, case.num_pixels, channel_last)
        flat = _scatter(rows, *geometry, len(latents.flat), channel_last)
    assert torch.equal(rows.cpu(), expected)
    used = latents.offsets[-1]
    assert torch.equal(flat[:used], latents.flat[:used]) and not flat[used:].any()


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_strides_are_taken_as_they_are(step: int, channel_last: bool, device: torch.device) -> None:
    case = RaggedCase(order="tiled", drop=True, patch_size=(1, 2, 2))
    layout, latents = case.layout().to(device), case.latents().to(device)
    geometry = _geometry(latents.offsets, latents.shapes, layout, case.patch_size)
    elements, options = len(latents.flat), (case.num_pixels, channel_last)
    flat = torch.randn(1 + 3 * elements, device=device).as_strided((elements,), (step,), 1)
    rows = _gather(flat, *geometry, *options)
    assert torch.equal(rows, _gather(flat.contiguous(), *geometry, *options))
    transposed = rows.t().contiguous().t()
    sliced = torch.stack([rows, rows], dim=2)[:, :, 0]
    for strided in (transposed, sliced):
        assert not strided.is_contiguous()
        restored = [_scatter(x, *geometry, elements, channel_last) for x in (strided, rows)]
        assert torch.equal(*restored)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_same_bits_by_two_threads(two_threads: None, device: torch.device) -> None:
    """A batch that is worth two, cut in the middle of a row of patches."""
    grids = [(3, 37, 41), (1, 5, 7)]
    layout = PackedLayout.from_grids(grids, order="tiled", capacity=4711).to(device)
    videos = [torch.randn(16, t, 2 * h, 2 * w) for t, h, w in grids]
    latents = RaggedLatents.from_list(videos).to(device)
    geometry = (latents.offsets, latents.shapes, layout, (1, 2, 2))
    rows = cut(latents.flat, *geometry, 16)
    assert torch.equal(rows, _patches_torch.gathered(latents.flat, *geometry, 16))
    flat = put(rows, *geometry, len(latents.flat))
    assert torch.equal(flat, _patches_torch.scattered(rows, *geometry, len(latents.flat)))


def test_gradients(device: torch.device) -> None:
    case = RaggedCase(drop=True, order="tiled", dtype=torch.float64)
    layout, latents = case.layout().to(device), case.latents().to(device)
    geometry = (latents.offsets, latents.shapes, layout, case.patch_size)
    flat = latents.flat.requires_grad_()
    rows = torch.randn(layout.capacity, case.num_pixels, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cut(x, *geometry, case.channels), flat)
    assert torch.autograd.gradcheck(lambda x: put(x, *geometry, len(flat)), rows)


@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(strided: bool, device: torch.device) -> None:
    case = RaggedCase(drop=True)
    layout, latents = case.layout().to(device), case.latents().to(device)
    geometry = _geometry(latents.offsets, latents.shapes, layout, case.patch_size)
    flat = torch.randn(2 * len(latents.flat), device=device)[:: 1 + strided].requires_grad_()
    rows = torch.randn(layout.capacity, case.num_pixels, device=device)
    rows = (rows.t().contiguous().t() if strided else rows).requires_grad_()
    torch.library.opcheck(_gather.registered, (flat, *geometry, case.num_pixels, False))
    torch.library.opcheck(_scatter.registered, (rows, *geometry, len(latents.flat), True))


class Given:
    """Arguments of the library's own ops, for one video (1, 1, 4, 4) in patches of 1×2×2."""

    def __init__(self, device: torch.device) -> None:
        def ints(*values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        # Beyond the end of each lies what another video would have.
        self.flat = torch.arange(1.0, 33.0, device=device)[:16]
        self.rows = torch.full((4, 4), float("nan"), device=device)
        self.offsets = torch.tensor([0, 16], device=device)
        self.shapes = ints([1, 1, 4, 4], [1, 1, 4, 4])[:1]
        self.segment_ids = ints(0, 0, 0, 0)
        self.coords = ints([0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1])

    def gather(self, patch: tuple[int, int, int] = (1, 2, 2)) -> Tensor:
        tables = (self.offsets, self.shapes, self.segment_ids, self.coords)
        _library.function("gather_patches")(self.flat, *tables, *patch, False, self.rows)
        return self.rows

    def scatter(self) -> Tensor:
        tables = (self.offsets, self.shapes, self.segment_ids, self.coords)
        _library.function("scatter_patches")(self.rows, *tables, 1, 2, 2, False, self.flat)
        return self.flat


@pytest.mark.parametrize("place", [(0, 2, 0), (0, 0, 2), (1, 0, 0), (0, -1, 0), (0, 0, -1), (2**31 - 1,) * 3])
def test_a_token_outside_its_video_is_padding(place: tuple[int, int, int], device: torch.device) -> None:
    given = Given(device)
    given.coords[3] = torch.tensor(place)
    rows = given.gather()
    assert rows[2].tolist() == [9, 10, 13, 14] and not rows[3].any()
    assert given.scatter().tolist() == [*range(1, 11), 0, 0, 13, 14, 0, 0]


@pytest.mark.parametrize("segment", [1, -2, 2**31 - 1])
def test_a_segment_that_is_not_there_is_padding(segment: int, device: torch.device) -> None:
    given = Given(device)
    given.segment_ids[0] = segment
    assert not given.gather()[0].any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not wait to look at values")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shapes", [[1, 1, 4, 5]]),
        ("shapes", [[1, -1, 4, -4]]),
        ("shapes", [[1, 2**31 - 1, 2**31 - 1, 2**31 - 1]]),
        ("shapes", [[1, 2**21, 2**21, 2**22]]),  # 0 elements, to those who compute in 64 bits
        ("offsets", [1, 17]),
        ("offsets", [-1, 15]),
        ("offsets", [2**62, 2**62]),
    ],
)
def test_a_video_outside_the_buffer_is_refused(name: str, value: Any) -> None:
    given = Given(torch.device("cpu"))
    getattr(given, name).copy_(torch.tensor(value))
    for call in (given.gather, given.scatter):
        with pytest.raises(RuntimeError, match=r"flat: 16 elements; video 0 .* does not fit"):
            call()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("flat", lambda x: x[None], "flat: must be one-dimensional, not of 2"),
        ("flat", lambda x: x.half(), "flat, rows: must be of one dtype"),
        ("rows", lambda x: x[0], "rows: must be .tokens, columns., not of 1"),
        ("rows", lambda x: x[:, :3], "rows: 3 columns; must be a multiple of the 4 pixels"),
        ("rows", lambda x: x[:, :0], "rows: 0 columns"),
        ("offsets", lambda x: x.int(), "offsets: must be int64"),
        ("offsets", lambda x: x[1:], "offsets: its shape does not fit"),
        ("shapes", lambda x: x.long(), "shapes: must be int32"),
        ("shapes", lambda x: x[0], "shapes|offsets: its shape does not fit"),
        ("segment_ids", lambda x: x[1:], "segment_ids: its shape does not fit"),
        ("segment_ids", lambda x: x.repeat(2)[::2], "segment_ids: must be contiguous"),
        ("coords", lambda x: x.flatten(), "coords: its shape does not fit"),
    ],
)
def test_bad_arguments_reach_no_loop(name: str, change: Any, message: str, device: torch.device) -> None:
    given = Given(device)
    setattr(given, name, change(getattr(given, name)))
    with pytest.raises(RuntimeError, match=message):
        given.gather()


@pytest.mark.parametrize("patch", [(0, 2, 2), (1, -2, -2)])
def test_a_patch_has_pixels(patch: tuple[int, int, int], device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="pt, ph, pw: must be ≥ 1"):
        Given(device).gather(patch)


def test_numbers_of_one_byte_are_refused(device: torch.device) -> None:
    given = Given(device)
    given.flat, given.rows = given.flat.to(torch.uint8), given.rows.nan_to_num().to(torch.uint8)
    with pytest.raises(RuntimeError, match="flat: elements of 1 bytes"):
        given.gather()
