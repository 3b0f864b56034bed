"""Which precision suits a device: measured, not guessed from its name."""

import torch

from sora_fast.training.ceiling import measured_ceiling

# Casts and what stays in float32 take their share: on two cores of an AMD EPYC (AVX512-BF16, no AMX) products
# are 2.1 times as fast in bfloat16 and a step 1.5 times. Below this a step would gain next to nothing.
_WORTH_IT = 1.5


def fitting_precision(device: torch.device) -> tuple[str, float]:
    """("bfloat16" or "float32", how many times as fast products in bfloat16 are here). Takes some 0.2 s."""
    gain = measured_ceiling(device, torch.bfloat16) / measured_ceiling(device, torch.float32)
    return ("bfloat16" if gain >= _WORTH_IT else "float32"), gain
