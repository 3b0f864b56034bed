"""One set of tests for both worlds: Triton's interpreter without a GPU, the compiled kernels with one."""

import os
from collections.abc import Generator

import pytest
import torch
from hypothesis import HealthCheck, settings

from benchmarks import _checkout
from tests.helpers import examples

_HAS_CUDA = torch.cuda.is_available()
# A worker has 0.8 GB, and 3.4 GB where it tests DiT-XL, which one does at a time.
_BYTES_A_WORKER = 3 << 30

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
    max_examples=examples(25).max_examples,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("sora_fast")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: a GPU (the tests that use it are then marked `gpu`), or the CPU, interpreted."""
    return torch.device("cuda" if _HAS_CUDA else "cpu")


@pytest.hookimpl(wrapper=True, optionalhook=True)  # pytest-xdist may be absent
def pytest_xdist_auto_num_workers(config: pytest.Config) -> Generator[None, int, int]:
    """`-n auto`: a worker a core as far as memory goes; none for single tests, which end before it would be there."""
    cores = yield
    if any("::" in argument for argument in config.args):
        return 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // _BYTES_A_WORKER))


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not _HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif _HAS_CUDA and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Generator[None, None, None]:
    """A cache of their own, so that the user's is not filled; where there is a GPU, its proofs are the user's."""
    if _HAS_CUDA or "SORA_FAST_CACHE" in os.environ:
        yield
        return
    os.environ["SORA_FAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["SORA_FAST_CACHE"]
