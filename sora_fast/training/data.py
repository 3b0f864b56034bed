"""Where training samples come from."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """One video or image (T = 1) with its caption.

    video: (C, T, H, W), float, values in [-1, 1].
    """

    video: Tensor
    caption: str = ""
