"""The most that a device does in dense matrix products, measured: what a share of the peak is a share of."""

import time
from functools import lru_cache

import torch

# Large enough that a product is all that takes time; a CPU core does the smaller ones in a twentieth of a second.
_SIZES = {"cuda": 8192, "cpu": 1536}
_ROUNDS = 5


@lru_cache
def measured_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few square products in `dtype`, as PyTorch is set up to compute them (TF32 included).

    Takes some 0.3 s, once a process. Random numbers: a GPU computes zeros faster than it can anything else.
    """
    size = _SIZES.get(device.type, 4096)
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, generator=generator, dtype=torch.float32, device=device).to(dtype)
    return 2 * size**3 / min(_seconds(a, b) for _ in range(_ROUNDS + 1))


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    on_gpu = a.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(a.device)
    began = time.perf_counter()
    a @ b
    if on_gpu:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - began
