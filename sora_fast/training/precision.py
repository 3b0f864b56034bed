"""What is computed in which precision under `TrainConfig.precision = "bfloat16"`: one policy, PyTorch's autocast.

In bfloat16: matrix products (qkv, proj, MLP, text, modulation, patches, final layer), attention's queries, keys and
values, and with them the residual stream and what is kept for the backward pass.
In float32: weights and their gradients, the optimizer's state and the averaged weights (so that nothing small is lost
in a sum over steps); inside the ops, the statistics of norms, softmax, rotary angles, and sums over tokens; the noisy
state, the target, the squared error and the loss; the norm of the gradients.
Modulation tables (M rows, not N tokens) are products too, and so bfloat16; gates and shifts are applied in float32.

No loss scaling: bfloat16 has float32's range.
"""

from contextlib import AbstractContextManager

import torch

PRECISIONS = ("float32", "bfloat16")


def computing(precision: str, device_type: str) -> AbstractContextManager:
    """Inside, the forward pass computes in `precision`, one of `PRECISIONS`. The backward pass follows by itself."""
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bfloat16")
