"""What is computed in which precision under `TrainConfig.precision = "bfloat16"`: one policy, PyTorch's autocast.

In bfloat16: matrix products (qkv, proj, MLP, text, modulation, patches, final layer), attention's queries, keys and
values, and with them the residual stream and what is kept for the backward pass.
In float32: weights and their gradients, the optimizer's state and the averaged weights (so that nothing small is lost
in a sum over steps); inside the ops, the statistics of norms, softmax, rotary angles, and sums over tokens; the noisy
state, the target, the squared error and the loss; the norm of the gradients.
Modulation tables (M rows, not N tokens) are products too, and so bfloat16; gates and shifts are applied in float32.

No loss scaling: bfloat16 has float32's range.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from sora_fast.training.ceiling import measured_ceiling

PRECISIONS = ("float32", "bfloat16")
# Casts and what stays in float32 take their share: on an AMD EPYC (AVX512-BF16, no AMX) products are 2.1 times as fast
# in bfloat16 and a step 1.5 times at width 384, and no faster at the demo's 128. Below this a step would gain next to
# nothing. What it costs is less than what two seeds differ by: benchmarks/results/cpu/precision.json.
_WORTH_IT = 1.5


def computing(precision: str, device_type: str) -> AbstractContextManager:
    """Inside, the forward pass computes in `precision`, one of `PRECISIONS`. The backward pass follows by itself."""
    return torch.autocast(device_type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def fitting_precision(device: torch.device) -> tuple[str, float]:
    """("bfloat16" or "float32", how many times as fast products in bfloat16 are here). Takes some 0.2 s."""
    gain = measured_ceiling(device, torch.bfloat16) / measured_ceiling(device, torch.float32)
    return ("bfloat16" if gain >= _WORTH_IT else "float32"), gain
