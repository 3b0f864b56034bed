"""Launch configurations of attention that were measured, and why. _attention_config.py looks here first.

Written whole by `python -m benchmarks.gpu_suite`, which keeps what was measured on other GPUs.
"""

# (major compute capability, pass, head dim, kind of mask) → ((own, other, num_warps, num_stages), reason).
MEASURED: dict[tuple[int, str, int, str], tuple[tuple[int, ...], str]] = {}

# Major compute capability → (the widest head at which the backward pass in one beats that in two, reason).
ONE_PASS_UP_TO: dict[int, tuple[int, str]] = {}
