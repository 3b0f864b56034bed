"""What running out of memory looks like."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host or of a GPU. On a CPU PyTorch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
