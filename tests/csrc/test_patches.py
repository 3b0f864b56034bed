"""The CUDA kernels of patches, run on a host thread by thread, against the loops for a CPU; what nvcc makes of them."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton import knobs

from csrc import build
from sora_fast.ops import _library
from sora_fast.ops._patches_compiled import _geometry
from tests.helpers import examples
from tests.ragged import RaggedCase, needs_library, ragged_cases

pytestmark = [
    needs_library,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves are tested here"),
]

Op = Callable[..., None]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Op:
    """gather_patches or scatter_patches of the emulation, by name."""
    target = tmp_path_factory.mktemp("emulated") / "_emulated.so"
    build.build(build.EMULATED, target, Path("build", "csrc"))
    torch.ops.load_library(str(target))
    return lambda name: getattr(torch.ops.sora_fast_test, name).default


class Moved:
    """What both ops are given for a case. padded: elements between rows, beyond their own."""

    def __init__(self, case: RaggedCase, channel_last: bool, *, offset: int = 0, padded: int = 0) -> None:
        layout, latents = case.layout(), case.latents()
        self.tables = (*_geometry(latents.offsets, latents.shapes, layout, case.patch_size)[:4], *case.patch_size)
        self.channel_last, self.columns = channel_last, case.num_pixels
        self.tokens, self.offset, self.padded = layout.capacity, offset, padded
        # From another element on, addresses are no multiples of 16 bytes.
        self.flat = torch.cat([latents.flat.new_zeros(offset), latents.flat])[offset:]

    def rows(self) -> tuple[Tensor, Tensor]:
        """They, and what lies between them."""
        shape = (self.tokens, self.columns + self.padded)
        room = torch.full((shape[0] * shape[1] + self.offset,), float("nan"), dtype=self.flat.dtype)
        return room[self.offset :].view(shape).split((self.columns, self.padded), dim=1)

    def gather(self, op: Op, *options: bool) -> Tensor:
        rows, between = self.rows()
        op(self.flat, *self.tables, self.channel_last, *options, rows)
        assert between.isnan().all()
        return rows

    def scatter(self, op: Op, rows: Tensor, *options: bool) -> Tensor:
        flat = torch.zeros_like(self.flat)
        op(rows, *self.tables, self.channel_last, *options, flat)
        return flat


def check(moved: Moved, emulated: Callable[[str], Op], backwards: bool) -> None:
    expected = moved.gather(_library.function("gather_patches"))
    assert torch.equal(moved.gather(emulated("gather_patches"), backwards), expected)
    rows, _ = moved.rows()
    rows.copy_(torch.randn(rows.shape))
    expected = moved.scatter(_library.function("scatter_patches"), rows)
    assert torch.equal(moved.scatter(emulated("scatter_patches"), rows, backwards), expected)


@examples(100)
@given(case=ragged_cases(), channel_last=st.booleans(), backwards=st.booleans(), offset=st.integers(0, 1))
def test_random_cases_match_the_loops(
    case: RaggedCase, channel_last: bool, backwards: bool, offset: int, emulated: Callable[[str], Op]
) -> None:
    check(Moved(case, channel_last, offset=offset, padded=3 * offset), emulated, backwards)


# The first and the third are one tile wide; the others take several side by side, the last of them cut.
@pytest.mark.parametrize(
    ("channels", "patch_size"), [(16, (1, 2, 2)), (3, (4, 16, 16)), (1, (1, 1, 16)), (40, (1, 9, 1)), (257, (1, 1, 2))]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["raster", "tiled"])
def test_patches_of_all_sizes(
    channels: int, patch_size: tuple[int, int, int], dtype: torch.dtype, order: str, emulated: Callable[[str], Op]
) -> None:
    t, h, w = patch_size
    shapes = ((channels, t, 5 * h, 9 * w), (channels, 1, h + 1, 3 * w))
    case = RaggedCase(shapes=shapes, patch_size=patch_size, dtype=dtype, order=order)
    check(Moved(case, channel_last=False), emulated, backwards=False)
    if channels <= 256:
        check(Moved(case, channel_last=True), emulated, backwards=True)


@pytest.mark.parametrize("channel_last", [False, True])
def test_a_video_that_starts_between_two_runs_of_pixels(channel_last: bool, emulated: Callable[[str], Op]) -> None:
    case = RaggedCase(shapes=((1, 1, 3, 3), (1, 2, 4, 4)), patch_size=(1, 2, 2))
    check(Moved(case, channel_last), emulated, backwards=False)


def test_a_tile_that_starts_between_two_vectors(emulated: Callable[[str], Op]) -> None:
    """507 of 513 columns of 8 bytes fit into a tile, and the other six are three vectors, none of them aligned."""
    case = RaggedCase(shapes=((171, 1, 2, 9),), patch_size=(1, 1, 3), dtype=torch.float64)
    check(Moved(case, channel_last=False, padded=1), emulated, backwards=False)


def test_what_shared_memory_does_not_take_is_refused(emulated: Callable[[str], Op]) -> None:
    case = RaggedCase(shapes=((257, 1, 4, 4),), patch_size=(1, 2, 2))
    with pytest.raises(RuntimeError, match=r"rows: 2 pixels of 257 channels .* use the backend triton or torch"):
        Moved(case, channel_last=True).gather(emulated("gather_patches"), False)


def test_a_video_outside_the_buffer_is_not_read(emulated: Callable[[str], Op]) -> None:
    """A GPU does not wait to say so; its tokens are padding."""
    moved = Moved(RaggedCase(shapes=((1, 1, 4, 4), (1, 1, 4, 4)), patch_size=(1, 2, 2)), channel_last=False)
    moved.flat = moved.flat[:31]
    rows = moved.gather(emulated("gather_patches"), False)
    assert rows[:4].all() and not rows[4:].any()


@pytest.fixture(scope="session")
def listing() -> str:
    """cuobjdump's account of what the kernels take, for each of the architectures that are built."""
    library = _library.RECORD.with_name("_cuda.abi3.so")
    if not library.exists():
        pytest.skip("the CUDA library is not built: make cuda")
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_no_kernel_of_patches_spills(listing: str) -> None:
    used = re.findall(r"Function (\S*move_patches\S*):\n\s+REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", listing)
    assert len(used) >= 2 * 36, f"of two architectures; found {len(used)}"
    for name, registers, stack, local in used:
        assert (int(stack), int(local)) == (0, 0), f"{name} keeps {stack} bytes on its stack"
        assert int(registers) <= 64, f"{name} takes {registers} registers: fewer than four blocks fit"
