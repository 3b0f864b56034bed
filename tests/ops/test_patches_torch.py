import pytest
import torch
from einops import rearrange
from hypothesis import given
from torch import Tensor

from sora_fast.ops._patches_torch import (
    _cut,
    _linear,
    _linear_backward,
    _of,
    _put,
    cut,
    gathered,
    linear,
    put,
    scattered,
)
from sora_fast.proof.rule import poisoned_scratch
from tests.ragged import RaggedCase, ragged_cases


@given(case=ragged_cases())
def test_video_by_video_is_pixel_by_pixel(case: RaggedCase) -> None:
    """Both ways there and back, to the bit: the one of a CPU, and the one for devices that must not be waited for."""
    layout, latents = case.layout(), case.latents()
    videos = (latents.offsets, latents.shapes, layout, case.patch_size)
    expected = case.patches(latents.flat)
    for way in (cut, gathered):
        assert torch.equal(way(latents.flat, *videos, case.channels), expected)
    rows = rearrange(expected, "n (c p) -> n (p c)", c=case.channels)
    restored = latents.flat.masked_fill(case.unread(), 0)
    for way in (put, scattered):
        assert torch.equal(way(rows, *videos, len(restored)), restored)


def test_a_video_that_starts_between_two_runs_of_pixels() -> None:
    """An odd number of pixels before it: its runs cannot be copied as one number each."""
    case = RaggedCase(shapes=((1, 1, 3, 3), (1, 2, 4, 4)), patch_size=(1, 2, 2))
    layout, latents = case.layout(), case.latents()
    assert latents.offsets[1] % 2
    got = cut(latents.flat, latents.offsets, latents.shapes, layout, case.patch_size, 1)
    assert torch.equal(got, case.patches(latents.flat))


@pytest.mark.parametrize("step", [0, 2])
def test_pixels_that_are_not_side_by_side(step: int) -> None:
    """They cannot be copied by the run."""
    case = RaggedCase(shapes=((1, 1, 4, 4),), patch_size=(1, 2, 2))
    layout, latents = case.layout(), case.latents()
    flat = torch.randn(2 * len(latents.flat)).as_strided(latents.flat.shape, (step,))
    got = cut(flat, latents.offsets, latents.shapes, layout, case.patch_size, 1)
    assert torch.equal(got, case.patches(flat.contiguous()))


def test_gradients_that_start_between_two_runs_of_pixels() -> None:
    case = RaggedCase(shapes=((1, 1, 4, 4),), patch_size=(1, 2, 2), spare_tokens=0)
    layout, latents = case.layout(), case.latents()
    flat = latents.flat.requires_grad_()
    rows = cut(flat, latents.offsets, latents.shapes, layout, case.patch_size, 1)
    grad = torch.randn(rows.numel() + 1)[1:].view(rows.shape)
    (got,) = torch.autograd.grad(rows, flat, grad)
    assert torch.equal(got, torch.autograd.grad(case.patches(flat), flat, grad)[0])


def products(x: Tensor, weight: Tensor, bias: Tensor | None, case: RaggedCase, grad: Tensor) -> list[Tensor]:
    given = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    out = linear(x, weight, bias, case.layout())
    return [out, *torch.autograd.grad(out, given, grad)]


def test_padding_is_not_multiplied() -> None:
    case = RaggedCase()
    layout = case.layout()
    padding = (layout.segment_ids < 0)[:, None]
    x, grad = torch.randn(layout.capacity, 6).double(), torch.randn(layout.capacity, 3).double()
    weight, bias = torch.randn(3, 6).double(), torch.randn(3).double()
    with torch.no_grad():
        used = [t[~padding[:, 0]] for t in (x, grad)]
        exact = [used[0] @ weight.T + bias, used[1] @ weight, used[1].T @ used[0], used[1].sum(0)]
    spoiled = [t.masked_fill(padding, float("nan")) for t in (x, grad)]
    with poisoned_scratch():
        out, d_x, d_weight, d_bias = products(spoiled[0], weight, bias, case, spoiled[1])
    for got, expected in ((out, exact[0]), (d_x, exact[1])):
        torch.testing.assert_close(got[~padding[:, 0]], expected)
        assert not got[padding[:, 0]].any()
    torch.testing.assert_close([d_weight, d_bias], exact[2:])


def test_a_backward_pass_under_autocast_is_not_rounded() -> None:
    case = RaggedCase()
    x, weight, bias = torch.randn(case.layout().capacity, 6), torch.randn(3, 6), torch.randn(3)
    grad = torch.randn(len(x), 3)
    exact = products(x, weight, bias, case, grad)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(products(x, weight, bias, case, grad)[1:], exact[1:])


def test_opcheck() -> None:
    case = RaggedCase(drop=True)
    layout, latents = case.layout(), case.latents()
    places = (latents.offsets, latents.shapes, *_of(layout), list(case.patch_size))
    patches = torch.randn(layout.capacity, case.num_pixels, requires_grad=True)
    torch.library.opcheck(_cut.registered, (latents.flat.requires_grad_(), *places, case.num_pixels, "cthw"))
    torch.library.opcheck(_put.registered, (patches, *places, len(latents.flat), "thwc"))
    weight, bias, grad = torch.randn(4, case.num_pixels), torch.randn(4), torch.randn(layout.capacity, 4)
    for given_bias in (bias.requires_grad_(), None):
        torch.library.opcheck(_linear.registered, (patches, weight.requires_grad_(), given_bias, layout.cu_seqlens))
    torch.library.opcheck(
        _linear_backward.registered, (grad, patches.detach(), weight.detach(), layout.cu_seqlens, [True, False, True])
    )
