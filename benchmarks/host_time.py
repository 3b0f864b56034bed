"""What the host does for every op: microseconds a call, over the stub driver, beside a bare launch by Triton itself.

    python -m benchmarks.host_time [--json FILE] [--rounds 2000]

A step whose kernels take less than its launches is as slow as the host. Each op is called without gradients on a few
tokens, its kernels compiled; the minimum of many calls counts, which other work on the machine does not change, and the
ratio to the launch of a kernel of four arguments in the same run, which a slower machine does not change either. What
only a GPU adds (its allocator, the driver's own work in a launch) is in none of them.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from benchmarks import _checkout, stub_driver

_checkout.make_importable()

from sora_fast import ops, use_backend  # noqa: E402  (needs what stands above)
from sora_fast.masks import SpacetimeMask  # noqa: E402
from sora_fast.nn import BlockContext, DiTBlock  # noqa: E402
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents  # noqa: E402
from sora_fast.schedule import TileSchedule  # noqa: E402

# Microseconds a call that the project allows itself. A block is five ops; its four products are not counted.
BARS = {"packed_attention": 60.0, "block": 250.0}
BAR = 35.0
BARE = "bare launch"


@triton.jit
def bare_kernel(x, y, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place, mask=place < size), mask=place < size)


def calls() -> dict[str, Callable[[], Any]]:
    """By name: the bare launch, every op, and a block."""
    layout = PackedLayout.from_grids([(2, 4, 4), (1, 4, 4)], capacity=64)
    x = partial(torch.randn, layout.capacity, dtype=torch.bfloat16)
    rows = Conditioning.per_segment(torch.rand(layout.max_segments), layout).rows
    shift, scale, gate = torch.randn(3, layout.max_segments, 128).unbind()
    q, k, v = x(3, 2, 64).unbind(1)
    weight = torch.ones(64)
    with use_backend("torch"):  # whose schedules are right, too
        schedules = {
            "full": TileSchedule.build(layout),
            "window": TileSchedule.build(layout, SpacetimeMask.window(1, 1, 1)),
        }
    latents = RaggedLatents.from_list([torch.randn(4, 2, 8, 8).bfloat16(), torch.randn(4, 1, 8, 8).bfloat16()])
    patches, patch = torch.randn(128, 16).bfloat16(), (1, 2, 2)
    outputs = torch.randn(16, 128).bfloat16()
    data = torch.zeros(256)

    return {
        BARE: lambda: bare_kernel[(2,)](data, data, 256, BLOCK=128),
        "packed_attention, full": partial(ops.packed_attention, q, k, v, layout, schedules["full"]),
        "packed_attention, window": partial(ops.packed_attention, q, k, v, layout, schedules["window"]),
        "qk_norm_rope": partial(ops.qk_norm_rope, q, k, weight, weight, layout, ops.Rope3D()),
        "adaln": partial(ops.adaln, x(128), shift, scale, rows),
        "gated_residual": partial(ops.gated_residual, x(128), x(128), gate, rows),
        "gated_residual_adaln": partial(ops.gated_residual_adaln, x(128), x(128), gate, shift, scale, rows),
        "mlp_activation": partial(ops.mlp_activation, x(128), torch.randn(128)),
        "patch_embed": partial(ops.patch_embed, latents, patches, None, layout, patch),
        "unpatchify": partial(ops.unpatchify, x(16), layout, patch, latents),
        "linear_unpatchify": partial(ops.linear_unpatchify, x(128), outputs, None, layout, patch, latents),
        "block": block(layout, schedules["full"], rows),
    }


def block(layout: PackedLayout, schedule: TileSchedule, rows: Any) -> Callable[[], Any]:
    """A DiTBlock of 128 channels and two heads, with QK-norm and rotary positions. Of its products only the results'
    memory is taken: a CPU would compute them."""
    module = DiTBlock(128, 2, rope=ops.Rope3D()).to(torch.bfloat16).requires_grad_(False)
    x, h = torch.randn(2, layout.capacity, 128).bfloat16().unbind()
    tables = torch.randn(8, layout.max_segments, 128).bfloat16().unbind()
    return partial(module, x, h, tables[:6], tables[6:], BlockContext(layout, schedule, rows))


def allocated(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """In place of F.linear."""
    return x.new_empty(len(x), len(weight))


def measure(named: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Microseconds a call, the minimum of `rounds`. They take turns, the bare launch before each other one, so that a
    busy time hits all alike."""
    for call in named.values():
        call()  # compiles
    least = dict.fromkeys(named, float("inf"))
    for _ in range(rounds):
        for name in named:
            for own in (BARE, name):
                least[own] = min(least[own], _microseconds(named[own]))
    return least


def _microseconds(call: Callable[[], Any]) -> float:
    call()  # as after one like it: ops in turns would find the caches full of each other's, as they do in a block
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1000


def bar(name: str) -> float:
    """Of an op or of the block."""
    return BARS.get(name.split(",")[0], BAR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write microseconds a call, by name, to this file")
    parser.add_argument("--rounds", type=int, default=2000)
    given = parser.parse_args()
    stub_driver.activate()
    with torch.no_grad(), use_backend("triton"), mock.patch.object(F, "linear", allocated):
        found = measure(calls(), given.rounds)
    print(f"{'':26} {'µs a call':>9} {'bare launches':>14} {'bar, µs':>8}")
    for name, time_ in found.items():
        own = "" if name == BARE else f"{bar(name):8.0f}"
        print(f"{name:26} {time_:9.1f} {time_ / found[BARE]:14.1f} {own}")
    if given.json:
        given.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
