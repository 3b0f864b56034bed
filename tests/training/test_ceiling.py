import time

import torch

from sora_fast.training.ceiling import measured_ceiling


def test_the_ceiling_is_the_rate_of_a_plain_product() -> None:
    ceiling = measured_ceiling(torch.device("cpu"), torch.float32)
    a, b = torch.randn(2, 1024, 1024)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    # Other work on the cores moves either by a factor, not by an order of magnitude.
    assert 0.1 < ceiling * min(seconds) / (2 * 1024**3) < 10
