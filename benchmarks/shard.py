"""A pytest plugin (`-p benchmarks.shard`) that runs every n-th test, from the i-th on: SORA_FAST_SHARD=i/n.

Most of the time of the tests on a GPU goes into compiling kernels, which is work for the host's cores.
"""

import os

import pytest


@pytest.hookimpl(trylast=True)  # after `-m` has taken out what does not belong to it
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place, count = map(int, os.environ.get("SORA_FAST_SHARD", "0/1").split("/"))
    others = [item for number, item in enumerate(items) if number % count != place]
    config.hook.pytest_deselected(items=others)
    items[:] = items[place::count]
