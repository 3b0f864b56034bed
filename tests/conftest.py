"""One set of tests for both worlds: Triton's interpreter without a GPU, the compiled kernels with one."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from benchmarks import _checkout

_HAS_CUDA = torch.cuda.is_available()

_checkout.make_importable()
if not _HAS_CUDA:
    # Triton reads this when a kernel is decorated: it must stand before the first `sora_fast.kernels` import.
    os.environ["TRITON_INTERPRET"] = "1"
    # Inductor would otherwise fork a pool of compile workers that outweighs the small graphs compiled here.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # Tensors in the tests are tiny: one thread is fastest, and it gives the same bits on every machine.
    torch.set_num_threads(1)

settings.register_profile(
    "sora_fast",
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("sora_fast")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: a GPU (the tests that use it are then marked `gpu`), or the CPU, interpreted."""
    return torch.device("cuda" if _HAS_CUDA else "cpu")


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not _HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif _HAS_CUDA and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
